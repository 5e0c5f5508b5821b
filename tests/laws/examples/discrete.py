"""Discrete diffusion: losses, kernels as their log-probabilities, and samplers, with a denoiser that is a table."""

import jax
import jax.numpy as jnp
import optax
from laws.harness import Example

from esscher.core import categorical
from esscher.objectives import discrete as losses
from esscher.samplers.diffusion import anchored, discrete, restarts

B, L, V, MASK = 8, 3, 4, 3  # the mask is one of the tokens
KEY = jax.random.key(0)
LOGITS = jax.random.normal(jax.random.key(1), (B, L, V))
CLEAN = jax.random.randint(jax.random.key(2), (B, L), 0, MASK)
NOISY = categorical.mask_corrupt(jax.random.key(3), CLEAN, 0.4, MASK)
LATER = jnp.where(jnp.arange(L) == 1, CLEAN, NOISY)  # one more is unmasked
REPLACED = jax.random.randint(jax.random.key(4), (B, L), 0, V)
COUNTED = (jnp.arange(B * L).reshape(B, L) % 5 > 0).astype(jnp.float32)
TIMES = jnp.array([1.0, 0.6, 0.2, 0.0])
ALPHA = categorical.linear_alpha
TABLE = jax.random.normal(jax.random.key(5), (V, 2))
SHORT = {"tokens of one axis": ("x", jnp.zeros(8, jnp.int32)), "tokens that are not whole": ("x", jnp.zeros((8, 3)))}


def kernel(make, x_s, *covers, x=NOISY, extremes=None, **hyper):
    """The log-probability of one step."""

    def log_prob(logits, x, x_s, **hyper):
        return make(lambda x, t: logits, **hyper).log_prob(x_s, x, jnp.asarray(0.7), jnp.asarray(0.3))

    return Example(
        name=covers[-1].__name__,
        function=log_prob,
        arguments={"logits": LOGITS, "x": x, "x_s": x_s, **{n: jnp.asarray(v) for n, v in hyper.items()}},
        covers=covers,
        hyperparameters=tuple(hyper),
        differentiable=("logits", *hyper),
        batch=("logits", "x", "x_s"),
        extremes=extremes,
        bad=SHORT,
    )


def step(make):
    """A sample of one step."""
    return lambda key, logits, x: make(lambda x, t: logits).sample(key, x, jnp.asarray(0.7), jnp.asarray(0.3))


def sampler(name, run, *covers, bad=SHORT, **hyper):
    """Tokens drawn by a key."""
    return Example(
        name=name,
        function=run,
        arguments={"key": KEY, "logits": LOGITS, "x": NOISY, **{n: jnp.asarray(v) for n, v in hyper.items()}},
        covers=covers,
        hyperparameters=tuple(hyper),
        batch=("logits", "x"),
        extremes=("logits",),
        bad=bad,
    )


def score_entropy(function, x_t, **options):
    return Example(
        name=function.__name__,
        function=lambda log_score, x0, x_t, sigma: function(log_score, x0, x_t, sigma, **options),
        arguments={"log_score": LOGITS, "x0": CLEAN, "x_t": x_t, "sigma": jnp.linspace(0.2, 2.0, B)},
        covers=(function,),
        differentiable=("log_score", "sigma"),
        batch=("log_score", "x0", "x_t", "sigma"),
        extremes=(),  # the loss is the exponential of a score
    )


EXAMPLES = [
    Example(
        name="mdlm_loss",
        function=lambda logits, x0, x_t, weight, mask: losses.mdlm_loss(
            logits, x0, x_t, MASK, weight=weight, mask=mask
        ),
        arguments={
            "logits": LOGITS,
            "x0": CLEAN,
            "x_t": NOISY,
            "weight": jnp.linspace(0.5, 2.0, B),
            "mask": COUNTED,
        },
        covers=(losses.mdlm_loss,),
        differentiable=("logits", "weight"),
        masks={"mask": ("logits", "x0")},
        batch=("logits", "x0", "x_t", "weight", "mask"),
    ),
    Example(
        name="mdlm_weight",
        function=lambda t, power: losses.mdlm_weight(t, lambda t: 1 - t**power),
        arguments={"t": jnp.linspace(0.1, 0.9, B), "power": jnp.asarray(1.5)},
        covers=(losses.mdlm_weight,),
        hyperparameters=("power",),
        differentiable=("t", "power"),
        batch=("t",),
        extremes=(),  # times end at 1
        exempt={"errors": "a function of one array of any shape"},
    ),
    Example(
        name="d3pm_kl",
        function=lambda logits, x0, x_t, alpha_t, alpha_s, mask: losses.d3pm_kl(
            logits, x0, x_t, alpha_t, alpha_s, mask=mask
        ),
        arguments={
            "logits": LOGITS,
            "x0": CLEAN,
            "x_t": REPLACED,
            "alpha_t": jnp.linspace(0.1, 0.5, B),
            "alpha_s": jnp.asarray(0.8),
            "mask": COUNTED,
        },
        covers=(losses.d3pm_kl,),
        hyperparameters=("alpha_s",),
        differentiable=("logits", "alpha_s"),
        masks={"mask": ("logits", "x0", "x_t")},
        batch=("logits", "x0", "x_t", "alpha_t", "mask"),
    ),
    score_entropy(losses.score_entropy_absorb, NOISY, mask_id=MASK),
    score_entropy(losses.score_entropy_uniform, REPLACED),
    kernel(lambda denoiser: discrete.masked_kernel(denoiser, ALPHA, MASK), LATER, discrete.masked_kernel),
    kernel(
        lambda denoiser, cap: discrete.masked_kernel(denoiser, ALPHA, MASK, remask=discrete.remask_cap(cap)),
        LATER,
        discrete.masked_kernel,
        discrete.remask_cap,
        cap=0.2,
    ),
    kernel(
        lambda denoiser, eta: discrete.masked_kernel(denoiser, ALPHA, MASK, remask=discrete.remask_rescale(eta)),
        LATER,
        discrete.masked_kernel,
        discrete.remask_rescale,
        eta=0.4,
    ),
    kernel(lambda denoiser: discrete.uniform_kernel(denoiser, ALPHA), CLEAN, discrete.uniform_kernel, x=REPLACED),
    kernel(
        lambda score: discrete.sedd_kernel(lambda x, t: score(x, t) - 3, lambda t: t, MASK),
        LATER,
        discrete.sedd_kernel,
        extremes=(),  # with scores that large no mask can stay, which has the log-probability -inf
    ),
    kernel(
        lambda denoiser: discrete.any_order_kernel(denoiser, MASK),
        jnp.where(jnp.arange(L) == 1, CLEAN, MASK),
        discrete.any_order_kernel,
        x=jnp.full((B, L), MASK),
    ),
    Example(
        name="fill_in_value",
        function=lambda logits, x: discrete.fill_in_value(lambda x, t: logits, lambda x: x.sum(-1) * 0.5, MASK)(x, 0.5),
        arguments={"logits": LOGITS, "x": NOISY},
        covers=(discrete.fill_in_value,),
        constants=("logits",),
        batch=("logits", "x"),
        extremes=("logits",),
    ),
    Example(
        name="unmask_most_confident",
        function=lambda x, sampled, confidence, n_commit: discrete.unmask_most_confident(
            x, sampled, confidence, x == MASK, n_commit
        ),
        arguments={
            "x": NOISY,
            "sampled": CLEAN,
            "confidence": LOGITS[..., 0],
            "n_commit": jnp.arange(B) % 3,
        },
        covers=(discrete.unmask_most_confident,),
        batch=("x", "sampled", "confidence", "n_commit"),
    ),
    sampler("masked_step", step(lambda d: discrete.masked_kernel(d, ALPHA, MASK)), discrete.masked_kernel),
    sampler("uniform_step", step(lambda d: discrete.uniform_kernel(d, ALPHA)), discrete.uniform_kernel),
    sampler("any_order_step", step(lambda d: discrete.any_order_kernel(d, MASK)), discrete.any_order_kernel),
    sampler(
        "confidence_unmask",
        lambda key, logits, x, temperature: discrete.confidence_unmask(
            key, lambda x, t: logits, x, TIMES, ALPHA, MASK, confidence="entropy", temperature=temperature
        ),
        discrete.confidence_unmask,
        temperature=0.8,
    ),
    sampler(
        "anchored",
        lambda key, logits, x, rate: anchored.anchored(
            key,
            lambda x, t: logits,
            lambda e: jnp.square(e).sum((1, 2)),
            TABLE,
            x,
            TIMES,
            ALPHA,
            MASK,
            optax.adam(rate),
            n_steps=2,
        ),
        anchored.anchored,
        rate=0.5,
    ),
    sampler(
        "best_of",
        lambda key, logits, x, temperature: restarts.best_of(
            key,
            lambda key: discrete.confidence_unmask(
                key, lambda x, t: logits, x, TIMES, ALPHA, MASK, temperature=temperature
            ),
            lambda tokens: TABLE[tokens].sum((1, 2)),
            2,
        ),
        restarts.best_of,
        temperature=0.8,
    ),
    Example(
        name="st_embed",
        function=lambda logits, table, temperature: anchored.st_embed(KEY, logits, table, temperature, mode="argmax"),
        arguments={"logits": LOGITS, "table": TABLE, "temperature": jnp.asarray(0.7)},
        covers=(anchored.st_embed,),
        hyperparameters=("temperature",),
        batch=("logits",),
        extremes=("logits",),
        exempt={"gradients": "straight-through: of the expectation, not of the value; see test_anchored"},
    ),
    Example(
        name="inner_logit_guidance",
        function=lambda logits, rate: anchored.inner_logit_guidance(
            KEY,
            logits,
            NOISY == MASK,
            lambda key, phi: (jax.nn.softmax(phi) * TABLE[:, 0]).sum((1, 2)),
            optax.sgd(rate),
            2,
        ),
        arguments={"logits": LOGITS, "rate": jnp.asarray(0.5)},
        covers=(anchored.inner_logit_guidance,),
        hyperparameters=("rate",),
        differentiable=("logits", "rate"),
    ),
]

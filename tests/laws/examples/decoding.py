"""Decoding, of a tabular language model; transforms, as the law that is sampled from."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core.exact.tabular_lm import TabularLM
from esscher.samplers import decoding
from esscher.samplers.decoding.generation import check_prompt

KEY = jax.random.key(0)
LOGITS = 2.0 * jax.random.normal(jax.random.key(1), (8, 5))
TARGET = TabularLM(jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (40, 3))), 4)
DRAFT = TabularLM(jax.nn.log_softmax(TARGET.log_probs + jax.random.normal(jax.random.key(3), (40, 3))), 4)
LM = TARGET.language_model()
PROMPT = jax.random.randint(jax.random.key(4), (8, 2), 0, 3)
MASK = jnp.ones((8, 2)).at[::3, 0].set(0.0)
BAD = {
    "a prompt of numbers that are not whole": ("prompt", jnp.ones((8, 2))),
    "a prompt without a batch": ("prompt", jnp.zeros(2, jnp.int32)),
}


def transform(make, values, *, differentiable=(), batch=("logits",), **options):
    """The law of the next token under one transform."""

    def law(logits, seen, **values):
        made = make(**values)
        prompt = jnp.broadcast_to(seen, (logits.shape[0], 3))  # so that rows differ by their logits alone
        return jax.nn.softmax(made.apply(logits, made.init(prompt, jnp.ones_like(prompt), logits.shape[-1])))

    return Example(
        name=make.__name__,
        function=law,
        arguments={"logits": LOGITS, "seen": jnp.array([1, 4, 1]), **jax.tree.map(jnp.asarray, values)},
        covers=(make,),
        differentiable=("logits", *differentiable),
        batch=batch,
        **options,
    )


def decoder(function, run, *, covers=(), arguments, **options):
    """A decoder as a function of prompts, masks, and perhaps a key."""
    return Example(
        name=function.__name__,
        function=run,
        arguments={"prompt": PROMPT, "mask": MASK, **jax.tree.map(jnp.asarray, arguments)},
        covers=(function, *covers),
        masks={"mask": ("prompt",)},
        batch=("prompt", "mask"),
        bad=BAD,
        **options,
    )


def generate(key, prompt, mask, tau, p, theta):
    transforms = decoding.repetition_penalty(theta), decoding.temperature(tau), decoding.top_p(p)
    return decoding.generate(key, LM, prompt, mask, 3, transforms=transforms, stop=(2,))


def speculative_generate(key, prompt, mask, tau):
    transforms, models = (decoding.temperature(tau),), (LM, DRAFT.language_model())
    return decoding.speculative_generate(key, *models, prompt, mask, 3, ahead=2, transforms=transforms, stop=(2,))


EXAMPLES = [
    transform(decoding.temperature, {"tau": 0.7}, hyperparameters=("tau",), differentiable=("tau",)),
    transform(decoding.top_k, {"k": 2}),
    transform(decoding.top_p, {"p": 0.8}, hyperparameters=("p",)),
    transform(decoding.min_p, {"ratio": 0.2}, hyperparameters=("ratio",)),
    transform(decoding.typical_p, {"mass": 0.6}, hyperparameters=("mass",)),
    transform(decoding.repetition_penalty, {"theta": 1.3}, hyperparameters=("theta",), differentiable=("theta",)),
    transform(decoding.logit_bias, {"bias": jnp.roll(LOGITS, 1, 0)}, batch=("logits", "bias")),
    transform(
        decoding.token_mask,
        {"allowed": (jnp.roll(LOGITS, 2, 0) > -1).astype(jnp.float32)},
        batch=("logits", "allowed"),
        masks={"allowed": ("logits",)},
    ),
    Example(
        name="stateless",
        function=lambda logits: jax.nn.softmax(decoding.stateless(lambda x: 3 * jnp.tanh(x)).apply(logits, ())),
        arguments={"logits": LOGITS},
        covers=(decoding.stateless,),
        differentiable=("logits",),
        batch=("logits",),
    ),
    Example(
        name="greedy",
        function=lambda logits: decoding.greedy(KEY, logits),
        arguments={"logits": LOGITS},
        covers=(decoding.greedy,),
        batch=("logits",),
    ),
    decoder(
        decoding.generate,
        generate,
        covers=(check_prompt,),
        arguments={"key": KEY, "tau": 0.8, "p": 0.9, "theta": 1.2},
        hyperparameters=("tau", "p", "theta"),
    ),
    decoder(
        decoding.beam_search,
        lambda prompt, mask, alpha: decoding.beam_search(LM, prompt, mask, 3, width=4, stop=(2,), length_penalty=alpha),
        arguments={"alpha": 0.6},
        hyperparameters=("alpha",),
    ),
    decoder(
        decoding.stochastic_beam_search,
        lambda key, prompt, mask: decoding.stochastic_beam_search(key, LM, prompt, mask, 3, width=4, stop=(2,)),
        arguments={"key": KEY},
    ),
    Example(
        name="log_inclusion_weights",
        # The scale is there because pmap of JAX 0.10 leaves the last array whole when none is unmapped.
        function=lambda logp, kappa, scale: scale * decoding.log_inclusion_weights(logp, kappa),
        arguments={"logp": -jnp.abs(LOGITS), "kappa": jnp.linspace(-4.0, 0.5, 8), "scale": jnp.asarray(1.2)},
        covers=(decoding.log_inclusion_weights,),
        hyperparameters=("scale",),
        differentiable=("logp", "kappa"),
        batch=("logp", "kappa"),
    ),
    Example(
        name="speculative_accept",
        function=decoding.speculative_accept,
        arguments={
            "key": KEY,
            "target_logp": jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (8, 4, 5))),
            "draft_logp": jax.nn.log_softmax(jax.random.normal(jax.random.key(6), (8, 3, 5))),
            "draft": jax.random.randint(jax.random.key(7), (8, 3), 0, 5),
        },
        covers=(decoding.speculative_accept,),
        batch=("target_logp", "draft_logp", "draft"),
        bad={
            "a draft of numbers that are not whole": ("draft", jnp.ones((8, 3))),
            "whole log-probs": ("target_logp", jnp.zeros((8, 4, 5), jnp.int32)),
        },
    ),
    decoder(
        decoding.speculative_generate,
        speculative_generate,
        arguments={"key": KEY, "tau": 0.8},
        hyperparameters=("tau",),
    ),
]

r"""Samplers of discrete diffusion: kernels with an exact density, for masked, uniform and score models, and decoding.

A denoiser says of noisy tokens what the data were, `(x_t[B, L], t[B]) -> logits[B, L, V]`. Times run from 1, noise, to
0, data, `alpha(t)` is the chance that a token is its own (see `core.categorical`), and a grid may end at `alpha = 1`
itself. Kernels decide on all positions at once and independently, so what they sample is the model only as steps
become small, or where one position is decided on at a time; `core.exact.masked.chain_law` tells for a table what it is.

They serve `smc` by `steering.twisted`, `svdd`, and policy gradients: all that asks for a `ReverseKernel`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import check_known, check_per_example, expand_like, tempered
from esscher.core.categorical import (
    check_tokens,
    masked_posterior_logits,
    safe_log,
    subs_logits,
    uniform_posterior_logits,
)
from esscher.core.contracts import ReverseKernel
from esscher.samplers.integration import check_times

__all__ = [
    "Confidence",
    "Denoiser",
    "Guide",
    "Level",
    "any_order_kernel",
    "confidence_unmask",
    "fill_in_value",
    "masked_kernel",
    "remask_cap",
    "remask_rescale",
    "sedd_kernel",
    "uniform_kernel",
    "unmask_most_confident",
]

Denoiser = Callable[[Array, Array], Array]
"""`(x_t[B, L], t[B]) -> logits[B, L, V]`."""

Level = Callable[[Array], Array]
"""An elementwise function of time, such as `categorical.linear_alpha` or a `Schedule`'s `alpha`."""

Guide = Callable[[Array, Array, Array], Array]
"""`(key, logits[B, L, V], x_t[B, L]) -> logits[B, L, V]`."""

Confidence = Literal["maximum", "entropy", "random"]


# --- kernels ----------------------------------------------------------------------------------------------------------


def masked_kernel(
    denoiser: Denoiser, alpha: Level, mask_id: int | Array, *, remask: Callable[[Array], Array] | None = None
) -> ReverseKernel:
    r"""Ancestral sampling of masked diffusion, and ReMDM, in which tokens may be masked again.

    See `categorical.masked_posterior_logits` for the step. A position is unmasked at `s` with probability `alpha(s)`
    whatever the remasking. Its law tends to that of the model as the steps become small, with an error of their order,
    also with remasking whose chances become small with them: a step with more than one position to decide on leaves
    out what the model knows of their dependence.

    Args:
      denoiser: of the model; the logit of the mask, and all at unmasked positions, do not matter.
      alpha: the schedule.
      mask_id: the mask's token.
      remask: from the largest chance to be masked again that the marginals allow, `min(1, (1 - alpha_s) / alpha_t)`,
        to the one wanted, which is not above: `remask_cap`, `remask_rescale`; never if absent.

    Returns:
      The kernel: one evaluation for a sample, and one for its `log_prob`. All masks at `alpha = 0` is the start.

    Reference: Simple and Effective Masked Diffusion Language Models, arXiv:2406.07524; Remasking Discrete Diffusion
      Models with Inference-Time Scaling, arXiv:2503.00307.
    """

    def law(x: Array, t: Array, s: Array) -> Array:
        alpha_t, alpha_s = alpha(t), alpha(s)
        most = jnp.minimum((1 - alpha_s) / jnp.where(alpha_t > 0, alpha_t, 1.0), 1.0)
        most = jnp.where(alpha_t > 0, most, 1.0)
        again = 0.0 if remask is None else jnp.clip(remask(most), 0, most)
        return masked_posterior_logits(_ask(denoiser, x, t), x, alpha_t, alpha_s, mask_id, again)

    return _factored(law, mask_id)


def remask_cap(cap: float | Array) -> Callable[[Array], Array]:
    """ReMDM's capped schedule, `m = min(cap, most)`: the same chance at every step until the marginals forbid it.

    Reference: Remasking Discrete Diffusion Models with Inference-Time Scaling, arXiv:2503.00307.
    """
    return lambda most: jnp.minimum(cap, most)


def remask_rescale(eta: float | Array) -> Callable[[Array], Array]:
    """ReMDM's rescaled schedule, `m = eta most`, `eta` in `[0, 1]`.

    With a fixed share more positions are decided on together than without, however small the steps are, so the error
    of the law falls more slowly with their number.

    Reference: Remasking Discrete Diffusion Models with Inference-Time Scaling, arXiv:2503.00307.
    """
    return lambda most: eta * most


def uniform_kernel(denoiser: Denoiser, alpha: Level) -> ReverseKernel:
    r"""Ancestral sampling of uniform diffusion; see `categorical.uniform_posterior_logits` for the step.

    Its law tends to that of the model as the steps become small. The start is uniform.

    Args:
      denoiser: of the law of each token given `x_t` at all other positions, to which `objectives.discrete.d3pm_kl`
        trains; `categorical.leave_one_out` makes it of the law given all of `x_t`.
      alpha: the schedule; above 0 but at the first time.

    Returns:
      The kernel.

    Reference: Structured Denoising Diffusion Models in Discrete State-Spaces, arXiv:2107.03006.
    """
    return _factored(lambda x, t, s: uniform_posterior_logits(_ask(denoiser, x, t), x, alpha(t), alpha(s)))


def sedd_kernel(log_score: Denoiser, sigma: Level, mask_id: int | Array) -> ReverseKernel:
    r"""The analytic step of a score-entropy model with absorbing noise, from the score staggered to `s`.

    With `d = sigma(t) - sigma(s)` and `alpha = e^(-sigma)` a masked position becomes `y` with weight
    `(e^d - 1) score_y` and stays masked with weight `1 - (e^d - 1) sum_y score_y`, taken for 0 where a wrong score
    makes it negative and at `sigma(s) = 0`. With the exact score, `p(y | x_t) / (e^sigma - 1)`, it is `masked_kernel`.

    Args:
      log_score: `log p_t(y) / p_t(x_t)` for `y` in the place of a mask, `(x_t, t) -> [B, L, V]`.
      sigma: total noise, rising in `t` from 0; finite.
      mask_id: the mask's token.

    Returns:
      The kernel.

    Reference: Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution, arXiv:2310.16834.
    """

    def law(x: Array, t: Array, s: Array) -> Array:
        weights = subs_logits(_ask(log_score, x, t), x, mask_id)
        masked, sigma_s = x == mask_id, sigma(s)
        weights += jnp.where(masked, jnp.log(jnp.expm1(sigma(t) - sigma_s)), 0.0)[..., None]
        stays = -jnp.expm1(jnp.minimum(jax.nn.logsumexp(weights, -1), 0))
        stays = jnp.where(masked & (sigma_s > 0), stays, 0)
        weights = jnp.concatenate([weights, safe_log(stays)[..., None]], -1)
        return jax.nn.log_softmax(weights)

    return _factored(law, mask_id)


def any_order_kernel(denoiser: Denoiser, mask_id: int | Array) -> ReverseKernel:
    """One masked position, drawn uniformly, gets its token; where none is masked nothing changes.

    As many steps as there are masks make an any-order autoregressive model, so with the exact law of one token given
    the unmasked ones the samples are those of the model exactly. Between the denoisers of a model and of its tilt
    `p exp(r / beta)` it is the optimal proposal of `steering.twisted`. Times pass to the denoiser only.

    Args:
      denoiser: of the model.
      mask_id: the mask's token.

    Returns:
      The kernel.

    Reference: Autoregressive Diffusion Models, arXiv:2110.02037.
    """

    def law(x: Array, t: Array) -> tuple[Array, Array]:
        return x == mask_id, jax.nn.log_softmax(subs_logits(_ask(denoiser, x, t), x, mask_id))

    def sample(key: Array, x: Array, t: Array, s: Array) -> Array:
        token_key, place_key = jax.random.split(key)
        masked, log_probs = law(x, t)
        order = _confidence(place_key, log_probs, "random")
        return unmask_most_confident(x, _draw(token_key, log_probs, x), order, masked, jnp.ones(len(x), jnp.int32))

    def log_prob(x_s: Array, x: Array, t: Array, s: Array) -> Array:
        check_tokens(x_s=x_s, x=x)
        masked, log_probs = law(x, t)
        changed = x_s != x
        count, gone = masked.sum(-1), changed.sum(-1)
        possible = (gone == jnp.minimum(count, 1)) & ~(changed & ~masked).any(-1)
        taken = jnp.where(changed & masked, _taken(log_probs, x_s), 0).sum(-1)
        return jnp.where(possible, taken - jnp.log(jnp.maximum(count, 1)), -jnp.inf)

    return ReverseKernel(sample, log_prob)


def _ask(denoiser: Denoiser, x: Array, t: Array) -> Array:
    check_tokens(x=x)
    logits = denoiser(x, jnp.broadcast_to(t, x.shape[:1]))
    check_tokens(logits, x=x)
    return logits


def _draw(key: Array, log_probs: Array, x: Array) -> Array:
    # Numbers of full precision: 23 bits would never draw a token of probability 1e-8, which lowers the entropy.
    return jax.random.categorical(key, log_probs, mode="high").astype(x.dtype)


def _taken(log_probs: Array, index: Array) -> Array:
    return jnp.take_along_axis(log_probs, index[..., None], -1, mode="fill", fill_value=-jnp.inf)[..., 0]


def _factored(law: Callable[[Array, Array, Array], Array], mask_id: int | Array | None = None) -> ReverseKernel:
    """The kernel of `law(x, t, s)`, normalised log-probs of each token and, if there is one, of the mask at the end."""

    def sample(key: Array, x: Array, t: Array, s: Array) -> Array:
        log_probs = law(x, t, s)
        drawn = _draw(key, log_probs, x)
        if mask_id is None:
            return drawn
        return jnp.where(drawn == log_probs.shape[-1] - 1, jnp.asarray(mask_id, x.dtype), drawn)

    def log_prob(x_s: Array, x: Array, t: Array, s: Array) -> Array:
        check_tokens(x_s=x_s, x=x)
        log_probs = law(x, t, s)
        index = x_s if mask_id is None else jnp.where(x_s == mask_id, log_probs.shape[-1] - 1, x_s)
        return _taken(log_probs, index).sum(-1)

    return ReverseKernel(sample, log_prob)


# --- values -----------------------------------------------------------------------------------------------------------


def fill_in_value(
    denoiser: Denoiser, reward: Callable[[Array], Array], mask_id: int | Array
) -> Callable[[Array, Array], Array]:
    """The reward of `x_t` with each mask replaced by the denoiser's most likely token, for `svdd` and `twisted`.

    On unmasked tokens it is the reward itself, so it is a twist, right at the end, of whatever quality on the way.

    Args:
      denoiser: of the model; one evaluation.
      reward: of tokens, `[B, L] -> [B]`; for `twisted` divided by `beta`.
      mask_id: the mask's token.

    Returns:
      The value, `(x[B, L], t) -> [B]`.

    Reference: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
      arXiv:2408.08252.
    """
    return lambda x, t: reward(jnp.argmax(subs_logits(_ask(denoiser, x, t), x, mask_id), -1).astype(x.dtype))


# --- decoding by confidence -------------------------------------------------------------------------------------------


def unmask_most_confident(x: Array, sampled: Array, confidence: Array, is_mask: Array, n_commit: Array) -> Array:
    """Puts the `n_commit` most confident of the sampled tokens in the place of their masks; all others stay masked.

    Args:
      x: tokens, `[B, L]`.
      sampled: what could stand at each position, `[B, L]`.
      confidence: `[B, L]`; of equal ones the first counts as more.
      is_mask: which positions are free, booleans `[B, L]`.
      n_commit: `[B]`; of more than there are, all.

    Returns:
      `[B, L]`.

    Raises:
      ValueError: arrays of other shapes.

    Reference: Test-Time Anchoring for Discrete Diffusion Posterior Sampling, arXiv:2510.02291.
    """
    check_tokens(x=x, sampled=sampled)
    if confidence.shape != x.shape or is_mask.shape != x.shape or jnp.shape(n_commit) != x.shape[:1]:
        raise ValueError(
            f"confidence and is_mask must have shape {x.shape}, n_commit {x.shape[:1]}, "
            f"got {confidence.shape}, {is_mask.shape}, {jnp.shape(n_commit)}"
        )
    order = jnp.argsort(jnp.where(is_mask, -confidence, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(is_mask & (rank < n_commit[:, None]), sampled, x)


def confidence_unmask(
    key: Array,
    denoiser: Denoiser,
    x: Array,
    times: Array,
    alpha: Level,
    mask_id: int | Array,
    *,
    confidence: Confidence = "maximum",
    temperature: float | Array = 1.0,
    guide: Guide | None = None,
) -> Array:
    r"""Draws all masked tokens at each step, and keeps those positions of which the denoiser is most certain.

    A step keeps `floor(n (alpha_s - alpha_t) / (1 - alpha_t))` of the `n` masked positions, as many as ancestral
    sampling would on average, and the last keeps all. None of the confidences depends on the tokens drawn, so with the
    exact conditionals, temperature 1 and steps that keep one token the samples are those of the model, in whatever
    order. Steps that keep more, and temperatures, have another law.

    Args:
      key: typed random key.
      denoiser: of the model; one evaluation a step.
      x: tokens, `[B, L]`, with masks where there is something to decide on; others are never changed.
      times: decreasing, `[T + 1]`.
      alpha: the schedule.
      mask_id: the mask's token.
      confidence: "maximum", the log-prob of the most likely token; "entropy", less the entropy; "random".
      temperature: tokens, and confidences, are those of `softmax(logits / temperature)`; a scalar or `[B]`. At 0, the
        limit, tokens are the most likely ones, and the surest are those that lead the second by most.
      guide: changes the logits before tokens are drawn from them, as in `anchored`.

    Returns:
      `[B, L]`, without masks.

    Raises:
      ValueError: tokens, a grid or a temperature of the wrong shape, an unknown confidence, a temperature known to be
        below 0.

    Reference: Large Language Diffusion Models, arXiv:2502.09992; MaskGIT: Masked Generative Image Transformer,
      arXiv:2202.04200.
    """
    times = check_times(times)
    check_tokens(x=x)
    check_per_example(x, temperature=temperature)
    check_known(lambda tau: tau >= 0, "at least 0", temperature=temperature)
    if confidence not in ("maximum", "entropy", "random"):
        raise ValueError(f'confidence must be "maximum", "entropy" or "random", got {confidence!r}')
    levels = alpha(times)
    shares = (levels[1:] - levels[:-1]) / jnp.maximum(1 - levels[:-1], jnp.finfo(levels.dtype).tiny)
    shares = shares.at[-1].set(1.0)

    def step(x: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        key, t, share = inputs
        token_key, order_key, guide_key = jax.random.split(key, 3)
        is_mask, logits = x == mask_id, subs_logits(_ask(denoiser, x, t), x, mask_id)
        if guide is not None:
            logits = guide(guide_key, logits, x)
        log_probs = jax.nn.log_softmax(tempered(logits, expand_like(temperature, logits)))
        # A share such as 1/3 of 3 positions is rounded: without the margin it might keep none.
        n_commit = jnp.floor(share * is_mask.sum(-1) + 1e-3).astype(jnp.int32)
        sure = _confidence(order_key, log_probs, confidence)
        if confidence != "random":
            # As it falls to 0 all confidences tend to 0, in the order of their leads.
            sure = jnp.where(expand_like(temperature, sure) <= 0, _lead(logits), sure)
        return unmask_most_confident(x, _draw(token_key, log_probs, x), sure, is_mask, n_commit), None

    keys = jax.random.split(key, len(times) - 1)
    return jax.lax.scan(step, x, (keys, times[:-1], shares))[0]


def _confidence(key: Array, log_probs: Array, kind: Confidence) -> Array:
    """`[B, L, V] -> [B, L]`."""
    if kind == "random":
        return jax.random.uniform(key, log_probs.shape[:2])
    if kind == "maximum":
        return log_probs.max(-1)
    possible = log_probs > -jnp.inf
    return jnp.sum(jnp.where(possible, jnp.exp(log_probs) * jnp.where(possible, log_probs, 0), 0), -1)


def _lead(logits: Array) -> Array:
    """How far the largest is ahead of the second, `[B, L, V] -> [B, L]`; 0 where two are largest."""
    rest = jnp.where(tempered(logits, 0) == 0, -jnp.inf, logits)
    return logits.max(-1) - rest.max(-1)

r"""Transforms of next-token logits: temperature, truncations, penalties, biases and masks.

Each function makes a `Transform`; `generate` applies several in order, usually masks and penalties first, then the
temperature, then truncations. Truncations keep all tokens that tie with the last one kept, and always at least one.
Parameters may be traced; where they are not, values that make no sense are refused by a ValueError.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_known, tempered
from esscher.core.contracts import Transform
from esscher.core.tokens import token_entropy

__all__ = [
    "logit_bias",
    "min_p",
    "repetition_penalty",
    "stateless",
    "temperature",
    "token_mask",
    "top_k",
    "top_p",
    "typical_p",
]


def stateless(function: Callable[[Array], Array]) -> Transform:
    """A transform without a carry from `logits[B, V] -> logits[B, V]`; the logits come in float32 at least."""

    def apply(logits: Array, carry: tuple) -> Array:
        check_floating(logits=logits)
        return function(at_least_float32(logits))

    return Transform(lambda prompt, mask, vocabulary: (), apply, lambda carry, token: ())


def temperature(tau: float | Array) -> Transform:
    """Divides logits by `tau`: it samples `p^(1/tau)`, renormalised at every token; 0 leaves the most likely one.

    The law of a sequence is then not `p(x)^(1/tau)` renormalised: that of each token is, given those before it.
    """
    check_known(lambda tau: tau >= 0, "at least 0", tau=tau)
    return stateless(lambda logits: tempered(logits, tau))


def top_k(k: int | Array) -> Transform:
    """Keeps the `k` most likely tokens, one at least: `k = 0` is greedy, not off."""

    def apply(logits: Array) -> Array:
        ascending = jnp.sort(logits, axis=-1)
        last = jnp.clip(logits.shape[-1] - jnp.asarray(k, jnp.int32), 0, logits.shape[-1] - 1)
        return _keep(logits, logits >= jax.lax.dynamic_slice_in_dim(ascending, last, 1, axis=-1))

    return stateless(apply)


def top_p(p: float | Array) -> Transform:
    """Keeps the smallest set of most likely tokens whose probability is at least `p`.

    Reference: The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
    """
    check_known(lambda p: ~np.isnan(p), "a number", p=p)

    def apply(logits: Array) -> Array:
        descending = -jnp.sort(-logits, axis=-1)
        last = _length_of_prefix(jax.nn.softmax(descending, axis=-1), p) - 1
        return _keep(logits, logits >= jnp.take_along_axis(descending, last, axis=-1))

    return stateless(apply)


def min_p(ratio: float | Array) -> Transform:
    """Keeps the tokens that are at least `ratio` times as likely as the most likely one.

    Reference: Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs, arXiv:2407.01082.
    """
    check_known(lambda ratio: ratio >= 0, "at least 0", ratio=ratio)
    return stateless(
        lambda logits: _keep(logits, logits >= logits.max(-1, keepdims=True) + jnp.log(jnp.minimum(ratio, 1)))
    )


def typical_p(mass: float | Array) -> Transform:
    """Keeps the smallest set of most typical tokens whose probability is at least `mass`.

    The typical ones are those whose surprise `-log p_v` is closest to its mean, the entropy.

    Reference: Locally Typical Sampling, arXiv:2202.00666.
    """
    check_known(lambda mass: ~np.isnan(mass), "a number", mass=mass)

    def apply(logits: Array) -> Array:
        logp = jax.nn.log_softmax(logits, axis=-1)
        distance = jnp.abs(logp + token_entropy(logits)[..., None])
        nearest, by_distance = jax.lax.sort((distance, jnp.exp(logp)), num_keys=1)
        last = _length_of_prefix(by_distance, mass) - 1
        return _keep(logits, distance <= jnp.take_along_axis(nearest, last, axis=-1))

    return stateless(apply)


def _length_of_prefix(p: Array, mass: float | Array) -> Array:
    """How many of the probabilities `p[B, V]`, taken in order, it takes to reach a mass; `[B, 1]`, at least 1."""
    before = jnp.cumsum(p, axis=-1) - p
    # A sum of 1, up to rounding, may be reached before the rarest tokens: all of it still means all of them.
    return jnp.maximum(((before < mass) | (jnp.asarray(mass) >= 1)).sum(-1, keepdims=True), 1)


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


def repetition_penalty(theta: float | Array) -> Transform:
    """Makes tokens of the prompt and of the text so far less likely: `logit / theta` if positive, else `logit theta`.

    It depends on where the logits have their zero, as it does everywhere.

    Reference: CTRL: A Conditional Transformer Language Model for Controllable Generation, arXiv:1909.05858.
    """
    check_known(lambda theta: theta > 0, "above 0", theta=theta)

    def init(prompt: Array, mask: Array, vocabulary: int) -> Array:
        return _mark(jnp.zeros((prompt.shape[0], vocabulary), bool), jnp.where(mask != 0, prompt, vocabulary))

    def apply(logits: Array, seen: Array) -> Array:
        check_floating(logits=logits)
        logits = at_least_float32(logits)
        return jnp.where(seen, jnp.where(logits > 0, logits / theta, logits * theta), logits)

    return Transform(init, apply, lambda seen, token: _mark(seen, token[:, None]))


def _mark(seen: Array, tokens: Array) -> Array:
    return seen.at[jnp.arange(seen.shape[0])[:, None], tokens].set(True, mode="drop")


def logit_bias(bias: Array) -> Transform:
    """Adds `bias[V]`, or `bias[B, V]` with a row for each prompt, to the logits.

    Raises:
      ValueError: another rank.
    """
    return _per_token(bias, "bias", lambda logits, bias: logits + bias)


def token_mask(allowed: Array) -> Transform:
    """Forbids the tokens where `allowed[V]`, or `allowed[B, V]` with a row for each prompt, is 0.

    Raises:
      ValueError: another rank, or a row that forbids all.
    """
    check_known(lambda allowed: (allowed != 0).any(-1), "1 for some token of every row", allowed=allowed)
    return _per_token(allowed, "allowed", lambda logits, allowed: _keep(logits, allowed != 0))


def _per_token(values: Array, name: str, combine: Callable[[Array, Array], Array]) -> Transform:
    values = jnp.asarray(values)
    if values.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [V] or [B, V], got {values.shape}")

    def apply(logits: Array, values: Array) -> Array:
        check_floating(logits=logits)
        if values.shape not in (logits.shape, logits.shape[-1:]):
            raise ValueError(f"{name} must have the shape of logits, {logits.shape}, or [V], got {values.shape}")
        return combine(at_least_float32(logits), values)

    if values.ndim == 1:
        return stateless(lambda logits: apply(logits, values))
    # A carry, so that it follows its row when prompts are repeated.
    return Transform(lambda prompt, mask, vocabulary: values, apply, lambda carry, token: carry)

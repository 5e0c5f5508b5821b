r"""Log-probabilities of the tokens that were taken, and their sums over sequences."""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    at_least_int32,
    check_floating,
    check_same_shape,
    check_targets,
    expand_like,
)

__all__ = ["sequence_logp", "shared_prefix_sequence_logp", "token_entropy", "token_logps"]


def token_logps(logits: Array, targets: Array) -> Array:
    """Log-probability of each target, `logits[target] - logsumexp(logits)`, without a log-softmax of the whole array.

    Args:
      logits: `[B, T, V]` (or any leading axes); those at position `t` are for `targets[:, t]`, the token that follows.
      targets: integers, `[B, T]`; outside the vocabulary the result is NaN.

    Returns:
      `[B, T]` in nats, float32 at least.

    Raises:
      ValueError: shapes that do not fit, logits that are not floating, targets that are not integers.
    """
    check_floating(logits=logits)
    check_targets(targets, logits=logits)
    targets = at_least_int32(targets)
    targets = jnp.where(targets < 0, logits.shape[-1], targets)  # a negative index would count from the end
    taken = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return at_least_float32(taken) - jax.nn.logsumexp(at_least_float32(logits), axis=-1)


def token_entropy(logits: Array) -> Array:
    """Entropy `-sum_v p_v log p_v` of each next-token law, `[..., V] -> [...]`; forbidden tokens have the logit `-inf`.

    Raises:
      ValueError: logits that are not floating.
    """
    check_floating(logits=logits)
    logits = at_least_float32(logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    possible = probabilities > 0
    mean_logit = jnp.sum(jnp.where(possible, probabilities * jnp.where(possible, logits, 0), 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - mean_logit


def sequence_logp(logp: Array, mask: Array, *, normalize: bool = False) -> Array:
    """Log-probability of each sequence: the sum of its tokens', or their mean with `normalize`.

    Args:
      logp: of each token, `[B, T]`.
      mask: `[B, T]`, 0 where a token does not count (prompt, padding).
      normalize: divide by the number of tokens; a row without any stays 0.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating.
    """
    check_floating(logp=logp)
    check_same_shape(logp=logp, mask=mask)
    valid = mask != 0
    total = jnp.sum(jnp.where(valid, at_least_float32(logp), 0), axis=-1)
    return total / jnp.maximum(valid.sum(-1), 1) if normalize else total


def shared_prefix_sequence_logp(logp: Array, mask: Array, shared_length: Array, alpha: float | Array) -> Array:
    """Log-probability of each sequence with its tokens beyond a length weighted by `alpha`.

        sum_{n <= shared_length} logp_n + alpha sum_{n > shared_length} logp_n

    where `n = 1, 2, ...` counts the unmasked tokens. LD-DPO takes the shorter length of a pair for both.

    Args:
      logp: of each token, `[B, T]`.
      mask: `[B, T]`, 0 where a token does not count.
      shared_length: `[B]`.
      alpha: 1 is `sequence_logp`, 0 cuts every sequence to the shared length, whatever lies beyond; a scalar or `[B]`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, log-probabilities that are not floating.

    Reference: Length Desensitization in Direct Preference Optimization, arXiv:2409.06411.
    """
    check_floating(logp=logp)
    check_same_shape(logp=logp, mask=mask)
    if shared_length.shape != logp.shape[:-1]:
        raise ValueError(f"shared_length must have shape {logp.shape[:-1]}, got {shared_length.shape}")
    alpha = expand_like(alpha, logp)
    shared = jnp.cumsum(mask != 0, axis=-1) <= shared_length[..., None]
    cut = ~shared & (alpha == 0) & ~jnp.isfinite(logp)  # finite ones stay, for the derivative in alpha
    kept = jnp.where((mask != 0) & ~cut, at_least_float32(logp), 0)
    return jnp.sum(jnp.where(shared, 1, alpha) * kept, axis=-1)

r"""Segments of sequences: reasoning steps, turns, packed documents.

`segments[B, T]` holds the number of the segment that each token belongs to, counted from 0, and -1 outside of all.
Results per segment are `[B, n]` with a static `n`; segments from `n` on are left out.
"""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, at_least_int32, check_floating, check_same_shape

__all__ = ["segment_broadcast", "segment_ends", "segment_mean", "segment_positions", "segment_scatter", "segment_sum"]


def segment_sum(values: Array, segments: Array, n: int) -> Array:
    """Sum of the values of each segment, `[B, T] -> [B, n]`; 0 for an empty one.

    Raises:
      ValueError: shapes that differ or are not `[B, T]`, values that are not floating, segments that are not integers.
    """
    check_floating(values=values)
    check_same_shape(values=values, segments=segments)
    segments = _checked(segments)
    kept = jnp.where(segments < 0, 0, at_least_float32(values))
    return _scatter_add(kept, segments, n)


def segment_mean(values: Array, segments: Array, n: int) -> Array:
    """Mean of the values of each segment, `[B, T] -> [B, n]`; 0 for an empty one. Errors as in `segment_sum`."""
    sums = segment_sum(values, segments, n)
    return sums / jnp.maximum(_scatter_add(jnp.ones_like(values, sums.dtype), _checked(segments), n), 1)


def segment_ends(segments: Array) -> Array:
    """Where a segment has its last token, `[B, T] -> [B, T]`, booleans.

    That is one token, also of a segment that others interrupt.

    Raises:
      ValueError: segments that are not integers `[B, T]`.
    """
    segments = _checked(segments)
    order = jnp.argsort(segments, axis=1, stable=True)  # brings each segment together, its tokens in their order
    by_segment = jnp.take_along_axis(segments, order, axis=1)
    last = jnp.diff(by_segment, axis=1, append=by_segment[:, -1:] + 1) != 0
    return (segments >= 0) & jnp.take_along_axis(last, jnp.argsort(order, axis=1), axis=1)


def segment_positions(segments: Array) -> Array:
    """Position of each token in its segment, from 0; `[B, T] -> [B, T]`. Outside of all, positions go on counting.

    A segment that others interrupt is counted from 0 again after them.

    >>> import jax.numpy as jnp
    >>> segment_positions(jnp.array([[-1, 0, 0, 1, 1, 1]]))
    Array([[0, 0, 1, 0, 1, 2]], dtype=int32)

    Raises:
      ValueError: segments that are not integers `[B, T]`.
    """
    segments = _checked(segments)
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)


def segment_broadcast(steps: Array, segments: Array) -> Array:
    """Gives every token the value of its segment, `[B, n] -> [B, T]`; 0 outside and from segment `n` on.

    Raises:
      ValueError: `steps` is not `[B, n]`, or not floating; segments that are not integers `[B, T]`.
    """
    check_floating(steps=steps)
    segments = _checked(segments)
    if steps.ndim != 2 or steps.shape[0] != segments.shape[0]:
        raise ValueError(f"steps must be [B, n] for segments [B, T] = {segments.shape}, got {steps.shape}")
    inside = (segments >= 0) & (segments < steps.shape[1])
    return jnp.where(inside, jnp.take_along_axis(steps, jnp.where(inside, segments, 0), axis=1), 0)


def segment_scatter(steps: Array, segments: Array) -> Array:
    """Gives the last token of each segment its value and all others 0, `[B, n] -> [B, T]`: rewards of steps.

    Raises:
      ValueError: `steps` is not `[B, n]`, or not floating; segments that are not integers `[B, T]`.
    """
    return jnp.where(segment_ends(segments), segment_broadcast(steps, segments), 0)


def _checked(segments: Array) -> Array:
    """In a type that also holds their number, which stands for "left out"."""
    if segments.ndim != 2 or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(f"segments must be integers [B, T], got {segments.dtype}{list(segments.shape)}")
    return at_least_int32(segments)


def _scatter_add(values: Array, segments: Array, n: int) -> Array:
    where = jnp.where(segments < 0, n, segments)  # a negative index would count from the end
    rows = jnp.arange(segments.shape[0])[:, None]
    return jnp.zeros((segments.shape[0], n), values.dtype).at[rows, where].add(values, mode="drop")

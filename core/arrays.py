"""Small helpers on arrays with a batch axis in front."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

__all__ = ["Reduce", "expand_like", "reduce_events", "squared_norm"]

Reduce = Literal["mean", "sum"]


def expand_like(values: Array, x: Array) -> Array:
    """Appends unit axes to `values` (scalar or `[B]`) so that it broadcasts against `x[B, ...]`."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) if values.ndim else values


def reduce_events(x: Array, reduce: Reduce) -> Array:
    """Mean or sum over all axes but the first, in float32 at least: `[B, ...] -> [B]`.

    Raises:
      ValueError: `reduce` is neither "mean" nor "sum".
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'reduce must be "mean" or "sum", got {reduce!r}')
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    axes = tuple(range(1, x.ndim))
    return x.mean(axes, dtype=dtype) if reduce == "mean" else x.sum(axes, dtype=dtype)


def squared_norm(x: Array, reduce: Reduce = "sum") -> Array:
    """Squared Euclidean norm of each example, `[B, ...] -> [B]`; with `reduce="mean"` divided by the dimension."""
    return reduce_events(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), reduce)

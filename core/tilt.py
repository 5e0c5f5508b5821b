"""Exponential means: what a value is worth under the tilt `p(x) exp(v(x) / beta)`."""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating
from esscher.core.exact.tabular_lm import log_potential, log_sum_exp

__all__ = ["log_mean_exp", "soft_value"]


def log_mean_exp(values: Array, axis: int = -1, where: Array | None = None) -> Array:
    """`log mean exp(v)` over an axis: `soft_value` at `beta = 1`, as are arguments and result."""
    return soft_value(values, 1.0, axis, where)


def soft_value(values: Array, beta: float | Array, axis: int = -1, where: Array | None = None) -> Array:
    r"""`beta log mean exp(v / beta)` over an axis: between the mean, for large `beta`, and the maximum, for small.

    Neither limit loses digits: with `m = max v` it is `m + beta log1p(mean expm1((v - m) / beta))`, or the logarithm
    itself where the mean is below one half. Values of `-inf` count as `exp(-inf) = 0` and get no gradient; of nothing
    but such values, and of no values at all, the result is `-inf`. NaN stays NaN, unless it is left out.

    Args:
      values: `[..., N, ...]`, floating, below `+inf`.
      beta: temperature, positive; `inf` gives the mean. A scalar, or of a shape that broadcasts with the result.
      axis: of the mean.
      where: which values count, of a shape that broadcasts with `values`; all by default.

    Returns:
      `[..., ...]`, in float32 at least, in the unit of the values. In `v` the gradient is their share, a softmax.

    Raises:
      ValueError: values that are not floating.
    """
    check_floating(values=values)
    where = True if where is None else jnp.asarray(where) != 0
    counted = jnp.moveaxis(jnp.broadcast_to(where, values.shape), axis, -1)
    values = jnp.moveaxis(at_least_float32(values), axis, -1)
    values = jnp.where(counted, values, -jnp.inf)
    count = jnp.maximum(counted.sum(-1), 1).astype(values.dtype)
    # At `beta = inf` the tilt does nothing, and `inf log(1)` would be NaN.
    flat = jnp.isinf(beta)
    beta = jnp.where(flat, 1.0, beta)
    top = jax.lax.stop_gradient(jnp.max(values, -1, initial=-jnp.inf))
    alive = top != -jnp.inf
    top = jnp.where(alive, top, 0.0)
    gaps = log_potential(values - top[..., None], jnp.asarray(beta)[..., None])
    excess = jnp.sum(jnp.where(counted, jnp.expm1(gaps), 0.0), -1) / count
    close = excess > -0.5
    near = jnp.log1p(jnp.where(close, excess, 0.0))
    logs = jnp.where(close, near, log_sum_exp(gaps) - jnp.log(count))
    soft = top + beta * jnp.where(alive, logs, 0.0)
    mean = jnp.sum(jnp.where(counted, values, 0.0), -1) / count
    return jnp.where(alive, jnp.where(flat, mean, soft), -jnp.inf)

r"""Resampling: which particles have offspring, and how many, so that each has `n W_i` of them on average.

The four schemes have one signature, `(key, log_w[N], n=None) -> ancestors[n]`, and ascending ancestors. Their numbers
of offspring vary ever less: multinomial, residual, stratified, systematic. `W = softmax(log_w)`; a weight of `-inf` or
NaN has no offspring. Where no weight is above 0 there is nothing to choose by: a ValueError, and under `jit`, where
that cannot be seen, all count alike. Ancestors are integers, through which no gradient passes.

Nothing is searched: how many of the points lie below each partial sum of the weights is computed, and what has been
counted is laid out again. So a million particles cost a few passes over them. Partial sums are kept as whole part and
fraction, since those of a million numbers in float32 would be off by a sixteenth of an offspring.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, is_known

__all__ = ["Resampler", "multinomial", "residual", "stratified", "systematic"]

LANES = 256  # parts that a vector is scanned in on CPU

Resampler = Callable[..., Array]
"""`(key, log_w[N], n=None) -> ancestors[n]`, ascending integers; as many as there are particles if `n` is absent."""


def systematic(key: Array, log_w: Array, n: int | None = None) -> Array:
    """Offspring at the points `(j + u) / n` with one uniform `u`: between `floor(n W_i)` and one more of each.

    With equal weights and `n = N` it is the identity.

    Args:
      key: typed random key.
      log_w: `[N]`, up to a constant.
      n: how many are wanted, `N` by default.

    Returns:
      Ancestors, `[n]`, ascending.

    Raises:
      ValueError: `log_w` is not a vector of at least one floating number, or known to have no weight above 0; `n` is
        less than 1.

    Reference: Comparison of Resampling Schemes for Particle Filtering, arXiv:cs/0507025.
    """
    shares = _shares(log_w, n)
    whole, fraction = _partial_sums(shares)
    return _lay_out(whole + (jax.random.uniform(key, (), fraction.dtype) < fraction), shares, n)


def stratified(key: Array, log_w: Array, n: int | None = None) -> Array:
    """Offspring at the points `(j + u_j) / n`, a uniform for each.

    With equal weights and `n = N` it is the identity.

    Arguments, result and errors are as in `systematic`.

    Reference: Comparison of Resampling Schemes for Particle Filtering, arXiv:cs/0507025.
    """
    shares = _shares(log_w, n)
    whole, fraction = _partial_sums(shares)
    points = jax.random.uniform(key, (n or len(log_w),), fraction.dtype)
    return _lay_out(whole + (points[jnp.minimum(whole, len(points) - 1)] < fraction), shares, n)


def multinomial(key: Array, log_w: Array, n: int | None = None) -> Array:
    """Independent ancestors, sorted; the scheme with which the ancestor of one particle says nothing of another's.

    Arguments, result and errors are as in `systematic`.

    Reference: Comparison of Resampling Schemes for Particle Filtering, arXiv:cs/0507025.
    """
    shares = _shares(log_w, n)
    n = n or len(log_w)
    return _lay_out(_points_below(key, shares, n, n), shares, n)


def residual(key: Array, log_w: Array, n: int | None = None) -> Array:
    """`floor(n W_i)` offspring for certain, the others multinomial by the remainders.

    With equal weights and `n = N` it is the identity.

    Arguments, result and errors are as in `systematic`.

    Reference: Comparison of Resampling Schemes for Particle Filtering, arXiv:cs/0507025.
    """
    shares = _shares(log_w, n)
    n = n or len(log_w)
    certain = jnp.floor(shares).astype(jnp.int32)
    left = jnp.maximum(n - certain.sum(), 0)
    return _lay_out(jnp.cumsum(certain) + _points_below(key, shares - certain, n, left), shares, n)


def _shares(log_w: Array, n: int | None) -> Array:
    """Expected offspring, `n W_i`, `[N]`."""
    check_floating(log_w=log_w)
    if log_w.ndim != 1 or not log_w.size:
        raise ValueError(f"log_w must have shape [N] with N at least 1, got {log_w.shape}")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    log_w = at_least_float32(jax.lax.stop_gradient(log_w))
    log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
    top = log_w.max()
    if is_known(top) and top == -jnp.inf:
        raise ValueError("log_w has no weight above 0, so there is nothing to choose by")
    w = jnp.exp(jnp.where(log_w == top, 0, log_w - top))  # the largest are 1, infinite ones too
    return w * ((n or len(log_w)) / w.sum())


def _running(combine: Callable[[Any, Any], Any], x: Any) -> Any:
    """`associative_scan` of vectors `[N]`, with 0 for its identity.

    On CPU it passes over memory some twenty times. There parts of the vectors lie side by side instead and are scanned
    in step, then shifted by what came before them.
    """

    def side_by_side(x: Any) -> Any:
        size = len(jax.tree.leaves(x)[0])
        rows = jax.tree.map(lambda leaf: jnp.pad(leaf, (0, -size % LANES)).reshape(LANES, -1).T, x)
        first, later = (jax.tree.map(lambda leaf, part=part: leaf[part], rows) for part in (0, slice(1, None)))
        step = lambda carry, row: (combine(carry, row),) * 2  # noqa: E731
        totals, inside = jax.lax.scan(step, first, later)
        inside = jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), first, inside)
        before = jax.lax.associative_scan(combine, totals)
        before = jax.tree.map(lambda leaf: jnp.pad(leaf[:-1], (1, 0)), before)
        return jax.tree.map(lambda leaf: leaf.T.reshape(-1)[:size], combine(before, inside))

    whole = functools.partial(jax.lax.associative_scan, combine)
    return jax.lax.platform_dependent(x, cpu=side_by_side, default=whole)


@jax.jit  # op by op it is slow
def _partial_sums(shares: Array) -> tuple[Array, Array]:
    """Whole part and fraction of `cumsum(shares)`, each `[N]`."""

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        fraction = a[1] + b[1]
        carried = jnp.floor(fraction)
        return a[0] + b[0] + carried.astype(jnp.int32), fraction - carried

    whole = jnp.floor(shares)
    return _running(add, (whole.astype(jnp.int32), shares - whole))


def _points_below(key: Array, shares: Array, n: int, count: int | Array) -> Array:
    """How many of `count <= n` points, uniform on `[0, count)`, lie below each partial sum, `[N]`.

    A point has a whole part and a fraction too, as a uniform in float32 has but 2^24 values; one sort merges points and
    partial sums.
    """
    whole, fraction = _partial_sums(shares)
    whole_key, fraction_key = jax.random.split(key)
    points = jax.random.randint(whole_key, (n,), 0, jnp.maximum(count, 1))
    points = jnp.where(jnp.arange(n) < count, points, n + 1)
    places = jnp.concatenate([jnp.full(n, -1), jnp.arange(len(shares))])
    wholes = jnp.concatenate([points, whole])
    fractions = jnp.concatenate([jax.random.uniform(fraction_key, (n,), fraction.dtype), fraction])
    *_, places = jax.lax.sort((wholes, fractions, places), num_keys=2)
    below = jnp.cumsum(places < 0)
    return jnp.zeros(len(shares), below.dtype).at[places].set(below, mode="drop", wrap_negative_indices=False)


def _lay_out(ends: Array, shares: Array, n: int | None) -> Array:
    """Ancestors from how many offspring a particle and all before it have.

    Rounding may put the ends of neighbours out of order, and the last one beside `n`: then the one before, or the last
    that has a weight, makes up for it, never one without a weight.
    """
    n = n or len(shares)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    first = jnp.where((ends > starts) & (shares > 0), starts, n)
    marks = jnp.zeros(n, jnp.int32).at[first].max(jnp.arange(len(shares), dtype=jnp.int32), mode="drop")
    return _running(jnp.maximum, marks)

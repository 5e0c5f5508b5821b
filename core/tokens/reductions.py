r"""Statistics of the entries that a mask keeps, and the one reduction of token losses to a number.

A mask is an array of the values' shape, 0 where an entry does not count. What stands there, NaN included, has no
influence and gets no gradient. Everything is in float32 at least.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_known, check_same_shape

__all__ = ["How", "aggregate", "masked_mean", "masked_quantile", "masked_rank", "masked_var", "masked_whiten"]

Axes = int | tuple[int, ...] | None

How = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "group-mean-token-mean", "constant"]


def masked_mean(values: Array, mask: Array, axis: Axes = None) -> Array:
    """Mean of the entries kept, over `axis` (all axes if absent); 0 where none is kept.

    Raises:
      ValueError: shapes that differ, values that are not floating.
    """
    kept, valid = _keep(values, mask)
    return kept.sum(axis) / jnp.maximum(valid.sum(axis), 1)


def masked_var(values: Array, mask: Array, axis: Axes = None, *, ddof: int = 0) -> Array:
    """Variance of the entries kept, `sum (x - mean)^2 / (n - ddof)`; 0 where `n <= ddof`.

    Raises:
      ValueError: shapes that differ, values that are not floating.
    """
    kept, valid = _keep(values, mask)
    count = valid.sum(axis, keepdims=True)
    centred = jnp.where(valid, kept - kept.sum(axis, keepdims=True) / jnp.maximum(count, 1), 0)
    count = jnp.squeeze(count, axis)
    return jnp.where(count > ddof, jnp.square(centred).sum(axis) / jnp.maximum(count - ddof, 1), 0)


def masked_whiten(
    values: Array, mask: Array, axis: Axes = None, *, shift_mean: bool = True, ddof: int = 1, eps: float | Array = 1e-8
) -> Array:
    """`(x - mean) / sqrt(var + eps)` for the entries kept, and 0 for the others.

    Args:
      values: any shape.
      mask: of the same shape.
      axis: what to take mean and variance over; all axes if absent.
      shift_mean: if false, the mean is put back: the entries are scaled about it.
      ddof: of the variance, as in `masked_var`.
      eps: added to the variance.

    Returns:
      An array of the shape of `values`.

    Raises:
      ValueError: shapes that differ, values that are not floating.
    """
    kept, valid = _keep(values, mask)
    mean, variance = masked_mean(values, mask, axis), masked_var(values, mask, axis, ddof=ddof)
    if axis is not None:
        mean, variance = jnp.expand_dims(mean, axis), jnp.expand_dims(variance, axis)
    whitened = (kept - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(valid, whitened if shift_mean else whitened + mean, 0)


def masked_quantile(values: Array, mask: Array, q: float | Array) -> Array:
    """The `q`-quantile of the entries kept along the last axis, `[..., N] -> [...]`; 0 where none is kept.

    Between two order statistics it is interpolated linearly, like NumPy's default. `q` is a scalar, may be traced;
    outside of `[0, 1]` the result is NaN.

    Raises:
      ValueError: shapes that differ, values that are not floating, a `q` that is not a scalar.
    """
    kept, valid = _keep(values, mask)
    if jnp.ndim(q):
        raise ValueError(f"q must be a scalar, got shape {jnp.shape(q)}")
    q = jnp.where((q >= 0) & (q <= 1), q, jnp.nan)
    count = valid.sum(-1, keepdims=True)
    position = q * jnp.maximum(count - 1, 0)
    below = jnp.floor(position)
    ordered = jnp.sort(jnp.where(valid, kept, jnp.inf), axis=-1)
    ordered = jnp.where(jnp.arange(values.shape[-1]) < count, ordered, 0)
    ends = jnp.concatenate([below, jnp.minimum(below + 1, jnp.maximum(count - 1, 0))], -1).astype(jnp.int32)
    low, high = jnp.moveaxis(jnp.take_along_axis(ordered, ends, -1), -1, 0)
    return low + (position - below)[..., 0] * (high - low)


def masked_rank(values: Array, mask: Array) -> Array:
    """How many of the entries kept in the same row are larger: 0 for the largest; `[..., N] -> [..., N]`, integers.

    Of equal entries the first ranks first. Entries that do not count rank after all others, so
    `masked_rank(x, mask) < k` is a mask of the `k` largest, with a `k` that may be traced.

    >>> import jax.numpy as jnp
    >>> masked_rank(jnp.array([0.3, 9.0, 0.5, 0.1]), jnp.array([1, 0, 1, 1])) < 2
    Array([ True, False,  True, False], dtype=bool)

    Raises:
      ValueError: shapes that differ, values that are not floating.
    """
    kept, valid = _keep(values, mask)
    order = jnp.lexsort((-kept, ~valid), axis=-1)
    return jnp.argsort(order, axis=-1)


def aggregate(
    values: Array, mask: Array, how: How, *, length: float | Array | None = None, group_size: int | None = None
) -> tuple[Array, Array]:
    r"""Sums token losses up to a numerator and a denominator, to be divided once, when all parts have been added.

        how                      numerator                                denominator
        token-mean               sum_bt m x                               sum_bt m
        seq-mean-token-mean      sum_b (sum_t m x) / (sum_t m)            sequences with a token
        seq-mean-token-sum       sum_bt m x                               sequences with a token
        group-mean-token-mean    sum_p (sum_gt m x) / (sum_gt m)          groups with a token
        constant                 sum_bt m x                               B length

    The denominator depends on the mask alone. Add numerators (or their gradients) and denominators over micro-batches
    and devices and divide the sums: the result is then the same however the batch was split. The first three are modes
    of verl and Tunix, which calls the second "sequence-mean-token-mean"; the fourth is in neither, nor in TRL, which
    has the first as "dapo" and the numerators of the next two as "grpo" and "luspo", over all `B` rows: divide by `B`
    instead of the denominator. "constant" with the longest completion as `length` is Dr. GRPO (TRL: "dr_grpo"); verl's
    "seq-mean-token-sum-norm" is `B` times that, and Tunix's "sequence-mean-token-scale" is the third with values
    divided by the length.

    Args:
      values: of each token, `[B, T]`.
      mask: `[B, T]`.
      how: see above.
      length: of "constant", above 0.
      group_size: of "group-mean-token-mean": that many consecutive rows are a group.

    Returns:
      Numerator and denominator, `[]` each.

    Raises:
      ValueError: shapes that differ or are not `[B, T]`, an unknown `how`, its argument missing or not its own, a
        `group_size` below 1 or that does not divide `B`, a known `length` of 0 or below.

    Reference: DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476.
    """
    kept, valid = _keep(values, mask)
    if values.ndim != 2:
        raise ValueError(f"values must have shape [B, T], got {values.shape}")
    if how not in get_args(How):
        raise ValueError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
    if (length is None) == (how == "constant"):
        raise ValueError(f'length must be given for how="constant" and nothing else, got length={length}, how={how!r}')
    if (group_size is None) == (how == "group-mean-token-mean"):
        raise ValueError(
            'group_size must be given for how="group-mean-token-mean" and nothing else, '
            f"got group_size={group_size}, how={how!r}"
        )
    if length is not None:
        check_known(lambda length: length > 0, "above 0", length=length)
    if group_size is not None:
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if values.shape[0] % group_size:
            raise ValueError(f"values must have a multiple of group_size={group_size} rows, got {values.shape[0]}")
        kept, valid = (x.reshape(-1, group_size * x.shape[1]) for x in (kept, valid))
    sums, counts = kept.sum(-1), valid.sum(-1)
    rows = (counts > 0).sum().astype(kept.dtype)
    match how:
        case "token-mean":
            return sums.sum(), counts.sum().astype(kept.dtype)
        case "seq-mean-token-mean" | "group-mean-token-mean":
            return (sums / jnp.maximum(counts, 1)).sum(), rows
        case "seq-mean-token-sum":
            return sums.sum(), rows
    return sums.sum(), jnp.asarray(values.shape[0] * length, kept.dtype)


def _keep(values: Array, mask: Array) -> tuple[Array, Array]:
    """The values in float32 at least, 0 where they do not count; and where they do."""
    check_floating(values=values)
    check_same_shape(values=values, mask=mask)
    valid = mask != 0
    return jnp.where(valid, at_least_float32(values), 0), valid

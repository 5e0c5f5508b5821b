r"""Per-token statistics of `softmax(hidden @ unembedding)` that never make the logits `[B, T, V]`.

The vocabulary is walked in chunks, forward and backward: sums of exponentials are kept relative to a running maximum,
and the backward pass computes each chunk of logits again, so that one matrix product of four is done twice. All sums
are in float32 at least.

A chunk takes an equal part of each of up to 16 blocks of the vocabulary, so that an unembedding that is split over
devices by vocabulary (up to 16 of them, a power of two) stays where it is: each device does its own part of each chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import at_least_int32, check_floating, check_targets

__all__ = ["TokenStatistics", "linear_token_kl", "linear_token_logps", "linear_token_statistics"]


class TokenStatistics(NamedTuple):
    """What losses ask of a next-token law `p`, each `[B, T]`, in nats."""

    logp: Array  # log p(target)
    entropy: Array  # -sum_v p_v log p_v
    log_collision: Array  # log sum_v p_v^2


def linear_token_logps(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    chunk: int = 2048,
    temperature: float | Array = 1.0,
    softcap: float | Array | None = None,
) -> Array:
    r"""Log-probability of each target, `z[target] - logsumexp(z)` with `z = cap(hidden @ unembedding) / temperature`.

    Equal to `token_logps(hidden @ unembedding, targets)` in value and gradient, in the memory of one chunk of logits.
    The gradient reaches `hidden` and `unembedding`; temperature and soft cap are constants. Gradients can be
    differentiated again, but in reverse mode alone: `jax.jvp`, and so `jax.hessian`, raise JAX's TypeError.

    Args:
      hidden: `[B, T, D]` (or any leading axes), the last hidden states after the final norm.
      unembedding: `[D, V]`.
      targets: integers, `[B, T]`; outside the vocabulary the result is NaN.
      chunk: vocabulary entries at a time.
      temperature: divides the logits, a scalar.
      softcap: if given, logits become `softcap tanh(logits / softcap)` before the temperature; a scalar.

    Returns:
      `[B, T]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, hidden states that are not floating, targets that are not integers, a
        temperature or soft cap that is not a scalar.

    Reference: The Two-Pass Softmax Algorithm, arXiv:2001.04438.
    """
    check_targets(targets, hidden=hidden)
    sums = _statistics(_LOGP, ((hidden, unembedding),), targets, chunk, temperature, softcap=softcap)
    return _fill_invalid(sums.target - jnp.log(sums.mass), targets, unembedding)


def linear_token_statistics(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    *,
    chunk: int = 2048,
    temperature: float | Array = 1.0,
    softcap: float | Array | None = None,
) -> TokenStatistics:
    """Log-probability of the target, entropy, and log-sum of squared probabilities of each next-token law, in one pass.

    Arguments, gradients and errors are those of `linear_token_logps`.

    Reference: WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.
    """
    check_targets(targets, hidden=hidden)
    sums = _statistics(_ALL, ((hidden, unembedding),), targets, chunk, temperature, softcap=softcap)
    log_mass = jnp.log(sums.mass)
    return TokenStatistics(
        logp=_fill_invalid(sums.target - log_mass, targets, unembedding),
        entropy=log_mass - sums.centred / sums.mass,
        log_collision=jnp.log(sums.square) - 2 * log_mass,
    )


def linear_token_kl(
    hidden: Array,
    unembedding: Array,
    other_hidden: Array,
    other_unembedding: Array,
    *,
    chunk: int = 2048,
    temperature: float | Array = 1.0,
    softcap: float | Array | None = None,
    other_softcap: float | Array | Literal["same"] | None = "same",
) -> Array:
    """Divergence `KL(p || q)` of the next-token laws of two models over one vocabulary, at each position.

    The gradient reaches all four arrays, in reverse mode as in `linear_token_logps`; stop that of the teacher or the
    reference yourself.

    Args:
      hidden: of `p`, `[B, T, D]`.
      unembedding: of `p`, `[D, V]`.
      other_hidden: of `q`, `[B, T, D']`.
      other_unembedding: of `q`, `[D', V]`.
      chunk: vocabulary entries at a time.
      temperature: divides both models' logits, a scalar.
      softcap: of the logits of `p`, as in `linear_token_logps`.
      other_softcap: of those of `q`; "same" is the `softcap` of `p`, None is none.

    Returns:
      `[B, T]` in nats, float32 at least.

    Raises:
      ValueError: shapes that do not fit, hidden states that are not floating, a temperature or soft cap that is not a
        scalar.

    Reference: Token-level Direct Preference Optimization, arXiv:2404.11999.
    """
    if hidden.shape[:-1] != other_hidden.shape[:-1]:
        raise ValueError(
            f"hidden and other_hidden must agree before the last axis: {hidden.shape}, {other_hidden.shape}"
        )
    if unembedding.shape[-1] != other_unembedding.shape[-1]:
        raise ValueError(
            f"other_unembedding must have the vocabulary of unembedding, {unembedding.shape[-1]}, "
            f"got {other_unembedding.shape[-1]}"
        )
    pairs = ((hidden, unembedding), (other_hidden, other_unembedding))
    targets = jnp.zeros(hidden.shape[:-1], jnp.int32)
    if isinstance(other_softcap, str):
        if other_softcap != "same":
            raise ValueError(f'other_softcap must be a number, None or "same", got {other_softcap!r}')
        other_softcap = softcap
    sums = _statistics(_KL, pairs, targets, chunk, temperature, softcap=softcap, other_softcap=other_softcap)
    return sums.difference / sums.mass - jnp.log(sums.mass) + jnp.log(sums.other_mass)


def _fill_invalid(logp: Array, targets: Array, unembedding: Array) -> Array:
    targets = at_least_int32(targets)
    return jnp.where((targets >= 0) & (targets < unembedding.shape[-1]), logp, jnp.nan)


# --- sums over the vocabulary, relative to the maximum of the logits --------------------------------------------------
#
# Each set of sums says what one chunk of logits adds (`d = z - m`, one array per model, m the maximum so far), and what
# becomes of the sums when the maxima rise, by `shift = m_old - m_new <= 0`.


class _Reduction(NamedTuple):
    chunk: Callable  # (d of each model [N, C], hit [N, C]) -> sums
    rescale: Callable  # (sums, shift of each model [N]) -> sums


class _Logp(NamedTuple):
    mass: Array  # sum_v e^d
    target: Array  # d[target]
    hits: Array  # 1 once the target's chunk has passed


class _All(NamedTuple):
    mass: Array
    target: Array
    hits: Array
    centred: Array  # sum_v d e^d
    square: Array  # sum_v e^2d


class _Kl(NamedTuple):
    mass: Array
    other_mass: Array
    difference: Array  # sum_v (d - d') e^d


def _logp_chunk(d: tuple[Array], hit: Array) -> _Logp:
    return _Logp(jnp.exp(d[0]).sum(-1), jnp.where(hit, d[0], 0).sum(-1), hit.sum(-1, dtype=d[0].dtype))


def _logp_rescale(sums: _Logp, shift: tuple[Array]) -> _Logp:
    return _Logp(sums.mass * jnp.exp(shift[0]), sums.target + shift[0] * sums.hits, sums.hits)


def _all_chunk(d: tuple[Array], hit: Array) -> _All:
    weights = jnp.exp(d[0])
    centred = _times(weights, d[0]).sum(-1)
    return _All(*_logp_chunk(d, hit), centred, jnp.square(weights).sum(-1))


def _all_rescale(sums: _All, shift: tuple[Array]) -> _All:
    factor = jnp.exp(shift[0])
    centred = factor * (sums.centred + shift[0] * sums.mass)
    return _All(*_logp_rescale(_Logp(*sums[:3]), shift), centred, sums.square * jnp.square(factor))


def _kl_chunk(d: tuple[Array, Array], hit: Array) -> _Kl:
    weights = jnp.exp(d[0])
    return _Kl(weights.sum(-1), jnp.exp(d[1]).sum(-1), _times(weights, d[0] - d[1]).sum(-1))


def _kl_rescale(sums: _Kl, shift: tuple[Array, Array]) -> _Kl:
    factor = jnp.exp(shift[0])
    difference = factor * (sums.difference + (shift[0] - shift[1]) * sums.mass)
    return _Kl(sums.mass * factor, sums.other_mass * jnp.exp(shift[1]), difference)


def _times(weights: Array, values: Array) -> Array:
    """`weights values`, and 0 where the weight is 0 whatever the value (a forbidden token has the logit -inf)."""
    positive = weights > 0
    return jnp.where(positive, weights * jnp.where(positive, values, 0), 0)


_LOGP = _Reduction(_logp_chunk, _logp_rescale)
_ALL = _Reduction(_all_chunk, _all_rescale)
_KL = _Reduction(_kl_chunk, _kl_rescale)

_LOWEST = -1e30  # where running maxima start: finite, so that no difference of two of them is NaN


def _statistics(
    reduction: _Reduction,
    pairs: tuple[tuple[Array, Array], ...],
    targets: Array,
    chunk: int,
    temperature: float | Array,
    **softcaps: float | Array | None,
) -> Any:
    """The sums of a reduction for each `(hidden, unembedding)` with its soft cap, shaped like the targets."""
    for model, (hidden, unembedding) in zip(("", "other_"), pairs, strict=False):
        check_floating(**{f"{model}hidden": hidden, f"{model}unembedding": unembedding})
        if unembedding.ndim != 2 or hidden.shape[-1] != unembedding.shape[0]:
            raise ValueError(f"{model}unembedding must have shape [{hidden.shape[-1]}, V], got {unembedding.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    for name, value in {"temperature": temperature, **softcaps}.items():
        if value is not None and jnp.ndim(value):
            raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    flat = tuple((hidden.reshape(-1, hidden.shape[-1]), unembedding) for hidden, unembedding in pairs)
    # In the type of the logits: a wider one would widen what the scan carries.
    dtype = _precise(*jax.tree.leaves(flat))
    constants = jax.tree.map(lambda x: jnp.asarray(x, dtype), (temperature, tuple(softcaps.values())))
    sums, _ = _reduce(reduction, chunk, flat, targets.reshape(-1), *constants)
    return jax.tree.map(lambda x: x.reshape(targets.shape), sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce(reduction, chunk, pairs, targets, temperature, softcaps):
    def visit(carry, columns, ids):
        sums, maxima = carry
        raw = [_product(h, w) for (h, _), w in zip(pairs, columns, strict=True)]
        logits = _shape(raw, temperature, softcaps)
        risen = tuple(jnp.maximum(m, z.max(-1)) for m, z in zip(maxima, logits, strict=True))
        sums = reduction.rescale(sums, tuple(old - new for old, new in zip(maxima, risen, strict=True)))
        added = reduction.chunk(_below(logits, risen), ids == targets[:, None])
        return (jax.tree.map(jnp.add, sums, added), risen), ()

    dtype = _precise(*jax.tree.leaves(pairs))
    maxima = tuple(jnp.full(targets.shape, _LOWEST, dtype) for _ in pairs)
    nothing = tuple(jnp.zeros((targets.size, 0), dtype) for _ in pairs)
    sums = reduction.chunk(nothing, jnp.zeros((targets.size, 0), bool))
    return _fold(visit, (sums, maxima), tuple(w for _, w in pairs), chunk)[0]


def _reduce_forward(reduction, chunk, pairs, targets, temperature, softcaps):
    sums, maxima = _reduce(reduction, chunk, pairs, targets, temperature, softcaps)
    return (sums, maxima), (maxima, pairs, targets, temperature, softcaps)


def _reduce_backward(reduction, chunk, kept, cotangents):
    # The maxima are held fixed: what is made of the sums does not depend on them.
    maxima, pairs, targets, temperature, softcaps = kept

    def visit(gradients, columns, ids):
        raw = tuple(_product(h, w) for (h, _), w in zip(pairs, columns, strict=True))

        def sums_of(raw):
            return reduction.chunk(_below(_shape(raw, temperature, softcaps), maxima), ids == targets[:, None])

        (errors,) = jax.vjp(sums_of, raw)[1](cotangents[0])
        # In the precision of the operands, like the gradient of an ordinary product.
        errors = [error.astype(w.dtype) for error, w in zip(errors, columns, strict=True)]
        gradients = tuple(g + _product(e, w.T) for g, e, w in zip(gradients, errors, columns, strict=True))
        return gradients, [_product(h.T, e) for (h, _), e in zip(pairs, errors, strict=True)]

    unembeddings = tuple(w for _, w in pairs)
    hidden = tuple(jnp.zeros(h.shape, _precise(h)) for h, _ in pairs)
    hidden, slices = _fold(visit, hidden, unembeddings, chunk, unembeddings)
    gradients = tuple((g.astype(h.dtype), dw) for (h, _), g, dw in zip(pairs, hidden, slices, strict=True))
    return gradients, np.zeros(targets.shape, jax.dtypes.float0), *jax.tree.map(jnp.zeros_like, (temperature, softcaps))


_reduce.defvjp(_reduce_forward, _reduce_backward)


def _fold(visit, carry, unembeddings, chunk, like=()):
    """Takes a carry through the vocabulary: `visit(carry, columns, ids) -> (carry, slices)`, one chunk at a time.

    The slices, shaped like the columns, are written into arrays shaped like `like`, returned beside the carry.
    """
    vocabulary = unembeddings[0].shape[1]
    blocks = next(n for n in (16, 8, 4, 2, 1) if vocabulary % n == 0)
    width = vocabulary // blocks
    size = min(width, max(1, chunk // blocks))

    def part(state, start, size):
        carry, written = state
        columns = tuple(
            jax.lax.dynamic_slice_in_dim(w.reshape(-1, blocks, width), start, size, 2).reshape(-1, blocks * size)
            for w in unembeddings
        )
        ids = width * jnp.arange(blocks)[:, None] + start + jnp.arange(size)
        carry, slices = visit(carry, columns, ids.reshape(-1))
        slices = [new.astype(old.dtype).reshape(-1, blocks, size) for new, old in zip(slices, written, strict=True)]
        update = jax.lax.dynamic_update_slice_in_dim
        return carry, tuple(update(old, new, start, 2) for old, new in zip(written, slices, strict=True))

    state = carry, tuple(jnp.zeros((w.shape[0], blocks, width), w.dtype) for w in like)
    whole, rest = divmod(width, size)
    state, _ = jax.lax.scan(lambda state, i: (part(state, i * size, size), None), state, jnp.arange(whole))
    carry, written = part(state, whole * size, rest) if rest else state
    return carry, tuple(w.reshape(-1, vocabulary) for w in written)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=_precise(a, b))


def _precise(*arrays: Array) -> jnp.dtype:
    return functools.reduce(jnp.promote_types, (a.dtype for a in arrays), jnp.float32)


def _shape(raw: Sequence[Array], temperature: Array, softcaps: Sequence[Array | None]) -> list[Array]:
    capped = [z if cap is None else cap * jnp.tanh(z / cap) for z, cap in zip(raw, softcaps, strict=True)]
    return [z / temperature for z in capped]


def _below(logits: Sequence[Array], maxima: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(z - m[:, None] for z, m in zip(logits, maxima, strict=True))

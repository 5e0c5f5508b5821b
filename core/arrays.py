"""Small helpers on arrays with a batch axis in front."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

__all__ = [
    "Reduce",
    "at_least_float32",
    "at_least_int32",
    "cast_like",
    "check_floating",
    "check_groups",
    "check_known",
    "check_per_example",
    "check_same_shape",
    "check_targets",
    "expand_like",
    "is_known",
    "normal",
    "one_per_example",
    "per_example",
    "reduce_events",
    "safe_sqrt",
    "squared_norm",
    "tempered",
    "warn_of_nan",
]

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
    x, axes = at_least_float32(x), tuple(range(1, x.ndim))
    return x.mean(axes) if reduce == "mean" else x.sum(axes)


def squared_norm(x: Array, reduce: Reduce = "sum") -> Array:
    """Squared Euclidean norm of each example, `[B, ...] -> [B]`; with `reduce="mean"` divided by the dimension."""
    return reduce_events(jnp.square(at_least_float32(x)), reduce)


def at_least_float32(x: Array) -> Array:
    """The array in float32, or in its own type if that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def at_least_int32(ids: Array) -> Array:
    """Ids in a type that holds the size of any vocabulary: in 8 or 16 bits that size, or -1, may wrap to an id."""
    return ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)


def cast_like(tree: Any, like: Any) -> Any:
    """The leaves of a tree in the types of another's: what a step makes of a state, whatever was computed wider."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, like)


def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Standard normal numbers in `dtype`, but in float32 at least: a bfloat16 normal has 128 values and no tails."""
    return jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))


def safe_sqrt(x: Array) -> Array:
    """Square root of the positive part, with gradient 0 where that is 0."""
    outside = x <= 0  # and not `x > 0`, with which a NaN would become 0
    return jnp.where(outside, 0.0, jnp.sqrt(jnp.where(outside, 1.0, x)))


def tempered(logits: Array, tau: float | Array) -> Array:
    """`logits / tau`; at `tau = 0` its limit, up to a constant: 0 for the first of the largest, `-inf` for the others.

    Args:
      logits: `[..., V]`, floating.
      tau: at least 0, of a shape that broadcasts with the logits.
    """
    largest = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
    cold = jnp.asarray(tau) <= 0  # and not `tau > 0`, with which a NaN would become 0
    return jnp.where(cold, jnp.where(largest, 0, -jnp.inf), logits / jnp.where(cold, 1, tau))


# --- what can be seen of values only where they are known, outside of `jit` -------------------------------------------


def is_known(value: float | Array) -> bool:
    """Whether the numbers can be looked at: not while a program is traced, and not where another process has them."""
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)


def warn_of_nan(count: Array, what: str, stacklevel: int) -> None:
    """Warns that `count`, summed, `what`, such as "values were NaN; ...", if that is known and not 0.

    Args:
      count: integers or booleans, of any shape.
      what: the rest of the sentence.
      stacklevel: as if `warnings.warn` stood in the place of this call.
    """
    if is_known(count) and (total := np.asarray(count).sum()):
        warnings.warn(f"{total} {what}", stacklevel=stacklevel + 1)


def check_known(holds: Callable[[np.ndarray], np.ndarray], what: str, **values: float | Array) -> None:
    """Raises a ValueError, `beta must be above 0, got -1.0`, of known values for which it does not hold."""
    for name, value in values.items():
        if is_known(value) and not np.all(holds(np.asarray(value))):
            raise ValueError(f"{name} must be {what}, got {value}")


# --- checks, at trace time; the keyword is the argument's name in the message -----------------------------------------


def check_floating(**arrays: Array) -> None:
    """Raises a ValueError unless all arrays are of a floating type."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, got {array.dtype}")


def check_same_shape(**arrays: Array) -> None:
    """Raises a ValueError unless all arrays have one shape."""
    if len({array.shape for array in arrays.values()}) > 1:
        raise ValueError(f"must have one shape: {', '.join(f'{name} {a.shape}' for name, a in arrays.items())}")


def check_groups(rewards: Array, **rows: Array) -> None:
    """Raises a ValueError unless rewards are floating and `[P, G]`, and rows of tokens `[P G, T]`, all of one shape."""
    check_floating(rewards=rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [P, G], got {rewards.shape}")
    check_same_shape(**rows)
    for name, array in rows.items():
        if array.ndim != 2 or len(array) != rewards.size:
            raise ValueError(f"{name} must be [P G, T] for rewards [P, G], {rewards.shape}, got {array.shape}")


def check_per_example(x: Array, **values: float | Array) -> None:
    """Raises a ValueError unless all values are scalars or have one entry for each example of `x[B, ...]`."""
    for name, value in values.items():
        if jnp.shape(value) not in ((), x.shape[:1]):
            raise ValueError(f"{name} must be a scalar or have shape {x.shape[:1]}, got {jnp.shape(value)}")


def one_per_example(x: Array, **values: Array) -> Array:
    """What a function that is named returned, checked to be one value for each example of `x[B, ...]`."""
    ((name, returned),) = values.items()
    if jnp.shape(returned) != x.shape[:1]:
        got = jnp.shape(returned)
        raise ValueError(f"{name} must return shape {x.shape[:1]}, one value per example, got {got}")
    return returned


def check_targets(targets: Array, **scored: Array) -> None:
    """Raises a ValueError unless `targets[...]` are integers, one for each `[..., :]` of the array that is named."""
    ((name, array),) = scored.items()
    if targets.shape != array.shape[:-1]:
        raise ValueError(f"targets must have the leading axes of {name}, {array.shape[:-1]}, got {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")


def per_example(x: Array, **value: float | Array) -> Array:
    """The value that is named, checked to be floating and a scalar or one for each example; in float32 at least."""
    ((name, given),) = value.items()
    given = jnp.asarray(given)
    check_floating(**{name: given})
    check_per_example(x, **{name: given})
    return at_least_float32(given)

"""Sweeps: a grid of float hyperparameters trained as one vmapped program."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.errors import UsageError

__all__ = ["Sweep", "grid", "lift"]


class Sweep(NamedTuple):
    """The members of a sweep. A single run is not a sweep of one: its arrays have no leading axis."""

    values: dict[str, Array]  # [] for a single run, else [S]
    labels: tuple[str, ...]  # what tells the members apart: "lr=0.001 clip=1"

    @property
    def swept(self) -> bool:
        """Whether there is a leading axis of members."""
        return len(self.labels) > 1


def grid(hyper: Any, *, divisor: int = 1) -> Sweep:
    """The grid that a dataclass or a mapping of tuples of floats spans, the last field fastest.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Hyper:
    ...     lr: tuple[float, ...] = (0.1, 0.2)
    ...     clip: tuple[float, ...] = (1.0,)
    >>> grid(Hyper()).labels
    ('lr=0.1', 'lr=0.2')

    Args:
      hyper: a dataclass instance or a mapping whose fields are non-empty tuples of floats.
      divisor: the number of devices over which members are split.

    Returns:
      The members' values by field, and their labels.

    Raises:
      UsageError: a field is empty, has a value twice or NaN, or the number of members is no multiple of `divisor`.
    """
    fields = hyper if isinstance(hyper, Mapping) else vars(hyper)
    for name, values in fields.items():
        if not values:
            raise UsageError(f"--hyper.{name} needs at least one value")
        if len(set(values)) < len(values) or any(map(math.isnan, values)):
            raise UsageError(f"--hyper.{name} needs numbers, each of them once, got {' '.join(map(str, values))}")
    members = list(itertools.product(*fields.values()))
    if len(members) % divisor:
        raise UsageError(
            f"{len(members)} sweep members do not split over sweep={divisor} devices: change one of the two"
        )
    varying = [name for name, values in fields.items() if len(values) > 1]
    labels = tuple(
        " ".join(f"{name}={_text(value)}" for name, value in zip(fields, member, strict=True) if name in varying)
        for member in members
    )
    columns = zip(*members, strict=True)
    values = {
        name: jnp.asarray(column[0] if len(members) == 1 else column, jnp.float32)
        for name, column in zip(fields, columns, strict=True)
    }
    return Sweep(values, labels)


def _text(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def lift(function: Callable, sweep: Sweep, in_axes: tuple[int | None, ...]) -> Callable:
    """`jax.vmap(function, in_axes)` over the members of a sweep, `function` itself for a single run.

    Members share what has `None` in `in_axes`: the same batches and the same keys, so that a member ends where a single
    run with its values ends, and members differ by their hyperparameters alone.
    """
    return jax.vmap(function, in_axes=in_axes) if sweep.swept else function

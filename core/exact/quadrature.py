"""One-dimensional quadrature: the exact answer where no closed form exists."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp

__all__ = ["Moments", "moments"]


class Moments(NamedTuple):
    """What quadrature says of an unnormalised density on the line."""

    mean: Array  # []
    variance: Array  # []
    log_z: Array  # [] log of the integral


def moments(log_density: Callable[[Array], Array], low: float = -8.0, high: float = 8.0, n: int = 400_001) -> Moments:
    """Mean, variance and log normaliser of `exp(log_density)` on `[low, high]` by the trapezoid rule.

    Args:
      log_density: `x[n] -> [n]`, up to a constant, in nats.
      low: left end, where the density has vanished.
      high: right end, likewise.
      n: number of nodes.

    Returns:
      The moments, in the precision of the default float type.
    """
    x = jnp.linspace(low, high, n)
    log_mass = log_density(x) + jnp.log((high - low) / (n - 1))
    log_mass = log_mass.at[jnp.array([0, -1])].add(-jnp.log(2.0))
    log_z = logsumexp(log_mass)
    mass = jnp.exp(log_mass - log_z)
    mean = jnp.sum(mass * x)
    return Moments(mean, jnp.sum(mass * (x - mean) ** 2), log_z)

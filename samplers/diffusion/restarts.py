"""Restarts: several runs of a sampler, of which the best is kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import one_per_example, warn_of_nan

__all__ = ["best_of"]


def best_of(key: Array, sample: Callable[[Array], Any], reward: Callable[[Any], Array], n: int) -> Any:
    r"""Keeps `x_i` with `i = argmax r(x_i)` of `n` independent runs of a sampler, for each example on its own.

    Where the sampler draws `x` from `p`, and no two rewards are equal, `P(x) = F(x)^n - F(x-)^n`, with `F` the
    distribution function of the reward under `p`; among equal rewards it is as under `p`. It is not the tilt of `p` by
    the reward, but where `log F` is linear in it; `core.exact.decoder_laws.best_of_n` enumerates it. One run is the
    sampler. Of equal rewards the first is kept; NaN counts as `-inf`, so it never beats a number, and where all are NaN
    the first run is kept. Outside of `jit` that is warned of.

    Restarts of anchored sampling, 1 to 4, are
    `best_of(key, lambda key: anchored(key, ...), lambda x: reward(table[x]), n)`.

    Args:
      key: typed random key.
      sample: `key -> x`, of leaves `[B, ...]`; mapped over `n` keys, all at once.
      reward: of what it returns, `x -> [B]`.
      n: how many runs.

    Returns:
      `[B, ...]`, as `sample` returns it.

    Raises:
      ValueError: `n` below 1, or a reward that is not `[B]`.

    Reference: Test-Time Anchoring for Discrete Diffusion Posterior Sampling, arXiv:2510.02291; Theoretical guarantees
      on the best-of-n alignment policy, arXiv:2401.01879.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def run(key: Array) -> tuple[Any, Array]:
        x = sample(key)
        return x, one_per_example(jax.tree.leaves(x)[0], reward=reward(x))

    runs, values = jax.vmap(run)(jax.random.split(key, n))
    nan = jnp.isnan(values)
    warn_of_nan(nan, "rewards were NaN; such runs are never kept beside others", stacklevel=2)
    best = jnp.argmax(jnp.where(nan, -jnp.inf, values), 0)
    return jax.tree.map(lambda leaf: jax.vmap(lambda rows, i: rows[i], (1, 0))(leaf, best), runs)

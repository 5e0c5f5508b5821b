"""Parameters away from their initial values, so that nothing is zero by construction."""

import jax
import pytest


@jax.jit
def _randomize(params, seed, size):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="session")
def randomize():
    """Adds normal noise of the given size to every parameter."""
    return lambda params, seed=0, size=0.2: _randomize(params, seed, size)

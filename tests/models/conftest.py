"""Parameters away from their initial values, so that nothing is zero by construction."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def randomize():
    """Normal draws of the given size for every parameter, from shapes alone: NumPy compiles nothing."""

    def draw(shapes, seed=0, size=0.2):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: size * rng.standard_normal(leaf.shape, np.float32), shapes)

    return draw

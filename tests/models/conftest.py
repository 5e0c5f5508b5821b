"""Networks for tests: compiled quickly, with parameters away from their initial values."""

import functools

import jax
import numpy as np
import pytest

from esscher.models.functional import initializer


@pytest.fixture(autouse=True)
def compile_models_quickly(compile_quickly):
    """At these shapes compiling is what takes time, not running."""


@pytest.fixture(scope="session")
def build():
    """`make_module -> (compiled init, compiled apply, axis names)`, once for each maker."""

    @functools.cache
    def compiled(make_module):
        network = initializer(make_module)
        return network._replace(init=jax.jit(network.init), apply=jax.jit(network.apply))

    return compiled


@pytest.fixture(scope="session")
def randomize():
    """Normal draws of the given size for every parameter of a network, so that nothing is zero by construction."""

    def draw(network, seed=0, size=0.2):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: size * rng.standard_normal(leaf.shape, np.float32), shapes)

    return draw

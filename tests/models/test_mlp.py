"""The multilayer perceptron learns an exact denoiser."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from esscher.core import schedules
from esscher.core.exact import GaussianMixture
from esscher.models.functional import initializer
from esscher.models.mlp import MLP
from esscher.models.preconditioning import edm_denoiser


def test_number_of_parameters():
    network = initializer(functools.partial(MLP, dimension=3, width=20, depth=2, classes=4))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    condition = (256 * 20 + 20) + (20 * 20 + 20) + 5 * 20
    expected = condition + (3 * 20 + 20) + 2 * 2 * (20 * 20 + 20) + (20 * 3 + 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_without_hidden_layers_there_is_no_network():
    with pytest.raises(ValueError, match="depth must be an integer of at least 1, got 0"):
        initializer(functools.partial(MLP, depth=0))


def test_trained_on_a_mixture_it_becomes_the_exact_denoiser():
    """Its distance to the exact denoiser falls to a small part of that of the untrained one (`F = 0`)."""
    law = GaussianMixture(
        log_weights=jnp.log(jnp.array([0.3, 0.7])),
        means=jnp.array([[-1.0, 0.5], [0.8, -0.6]]),
        covariances=jnp.array([0.05, 0.1])[:, None, None] * jnp.eye(2),
    )
    network, n, batch = initializer(functools.partial(MLP, width=64, depth=2)), 32_768, 256
    denoise, optimizer = edm_denoiser(network.apply, 0.9), optax.adam(optax.cosine_decay_schedule(5e-3, 3 * n // batch))

    @jax.jit
    def draw(key):
        data_key, level_key, noise_key = jax.random.split(key, 3)
        sigma = jnp.exp(-0.5 + jax.random.normal(level_key, (n,)))
        x = law.sample(data_key, n) + sigma[:, None] * jax.random.normal(noise_key, (n, 2))
        return x, sigma, law.predictor(schedules.edm())(x, sigma).data

    def distance(params, x, sigma, exact):
        weight = (sigma**2 + 0.9**2) / (sigma * 0.9) ** 2
        return jnp.mean(weight * jnp.mean((denoise(params, x, sigma) - exact) ** 2, -1))

    @jax.jit
    def train(params, examples):
        def step(carry, examples):
            params, state = carry
            updates, state = optimizer.update(jax.grad(distance)(params, *examples), state)
            return (optax.apply_updates(params, updates), state), None

        epochs = jax.tree.map(
            lambda leaf: jnp.tile(leaf.reshape(-1, batch, *leaf.shape[1:]), (3, 1, 1)[: leaf.ndim + 1]), examples
        )
        return jax.lax.scan(step, (params, optimizer.init(params)), epochs)[0][0]

    params, test = network.init(jax.random.key(0)), draw(jax.random.key(1))
    trained = train(params, draw(jax.random.key(2)))
    assert distance(trained, *test) < 0.05 * distance(params, *test)

"""The multilayer perceptron learns an exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esscher.core import schedules
from esscher.core.exact import GaussianMixture
from esscher.models.functional import initializer
from esscher.models.mlp import MLP
from esscher.models.preconditioning import edm_denoiser

LAW = GaussianMixture(
    jnp.log(jnp.array([0.3, 0.7])),
    jnp.array([[-1.0, 0.5], [0.8, -0.6]]),
    jnp.array([0.05, 0.1])[:, None, None] * jnp.eye(2),
)


def test_number_of_parameters():
    shapes = jax.eval_shape(
        initializer(lambda rngs: MLP(dimension=3, width=20, depth=2, classes=4, rngs=rngs)).init, jax.random.key(0)
    )
    condition = 256 * 20 + 20 + 20 * 20 + 20 + 5 * 20
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == condition + (3 * 20 + 20) + 4 * (20 * 20 + 20) + (
        20 * 3 + 3
    )


def test_trained_on_a_mixture_it_becomes_the_exact_denoiser():
    """The excess of its error over the exact denoiser's is a small part of what doing nothing (`F = 0`) leaves."""
    network = initializer(lambda rngs: MLP(width=64, depth=2, rngs=rngs))
    denoise, optimizer = edm_denoiser(network.apply, 0.9), optax.adam(optax.cosine_decay_schedule(5e-3, 400))
    exact = LAW.predictor(schedules.edm())

    def draw(key, n=256):
        data_key, level_key, noise_key = jax.random.split(key, 3)
        sigma = jnp.exp(-0.5 + jax.random.normal(level_key, (n,)))
        return LAW.sample(data_key, n) + sigma[:, None] * jax.random.normal(noise_key, (n, 2)), sigma

    def excess(params, x, sigma):  # the regression towards x_0 has this as its reducible part
        weight = (sigma**2 + 0.9**2) / (sigma * 0.9) ** 2
        return jnp.mean(weight * jnp.mean((denoise(params, x, sigma) - exact(x, sigma).data) ** 2, -1))

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            gradient = jax.grad(excess)(params, *draw(key))
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 400))[0][0]

    params, test = network.init(jax.random.key(0)), draw(jax.random.key(1), 4096)
    before, after = excess(params, *test), excess(train(params, jax.random.key(2)), *test)
    assert np.isfinite(after)
    assert after < 0.05 * before

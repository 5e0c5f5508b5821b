"""Kernels that remember what the model said: the same laws, sample by sample, with half the evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.categorical import linear_alpha
from esscher.core.contracts import Prediction
from esscher.samplers import smc
from esscher.samplers.diffusion import discrete, kernels, steering, svdd

pytestmark = pytest.mark.usefixtures("compile_quickly")

COSINE = schedules.cosine()
TIMES = jnp.array([0.9, 0.6, 0.3, 0.0])
KEY = jax.random.key(0)
MASK = 3


def counted(model):
    """The model, and on how many states in all it is evaluated, counted as the program runs."""
    count = np.zeros(1, int)

    def ask(x, t):
        jax.debug.callback(lambda: count.__iadd__(len(x)))
        return model(x, t)

    return ask, count


def predictor(x, t):
    data = jnp.tanh(x + t[:, None])
    sigma = COSINE.sigma(t)[:, None]
    return Prediction(data, (x - COSINE.alpha(t)[:, None] * data) / sigma)


def denoiser(x, t):
    position = jnp.arange(x.shape[1])[:, None]
    return jnp.sin(1.0 + position * jnp.arange(3) + (x == MASK).sum(-1)[:, None, None] + t[:, None, None])


def log_reward(x):
    return 2.0 * x[:, 0].astype(float) - jnp.square(x[:, 1])


def at_the_end(s):
    return COSINE.sigma(s) == 0


def gaussian(model):
    return kernels.ddim_kernel(model, COSINE)


def masked(model):
    return discrete.masked_kernel(model, linear_alpha, MASK)


# model, kernel of a model, value of a model, states at the start, when nothing more is asked
CASES = {
    "gaussian": (
        predictor,
        gaussian,
        lambda model: svdd.posterior_mean_value(model, log_reward, COSINE),
        jax.random.normal(KEY, (5, 2)),
        at_the_end,
    ),
    "masked": (
        denoiser,
        masked,
        lambda model: discrete.fill_in_value(model, log_reward, MASK),
        jnp.full((5, 4), MASK),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_svdd_picks_the_same_samples_and_looks_once_at_each_candidate(name):
    model, build, value, x, last = CASES[name]
    plain, twice = counted(model)
    expected = jax.jit(lambda: svdd.svdd(KEY, build(plain), value(plain), x, TIMES, 0.5, candidates=3))()
    remembering, once = counted(model)
    look, kernel = kernels.remembering_kernel(build, remembering, last)

    def steered():
        return svdd.svdd(KEY, kernel, kernels.remembered_value(value), look(x, TIMES[0]), TIMES, 0.5, candidates=3)

    found = jax.jit(steered)()
    np.testing.assert_allclose(found.x.x, expected.x, rtol=1e-6)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    jax.effects_barrier()
    # Of three steps with fifteen candidates: each is looked at; the last ones only where tokens are asked for.
    assert once[0] == (5 + 2 * 15 if last else 5 + 3 * 15)
    assert twice[0] == (3 * 15 + 2 * 15 if last else 2 * 3 * 15)


@pytest.mark.parametrize("name", CASES)
def test_twisted_particles_are_weighed_the_same(name):
    model, build, value, x, last = CASES[name]
    start, propose = steering.twisted(build(model), value(model))
    look, kernel = kernels.remembering_kernel(build, model, last)
    start_seen, propose_seen = steering.twisted(kernel, kernels.remembered_value(value))
    inputs = steering.steps(TIMES)
    expected = jax.jit(lambda: smc.run(KEY, propose, start(x, TIMES[0]), inputs)[0])()
    found = jax.jit(lambda: smc.run(KEY, propose_seen, start_seen(look(x, TIMES[0]), TIMES[0]), inputs)[0])()
    np.testing.assert_allclose(found.state[0].x, expected.state[0], rtol=1e-6)
    np.testing.assert_allclose(found.log_w, expected.log_w, rtol=1e-5)
    np.testing.assert_allclose(found.log_z, expected.log_z, rtol=1e-5)


def test_states_that_remember_keep_their_types_where_times_are_wider(x64):
    """Starts in float32 of a model that answers in the precision of the times, with and without a last look."""
    x, times = jnp.ones((2, 2), jnp.float32), jnp.array([0.9, 0.6, 0.3, 0.0], jnp.float64)
    value = kernels.remembered_value(lambda model: svdd.posterior_mean_value(model, log_reward, COSINE))
    for last in (None, at_the_end):
        look, kernel = kernels.remembering_kernel(gaussian, predictor, last)
        start = look(x, jnp.float32(0.9))
        assert kernel.sample(KEY, start, *times[:2]).said.data.dtype == jnp.float32
        found = svdd.svdd(KEY, kernel, value, start, times[:3], 0.5, candidates=2)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.x)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", CASES)
def test_the_density_of_a_step_is_that_of_the_plain_kernel(name):
    model, build, _, x, last = CASES[name]
    t, s = TIMES[:2]
    look, kernel = kernels.remembering_kernel(build, model, last)
    seen = look(x, t)
    new = kernel.sample(KEY, seen, t, s)
    np.testing.assert_allclose(kernel.log_prob(new, seen, t, s), build(model).log_prob(new.x, x, t, s), rtol=1e-5)

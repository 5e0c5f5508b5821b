"""Every proposer of the library on one asymmetric mixture: the tilt's moments and normaliser; rewards that forbid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from esscher.core import schedules
from esscher.samplers import smc
from esscher.samplers.diffusion import correctors, kernels, steering, svdd

pytestmark = pytest.mark.usefixtures("compile_quickly")

COSINE = schedules.cosine()
TIMES = jnp.append(schedules.log_snr_times(160, COSINE, 0.99, 0.01), 0.0)
RUNS, N = 6, 3000


def log_reward(x):
    """The same quadratic as in the sheet's table: `(-0.6 x^2 + 0.5 x) / 0.5`."""
    return -1.2 * jnp.square(x[:, 0]) + x[:, 0]


EXACT = (0.745802, 0.514944, -1.034771)  # mean, variance, log Z of the tilt, by quadrature


def by_value(predictor):
    """`twisted` on states that remember, with the reward of the data term for a twist."""
    last = lambda s: COSINE.sigma(s) == 0  # noqa: E731
    look, kernel = kernels.remembering_kernel(lambda model: kernels.ddim_kernel(model, COSINE), predictor, last)
    value = kernels.remembered_value(lambda model: svdd.posterior_mean_value(model, log_reward, COSINE))
    start, propose = steering.twisted(kernel, value)
    return (lambda x, t: start(look(x, t), t)), propose


def corrected(predictor):
    strength = lambda t: jnp.square(COSINE.alpha(t))  # noqa: E731
    start, propose = correctors.corrector((predictor,), (1.0,), COSINE, reward=log_reward, strength=strength)
    return (lambda x, t: start(jax.random.key(3), len(x), x.shape[1:], t)), propose


METHODS = {
    "twisted": by_value,
    "tds": lambda predictor: steering.tds(predictor, log_reward, COSINE),
    "difference": lambda predictor: steering.fk_steering(predictor, log_reward, COSINE),
    "max": lambda predictor: steering.fk_steering(predictor, log_reward, COSINE, potential="max"),
    "corrector": corrected,
}


def place(state):
    """The sample within a particle's state."""
    state = state[0] if isinstance(state, tuple) and not hasattr(state, "x") else state
    return state.x


@pytest.mark.parametrize("name", METHODS)
def test_weighted_particles_have_the_moments_and_the_normaliser_of_the_tilt(line, name):
    """Within 5 standard errors of the runs' mean, and 0.03 for steps of first order; the model is further away."""
    start, propose = METHODS[name](line.predictor(COSINE))

    def one(key):
        keys = jax.random.split(key)
        first = start(line.at(COSINE, TIMES[0]).sample(keys[0], N), TIMES[0])
        last, _ = smc.run(keys[1], propose, first, steering.steps(TIMES))
        w, x = jax.nn.softmax(last.log_w), place(last.state)[:, 0]
        return jnp.array([w @ x, w @ x**2 - (w @ x) ** 2, last.log_z])

    found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), RUNS)), float)
    error = found.std(0, ddof=1) / RUNS**0.5
    assert np.all(error < 0.03)
    np.testing.assert_array_less(np.abs(found.mean(0) - EXACT), 5 * error + 0.03)
    assert line.moments()[1] > EXACT[1] + 0.8


def test_a_reward_may_forbid_and_its_normaliser_is_the_chance_of_what_is_allowed(line):
    """`-inf` below 0 at the end, nothing before: half a population dies at once, the other is the law's upper part."""

    def twist(x, t):
        return jnp.where((t == 0) & (x[:, 0] < 0), -jnp.inf, 0.0)

    start, propose = steering.twisted(kernels.ddim_kernel(line.predictor(COSINE), COSINE), twist)
    x = line.at(COSINE, TIMES[0]).sample(jax.random.key(1), 20_000)
    last, trace = jax.jit(lambda x: smc.run(jax.random.key(2), propose, start(x, TIMES[0]), steering.steps(TIMES)))(x)
    above = float(line.weights @ norm.cdf(line.means / jnp.sqrt(line.variances)))
    np.testing.assert_allclose(np.exp(last.log_z), above, atol=5 * (above * (1 - above) / 20_000) ** 0.5 + 0.01)
    np.testing.assert_array_equal(last.log_w > -np.inf, last.state[0][:, 0] >= 0)
    assert np.all(trace.alive)
    assert not np.any(trace.nan)


@pytest.mark.parametrize("name", ["tds", "difference", "max"])
def test_what_is_forbidden_on_the_way_stays_forbidden_and_no_more(line, name):
    forbid = lambda x: jnp.where(x[:, 0] < 0.0, -jnp.inf, 0.0)  # noqa: E731
    make = {"tds": steering.tds, "difference": steering.fk_steering}.get(name)
    options = {} if make else {"potential": name}
    start, propose = (make or steering.fk_steering)(line.predictor(COSINE), forbid, COSINE, **options)
    x = line.at(COSINE, TIMES[0]).sample(jax.random.key(1), 500)
    inputs = steering.steps(jnp.append(TIMES[:-1:8], 0.0))
    last, trace = jax.jit(lambda x: smc.run(jax.random.key(2), propose, start(x, TIMES[0]), inputs))(x)
    alive = np.asarray(last.log_w) > -np.inf
    assert alive.sum() > 100
    assert np.all(np.asarray(last.state.x)[alive] >= 0)
    assert np.isfinite(last.log_z)
    assert not np.any(trace.nan)


@pytest.mark.parametrize("name", METHODS)
def test_times_may_be_finer_than_states(x64, line, name):
    predictor = METHODS[name](line.predictor(COSINE))
    x = jnp.linspace(-1.0, 1.0, 8, dtype=jnp.float32)[:, None]
    times = jnp.array([0.9, 0.5, 0.1, 0.0], jnp.float64)
    last, _ = smc.run(jax.random.key(0), predictor[1], predictor[0](x, times[0]), steering.steps(times))
    if name != "corrector":  # which draws its own start
        assert place(last.state).dtype == jnp.float32
    assert np.isfinite(last.log_z)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: steering.tds(m, log_reward, COSINE, eta=0.0), "eta must be above 0, since a step without noise"),
        (lambda m: steering.fk_steering(m, log_reward, COSINE, eta=0.0), "eta must be above 0"),
        (lambda m: correctors.corrector((m,), (1.0,), COSINE, rho=-1.0), "rho must be at least 0, got -1.0"),
        (
            lambda m: steering.tds(m, lambda x: x.sum(), COSINE)[0](jnp.zeros((3, 1)), 0.5),
            r"log_reward must return shape \(3,\), one value per example, got \(\)",
        ),
        (
            lambda m: steering.fk_steering(m, lambda x: x, COSINE)[0](jnp.zeros((3, 1)), 0.5),
            r"log_reward must return shape \(3,\), one value per example, got \(3, 1\)",
        ),
        (
            lambda m: steering.twisted(kernels.ddim_kernel(m, COSINE), lambda x, t: x.T)[0](jnp.zeros((3, 1)), 0.5),
            r"log_twist must return shape \(3,\), one value per example, got \(1, 3\)",
        ),
        (
            lambda m: correctors.corrector((m,), (1.0,), COSINE, reward=lambda x: x, strength=lambda t: t)[0](
                jax.random.key(0), 3, (1,), jnp.asarray(0.5)
            ),
            r"reward must return shape \(3,\), one value per example, got \(3, 1\)",
        ),
        (
            lambda m: smc.run(
                jax.random.key(0), steering.tds(m, log_reward, COSINE)[1], smc.begin(jnp.zeros((3, 1))), TIMES
            ),
            r"inputs must be steering.steps\(times\), the pairs of a grid",
        ),
    ],
)
def test_what_cannot_be_weighed_is_named(line, call, message):
    with pytest.raises(ValueError, match=message):
        call(line.predictor(COSINE))

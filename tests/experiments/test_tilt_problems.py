"""The tilt bench's problems are exact: the model, the tilt's samples, and the divergences, against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from esscher.core import schedules
from esscher.core.exact import quadrature
from esscher.experiments import tilt_problems
from esscher.experiments.tilt_problems import BINS, LENGTH, PROBLEMS, SYMBOLS

pytestmark = pytest.mark.usefixtures("compile_quickly")

SCHEDULE = schedules.cosine()


def plain(model):
    return model


def test_the_predictor_in_eigenvectors_is_that_of_the_mixture():
    given = tilt_problems.make("16-D linear").parameters
    x, t = 2 * jax.random.normal(jax.random.key(0), (5, 16)), jnp.array([0.05, 0.3, 0.5, 0.8, 0.97])
    ours, expected = jax.jit(
        lambda: (tilt_problems.spectral_predictor(given, SCHEDULE)(x, t), given.mixture().predictor(SCHEDULE)(x, t))
    )()
    np.testing.assert_allclose(ours.data, expected.data, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.noise, expected.noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["1-D linear", "1-D quadratic", "1-D half-space"])
def test_exact_samples_have_the_moments_of_quadrature(name):
    """Within 5 standard errors of 20,000 samples; those of the model are further away."""
    problem, n = tilt_problems.make(name), 20_000
    given = problem.parameters
    density = lambda x: given.mixture().log_prob(x[:, None]) + given.reward.over_beta(x[:, None])  # noqa: E731
    tilt = jax.jit(lambda: quadrature.moments(density, n=20_001))()
    x = np.asarray(problem.exact(jax.random.key(1), n))[:, 0]
    error = 5 * float(tilt.variance / n) ** 0.5
    assert abs(x.mean() - tilt.mean) < error
    assert abs(x.var() - tilt.variance) < 5 * float(tilt.variance) * (3 / n) ** 0.5
    model = given.mixture()
    gaps = abs(model.mean()[0] - tilt.mean), abs(model.covariance()[0, 0] - tilt.variance)
    assert max(gaps) > 10 * error


@pytest.mark.parametrize("name", ["2-D half-space", "16-D quadratic", "64-D linear"])
def test_tilts_in_higher_dimension_weigh_samples_of_the_model(name):
    """`E_tilt[r] = E_p[r e^(r / beta)] / E_p[e^(r / beta)]`, by 20,000 samples of the model."""
    problem = tilt_problems.make(name)
    given = problem.parameters
    draw = jax.jit(lambda given, key: given.reward.over_beta(given.mixture().sample(key, 20_000)))
    free = draw(given, jax.random.key(2))
    w = jax.nn.softmax(free)
    expected, spread = w @ free, jnp.sqrt(jnp.sum(jnp.square(w * (free - w @ free))))
    x = problem.exact(jax.random.key(3), 4000)
    reward = given.reward.over_beta(x)
    assert abs(reward.mean() - expected) < 5 * jnp.hypot(spread, reward.std() / 4000**0.5)
    assert reward.mean() > free.mean() + 0.2


def test_bins_hold_as_much_of_the_tilt_each_and_samples_elsewhere_are_far():
    problem = tilt_problems.make("1-D quadratic")
    given = problem.parameters
    tilt = given.mixture().tilt_quadratic(given.reward.curvature, given.reward.slope, given.reward.beta)
    edges = np.asarray(tilt_problems._equal_bins(given), np.float64)
    scaled = (edges[:, None] - np.asarray(tilt.means)[:, 0]) / np.sqrt(np.asarray(tilt.covariances)[:, 0, 0])
    np.testing.assert_allclose(norm.cdf(scaled) @ np.exp(tilt.log_weights), np.arange(1, BINS) / BINS, atol=1e-4)
    exact = problem.exact(jax.random.key(4), 500)
    inside = jnp.repeat(jnp.asarray(np.append(edges, 9.0) - 1e-3), 3)[:, None]
    np.testing.assert_allclose(problem.measure(inside[:, :], inside)["KL"], 0, atol=1e-6)
    one_bin = jnp.full((500, 1), 9.0)
    np.testing.assert_allclose(problem.measure(one_bin, exact)["KL"], np.log(BINS), rtol=1e-5)


@pytest.mark.parametrize("name", ["strings additive", "strings pairwise"])
def test_strings_are_enumerated(name):
    """The tilt by a loop over strings; a sample that holds each as often as the tilt says has no divergence."""
    problem = tilt_problems.make(name)
    single, pairs = (np.asarray(part, np.float64) for part in problem.parameters[1:])
    assert single.any() != pairs.any()
    strings = np.array(list(np.ndindex((SYMBOLS,) * LENGTH)))
    reward = np.array(
        [
            sum(single[i, v] for i, v in enumerate(s))
            + sum(pairs[i, v, w] for i, (v, w) in enumerate(itertools.pairwise(s)))
            for s in strings
        ]
    )
    np.testing.assert_allclose(
        problem.task(problem.parameters, plain).log_reward(strings), reward, rtol=1e-4, atol=1e-5
    )
    tilt = np.exp(np.asarray(problem.parameters.log_probs, np.float64) + reward)
    tilt /= tilt.sum()
    x = np.asarray(problem.exact(jax.random.key(5), 40_000))
    counts = np.bincount(x @ SYMBOLS ** np.arange(LENGTH)[::-1], minlength=len(tilt))
    assert np.all(np.abs(counts - 40_000 * tilt) < 5 * np.sqrt(40_000 * tilt) + 3)
    often = np.round(200_000 * tilt).astype(int)
    assert problem.measure(np.repeat(strings, often, axis=0), x)["KL"] < 1e-4
    flat = float(np.log(1 / len(tilt)) - np.log(tilt).mean())
    np.testing.assert_allclose(problem.measure(strings, x)["KL"], flat, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("1-D linear", jnp.nan),
        ("1-D linear", jnp.inf),
        ("16-D linear", jnp.nan),
        ("strings additive", SYMBOLS),
        ("strings additive", -1),
    ],
)
def test_what_is_no_sample_has_no_divergence(name, wrong):
    """One number among 100 samples: it would go into the last bin, and a mask would make another string's number."""
    problem = tilt_problems.make(name)
    x = problem.exact(jax.random.key(6), 100)
    assert all(np.isfinite(value) for value in problem.measure(x, x).values())
    assert all(np.isnan(value) for value in problem.measure(x.at[50, 0].set(wrong), x).values())


@pytest.mark.parametrize("name", PROBLEMS)
def test_grids_end_at_clean_samples_and_have_one_step_for_each_call(name):
    problem = tilt_problems.make(name)
    task = problem.task(problem.parameters, plain)
    for steps in (1, 2, 7):
        times = task.times(steps)
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert jnp.all(jnp.diff(times) < 0)
    x = task.start(jax.random.key(0), 3)
    assert x.shape == (3, *problem.sample.shape)
    assert x.dtype == problem.sample.dtype

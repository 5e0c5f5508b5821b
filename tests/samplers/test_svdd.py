"""Soft value decoding where values or temperatures leave nothing to weigh by, and where types differ."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction, ReverseKernel
from esscher.samplers.diffusion import svdd

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY, TIMES, M = jax.random.key(0), jnp.array([2.0, 1.0, 0.0]), 3
COSINE = schedules.cosine()

COUNTING = ReverseKernel(
    lambda key, x, t, s: x + jnp.arange(len(x)) % M, lambda x_s, x, t, s: jnp.where(x_s == x + 1, jnp.nan, -1.0)
)
"""Of each state the three candidates x, x + 1 and x + 2, of which the second has no density."""


def run(value, x=(0, 100), beta=1.0, **options):
    return svdd.svdd(KEY, COUNTING, value, jnp.asarray(x), TIMES, beta, candidates=M, **options)


def odd_only(x, s):
    """NaN of even numbers, and of all beyond 50."""
    return jnp.where((x % 2 == 0) | (x > 50), jnp.nan, x / 100)


def test_values_that_are_nan_are_counted_named_and_of_no_weight():
    """From 0 only 1 is a number; from 1 both 1 and 3 are; from 100 nothing is, and the first candidate is kept."""
    with pytest.warns(UserWarning, match="^9 values were NaN; such candidates are never picked") as seen:
        found = svdd.svdd(KEY, COUNTING, odd_only, jnp.array([0, 100]), TIMES, 1.0, candidates=M)
    (warned,) = seen
    assert warned.filename == __file__
    np.testing.assert_array_equal(found.nan, [5, 4])
    np.testing.assert_array_equal(found.values[:, 1], -jnp.inf)
    assert found.x[0] in (1, 3)
    assert found.x[1] == 100
    np.testing.assert_allclose(found.values[:, 0], [0.01, found.x[0] / 100], rtol=1e-6)
    w = np.exp([0.01, 0.03])
    np.testing.assert_allclose(found.ess, [[1, 0], [w.sum() ** 2 / (w**2).sum(), 0]], rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(jax.jit(lambda: run(odd_only))().nan, [5, 4])
        run(lambda x, s: x / 100)


def test_log_ratios_that_are_nan_are_counted_too():
    uniform = COUNTING._replace(log_prob=lambda x_s, x, t, s: jnp.zeros(len(x)))
    with pytest.warns(UserWarning, match="^4 values or log-ratios were NaN"):
        found = run(lambda x, s: x / 100, proposal=uniform, greedy=True)
    np.testing.assert_array_equal(found.x, [4, 104])
    assert np.all((found.ess > 1.9) & (found.ess <= 2))


@pytest.mark.parametrize("beta", [0.0, jnp.array([0.0, 1e-6])])
def test_at_temperature_0_the_best_is_taken(beta):
    value = lambda x, s: jnp.sin(1.0 * x)  # noqa: E731
    for found in (run(value, beta=beta), jax.jit(lambda beta: run(value, beta=beta))(beta)):
        best = run(value, greedy=True)
        np.testing.assert_array_equal(found.x, best.x)
        np.testing.assert_array_equal(found.values, best.values)
        np.testing.assert_array_equal(found.ess, 1)


def test_an_infinite_temperature_leaves_out_what_has_no_weight():
    values = jnp.array([[-jnp.inf, 2.0, jnp.nan]] * 50)
    np.testing.assert_array_equal(svdd.svdd_select(KEY, values, jnp.inf), 1)
    ratio = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_array_equal(svdd.svdd_select(KEY, jnp.array([[1.0, 5.0, 0.0]] * 50), 0.0, ratio), 0)


def test_states_keep_their_types_where_times_are_wider(x64):
    """The kernel and the model compute in the precision of the times."""
    x, times = jnp.ones((4, 2), jnp.float32), jnp.array([0.9, 0.5, 0.0], jnp.float64)

    def predictor(x, t):
        return Prediction(jnp.tanh(x) * t[:, None], x)

    def sample(key, x, t, s):
        return x * s + jax.random.normal(key, x.shape, x.dtype)

    kernel = ReverseKernel(sample, lambda x_s, x, t, s: -jnp.square(x_s - s * x).sum(-1))
    value = svdd.posterior_mean_value(predictor, lambda x: x[:, 0], COSINE)
    for proposal in (None, kernel):
        found = svdd.svdd(KEY, kernel, value, x, times, 0.5, candidates=2, proposal=proposal)
        assert found.x.dtype == jnp.float32
        np.testing.assert_array_equal(found.values[-1], found.x[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(lambda x, s: x[:, None] * jnp.ones(1)), r"value must return shape \(6,\), one value .* \(6, 1\)"),
        (lambda: run(lambda x, s: x.reshape(2, 3) * 1.0), r"value must return shape \(6,\), .* got \(2, 3\)"),
        (lambda: run(lambda x, s: 1.0), r"value must return shape \(6,\), one value per example, got \(\)"),
        (lambda: run(odd_only, x=jnp.zeros(0, int)), r"x must have at least one example, got shape \(0,\)"),
        (lambda: run(odd_only, beta=-1.0), "beta must be at least 0, got -1"),
        (lambda: run(odd_only, beta=jnp.nan), "beta must be at least 0, got nan"),
        (lambda: svdd.svdd_select(KEY, jnp.zeros((1, 2)), -1.0), "beta must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""An exact one-dimensional testbed: the mixture's predictor in a few lines, and the flow that it should follow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.scipy.stats import norm

from esscher.core.contracts import Prediction
from esscher.core.exact import GaussianMixture


class Line(NamedTuple):
    """A Gaussian mixture on the line, which compiles faster than the general one that it is tested to equal."""

    weights: Array  # [K]
    means: Array  # [K]
    variances: Array  # [K]

    def moments(self):
        mean = self.weights @ self.means
        return mean, self.weights @ (self.variances + self.means**2) - mean**2

    def at(self, schedule, t):
        alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
        return Line(self.weights, alpha * self.means, alpha**2 * self.variances + sigma**2)

    def sample(self, key, n):
        keys = jax.random.split(key)
        k = jax.random.categorical(keys[0], jnp.log(self.weights), shape=(n, 1))
        return self.means[k] + jnp.sqrt(self.variances[k]) * jax.random.normal(keys[1], (n, 1))

    def mixture(self):
        return GaussianMixture(jnp.log(self.weights), self.means[:, None], self.variances[:, None, None])

    def log_responsibilities(self, schedule, x, t):
        """`log p_t(k | x)`, `[B, 1] -> [B, K]`."""
        errors, variances = self._standardize(schedule, x, t)
        return jax.nn.log_softmax(jnp.log(self.weights / jnp.sqrt(variances)) - 0.5 * variances * errors**2)

    def predictor(self, schedule):
        def predict(x, t):
            errors, _ = self._standardize(schedule, x, t)
            share = jnp.exp(self.log_responsibilities(schedule, x, t))
            component_data = self.means + schedule.alpha(t)[:, None] * self.variances * errors
            average = lambda values: jnp.sum(share * values, -1, keepdims=True)  # noqa: E731
            return Prediction(average(component_data), schedule.sigma(t)[:, None] * average(errors))

        return predict

    def _standardize(self, schedule, x, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        variances = alpha**2 * self.variances + sigma**2
        return (x - alpha * self.means) / variances, variances

    def flow(self, schedule, x, t, s):
        """`x_s` on the probability flow through `x_t`: on the line it keeps the order, so it matches quantiles."""
        level, low, high = self._cdf(schedule, x, t), jnp.full_like(x, -30.0), jnp.full_like(x, 30.0)

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            below = self._cdf(schedule, middle, s) < level
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        return jax.lax.fori_loop(0, 70, halve, (low, high))[0]

    def _cdf(self, schedule, x, t):
        law = self.at(schedule, t)
        return jnp.sum(law.weights * norm.cdf(x, law.means, jnp.sqrt(law.variances)), -1, keepdims=True)


@pytest.fixture
def gaussian():
    """Makes a single Gaussian of a mean and a variance."""
    return lambda mean, variance: Line(jnp.ones(1), jnp.array([mean]), jnp.array([variance]))


@pytest.fixture
def line():
    """Two modes of unequal weight and width; double precision where `x64` comes before."""
    return Line(jnp.array([0.3, 0.7]), jnp.array([-1.0, 1.5]), jnp.array([0.2, 0.35]))

"""Laws of selection among samples against sums over all draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.exact import TabularLM
from esscher.core.exact import decoder_laws as laws

pytestmark = pytest.mark.usefixtures("x64")

BETA = 0.5


def small():
    """Four strings, two of them with the same reward."""
    table = jax.nn.log_softmax(jax.random.normal(jax.random.key(4), (3, 2)))
    return TabularLM(table, 2), jnp.array([0.5, -1.0, 0.5, 2.0])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_enumerated(n):
    model, reward = small()
    p, r = np.exp(model.sequence_log_probs()), np.asarray(reward)
    at_random, by_order = np.zeros(4), np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        best = [x for x in drawn if r[x] == r[list(drawn)].max()]
        np.add.at(at_random, best, p[list(drawn)].prod() / len(best))
        by_order[best[0]] += p[list(drawn)].prod()
    out = jnp.exp(laws.best_of_n(model, reward, n))
    np.testing.assert_allclose(out, by_order, rtol=1e-12)
    np.testing.assert_allclose(out, at_random, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("forbidden", [False, True])
def test_soft_best_of_n_enumerated(n, forbidden):
    model, reward = small()
    reward = reward.at[0].set(-jnp.inf) if forbidden else reward
    p, w = np.exp(model.sequence_log_probs()), np.exp(np.asarray(reward) / BETA)
    expected = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        for x in drawn:
            total = w[list(drawn)].sum()
            expected[x] += p[list(drawn)].prod() * (w[x] / total if total else 1 / n)
    np.testing.assert_allclose(jnp.exp(laws.soft_best_of_n(model, reward, BETA, n)), expected, rtol=1e-12)


def test_a_reward_that_is_nan_is_not_the_best():
    model, reward = small()
    missing = reward.at[0].set(jnp.nan)
    assert np.isnan(laws.best_of_n(model, missing, 2)).all()
    never = laws.filtered(model, lambda log_probs: log_probs.at[1, 0].set(-jnp.inf))  # string 0 is not drawn
    np.testing.assert_array_equal(laws.best_of_n(never, missing, 2), laws.best_of_n(never, reward, 2))

"""Restarts against the law of the best, enumerated from a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.samplers.diffusion import restarts

P = np.array([0.35, 0.1, 0.25, 0.2, 0.1])
REWARDS = np.array([-1.0, 3.0, 0.5, 0.5, -7.0])  # two of them equal
B = 20_000


def table(key):
    return jax.random.categorical(key, jnp.log(P), shape=(B,))


def best_law(rewards, n):
    """`p(x)` times what it gains: `(F(r)^n - F(r-)^n) / P(reward = r)`."""
    below, at_most = ((P * part).sum(1) for part in (rewards < rewards[:, None], rewards <= rewards[:, None]))
    return P * (at_most**n - below**n) / (at_most - below)


def assert_law(x, law):
    """Frequencies within 5 standard errors: wrong by chance less than once in 300,000."""
    assert np.all(np.abs(np.bincount(x, minlength=len(P)) - B * law) <= 5 * np.sqrt(B * law * (1 - law)))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_best_of_n_has_the_law_of_the_maximum(n):
    best = jax.jit(lambda key: restarts.best_of(key, table, lambda x: jnp.asarray(REWARDS)[x], n))
    x = np.asarray(best(jax.random.key(0)))
    assert_law(x, best_law(REWARDS, n))
    np.testing.assert_allclose(best_law(REWARDS, 2)[1], 1 - 0.9**2)
    np.testing.assert_allclose(best_law(REWARDS, 5)[4], 0.1**5)


def test_one_run_is_the_sampler():
    key = jax.random.key(3)
    once = restarts.best_of(key, table, lambda x: jnp.asarray(REWARDS)[x], 1)
    np.testing.assert_array_equal(once, table(jax.random.split(key, 1)[0]))


def test_examples_choose_apart_and_what_is_kept_stays_together():
    """Rows want the opposite; each keeps its own best run, whole."""
    sign = jnp.array([1.0, -1.0, 1.0])

    def sample(key):
        x = jax.random.normal(key, (3, 2))
        return {"x": x, "sum": x.sum(1)}

    key = jax.random.key(0)
    best = restarts.best_of(key, sample, lambda out: sign * out["sum"], 4)
    runs = np.stack([sample(k)["x"] for k in jax.random.split(key, 4)])
    chosen = np.argmax(np.asarray(sign) * runs.sum(2), 0)
    assert len(set(chosen)) > 1
    np.testing.assert_allclose(best["x"], runs[chosen, np.arange(3)], rtol=1e-6)
    np.testing.assert_allclose(best["sum"], np.asarray(best["x"]).sum(1), rtol=1e-6)


def test_nan_never_beats_a_number():
    rewards = np.where(np.arange(5) == 1, np.nan, REWARDS)
    run = jax.jit(lambda key: restarts.best_of(key, table, lambda x: jnp.asarray(rewards)[x], 3))
    x = run(jax.random.key(1))
    assert_law(x, best_law(np.nan_to_num(rewards, nan=-1e9), 3))


def test_rewards_that_are_nan_are_warned_of_and_the_first_of_nothing_else_is_kept():
    key, lost = jax.random.key(2), lambda x: jnp.where(jnp.arange(B) < 5, jnp.nan, x * 1.0)
    with pytest.warns(UserWarning, match="^15 rewards were NaN; such runs are never kept") as caught:
        x = restarts.best_of(key, table, lost, 3)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(x[:5], jax.vmap(table)(jax.random.split(key, 3))[0, :5])


@pytest.mark.parametrize(
    ("reward", "n", "message"),
    [
        (lambda x: x, 0, "n must be at least 1, got 0"),
        (lambda x: x.sum(), 2, r"reward must return shape \(20000,\), one value per example, got \(\)"),
    ],
)
def test_bad_input_is_named(reward, n, message):
    with pytest.raises(ValueError, match=message):
        restarts.best_of(jax.random.key(0), table, reward, n)

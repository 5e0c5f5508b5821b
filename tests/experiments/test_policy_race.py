"""Expected steps are right by enumeration of all answers, measures are exact, and a small race writes its report."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.errors import UsageError
from esscher.experiments import policy_race, policy_racers, preference_race
from esscher.experiments.policy_racers import RACERS, View
from esscher.experiments.racers import string_logps

TASK = preference_race.problem()
MOVED = TASK.logits + 0.3 * jax.random.normal(jax.random.key(3), TASK.logits.shape)
TINY = policy_race.Config(methods=("RLOO", "GRPO (k1 in loss)"), updates=8, seeds=2, lrs=(0.1, 0.3))
BETA = 0.5


def law_of(logits):
    return jnp.exp(string_logps(TASK, logits).sum(-1))


def aim(logits, beta):
    """Reward less beta times divergence, over all strings."""
    law = law_of(logits)
    return law @ (TASK.reward - beta * jnp.log(law / law_of(TASK.logits)))


def tilt_of(beta):
    """Logits of the tilt by the chain rule, from the mass that passes through each entry of the table."""
    tilt = jax.nn.softmax(jnp.log(law_of(TASK.logits)) + TASK.reward / beta)
    mass = jnp.zeros(TASK.logits.shape).at[TASK.rows, TASK.tokens].add(jnp.where(TASK.mask, tilt[:, None], 0))
    return jnp.log(jnp.maximum(mass, 1e-30))


@functools.cache
def expectation(name):
    """Gradient of a method's loss, exactly averaged over all pairs of answers that a policy may give."""
    n = len(TASK.reward)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(n), jnp.arange(n)), -1).reshape(-1, 1, 2)

    def loss(logits, old, coefficient):
        one = lambda index: policy_racers.mean_loss(  # noqa: E731
            RACERS[name], View(TASK, logits, old, index, jax.random.key(0)), coefficient
        )
        weight = jax.lax.stop_gradient(law_of(old)[pairs].prod((1, 2)))
        return weight @ jax.vmap(one)(pairs)

    gradient = jax.jit(jax.grad(loss))
    return lambda logits, coefficient: gradient(logits, logits, jnp.asarray(coefficient))


def close(found, exact):
    assert jnp.linalg.norm(found - exact) < 1e-4 * jnp.linalg.norm(exact)


# What the expected step is, as a multiple of the exact gradient of the expected reward, by groups of two.
EXACT = {
    "REINFORCE": 1,
    "REINFORCE (value)": 1,
    "REINFORCE (group)": 1,
    "ReMax": 1,
    "RLOO": 1,
    "Dr. GRPO": 1 / 2 / 4,  # (G - 1) / G, over the longest length
    "A2C": 1,
    "IMPALA": 1,
    "GRPO (k1 in loss)": 1 / 2,  # k1 in the loss does nothing
}


@pytest.mark.parametrize("name", EXACT)
def test_expected_steps_are_the_exact_gradient_of_the_reward(name):
    exact = jax.grad(policy_race.expected_reward, argnums=1)(TASK, MOVED)
    close(-expectation(name)(MOVED, BETA), EXACT[name] * exact)


@pytest.mark.parametrize(("name", "factor"), [("RLOO (k1 in reward)", 1), ("returns with k1", 1), ("A*-PO", 2 * BETA)])
def test_a_divergence_in_the_reward_is_descended_exactly_and_to_the_tilt(name, factor):
    gradient = expectation(name)
    close(-gradient(MOVED, BETA), factor * jax.grad(aim)(MOVED, BETA))
    assert jnp.linalg.norm(gradient(tilt_of(BETA), BETA)) < 1e-4 * jnp.linalg.norm(gradient(TASK.logits, BETA))


@pytest.mark.parametrize("name", ["GRPO (k1 in loss)", "GRPO (k3 in loss)"])
def test_a_divergence_in_the_loss_has_another_optimum(name):
    gradient = expectation(name)
    assert jnp.linalg.norm(gradient(tilt_of(BETA), BETA)) > 0.05 * jnp.linalg.norm(gradient(TASK.logits, BETA))


# --- all methods ------------------------------------------------------------------------------------------------------

INDEX = policy_race.sample(TASK, TASK.logits, jax.random.uniform(jax.random.key(1), (512, 4)))


def slope_of(name):
    racer = RACERS[name]
    coefficient = jnp.asarray((racer.coefficients or (1.0,))[len(racer.coefficients) // 2])

    def loss(logits):
        return policy_racers.mean_loss(racer, View(TASK, logits, TASK.logits, INDEX, jax.random.key(0)), coefficient)

    return jax.jit(jax.vmap(jax.value_and_grad(loss)))


@pytest.mark.parametrize("name", RACERS)
def test_every_method_is_finite_and_its_first_step_raises_the_reward(name):
    """None is an exception: right answers are few enough that to make them likelier is to gain reward."""
    value, (moved, first) = slope_of(name)(jnp.stack([MOVED, TASK.logits]))
    assert np.isfinite(value).all()
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() > 1e-6
    exact = jax.grad(policy_race.expected_reward, argnums=1)(TASK, TASK.logits)
    assert -jnp.vdot(first, exact) > 0.7 * jnp.linalg.norm(first) * jnp.linalg.norm(exact)


def test_values_of_prefixes_are_exact():
    every = jnp.arange(len(TASK.reward))[None]
    rewards, discounts, values = View(TASK, TASK.logits, MOVED, every, jax.random.key(0)).steps
    np.testing.assert_allclose(rewards.sum(-1), TASK.reward, rtol=1e-6)
    np.testing.assert_array_equal(discounts.sum(-1), TASK.length - 1)
    law = np.asarray(law_of(MOVED), np.float64)
    strings, mask, reward = (np.asarray(x) for x in (TASK.tokens, TASK.mask, TASK.reward))
    for i, t in [(0, 0), (3, 1), (20, 2), (25, 3)]:
        same = (strings[:, :t] == strings[i, :t]).all(-1) & mask[:, :t].all(-1)
        expected = law[same] @ reward[same] / law[same].sum() if mask[i, t] else 0
        np.testing.assert_allclose(values[i, t], expected, rtol=1e-4)


def test_a_figure_has_ten_methods_at_most():
    families = [racer.family for racer in RACERS.values()]
    assert max(map(families.count, families)) <= 10


# --- the race ---------------------------------------------------------------------------------------------------------


def test_strings_are_drawn_by_their_law():
    grid = (jnp.arange(100_000) + 0.5) / 100_000
    share = jnp.bincount(policy_race.sample(TASK, MOVED, grid), length=len(TASK.reward)) / len(grid)
    np.testing.assert_allclose(share, law_of(MOVED), atol=2e-5)


def test_tilts_are_measured_as_such_and_are_the_frontier():
    betas = jnp.array([0.3, 0.5, 2.0])
    tilts = jax.vmap(tilt_of)(betas)[:, None, None, None]
    tilts = jnp.broadcast_to(tilts, (3, 2, 2, 8, *TASK.logits.shape))  # as in the race: so it is compiled once
    found = jax.tree.map(lambda x: x[:, -1, -1, -1], policy_race.measure(TASK, tilts, betas))
    np.testing.assert_allclose(found.own, 0, atol=1e-5)
    divergence, reward = policy_race.frontier(TASK, betas)
    np.testing.assert_allclose(found.divergence, divergence, rtol=1e-4)
    np.testing.assert_allclose(found.reward, reward, rtol=1e-5)
    law = np.asarray(jax.vmap(lambda beta: law_of(tilt_of(beta)))(betas), np.float64)
    np.testing.assert_allclose(found.entropy, -(law * np.log(np.maximum(law, 1e-30))).sum(-1), rtol=1e-4)


def test_the_cosine_is_free_of_noise():
    exact = np.asarray(jax.grad(policy_race.expected_reward, argnums=1)(TASK, TASK.logits))
    noise = 0.1 * np.random.default_rng(0).normal(size=(4096, *exact.shape))
    half = np.where(np.arange(exact.size).reshape(exact.shape) < exact.size // 2, exact, 0)
    expected = np.linalg.norm(half) / np.linalg.norm(exact)
    np.testing.assert_allclose(policy_race.gradient_cosine(TASK, noise - half), expected, atol=0.02)
    np.testing.assert_allclose(policy_race.gradient_cosine(TASK, noise + exact), -1, atol=0.02)


def test_a_learning_rate_of_zero_stays_and_others_gain():
    logits, gradients = policy_race.race(TINY, TASK, RACERS["RLOO"])
    assert logits.shape == gradients.shape == (3, 3, 2, 8, *TASK.logits.shape)
    assert (logits[:, 0] == TASK.logits).all()
    slow, fast = policy_race.measure(TASK, logits[:, 1:], jnp.ones(3)).reward[..., -1].mean(-1).T
    assert (slow > policy_race.expected_reward(TASK, TASK.logits) + 0.05).all()
    assert (fast > slow + 0.05).all()


def test_a_small_race_writes_its_report(tmp_path):
    policy_race.main(dataclasses.replace(TINY, runs=tmp_path))
    folder = tmp_path / "policy-race" / "default"
    report = (folder / "report.md").read_text()
    assert all(f"| {name} " in report for name in TINY.methods)
    assert len(list((folder / "figures").glob("*.png"))) == 2  # one for each family in the race


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("GRPO", "GPRO")}, "--methods: no GPRO; there are REINFORCE"),
        ({"updates": 1}, "--updates must be at least 2"),
        ({"lrs": (0.1, 0.0)}, "--lrs must be positive"),
        ({"lrs": ()}, "--lrs must be positive"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        policy_race.main(dataclasses.replace(TINY, runs=tmp_path, **changes))
    assert not list(tmp_path.iterdir())

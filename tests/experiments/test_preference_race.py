"""The race's problem is a law with a known tilt, its measures are exact, and a small race writes its report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.errors import UsageError
from esscher.experiments import preference_race, racers

TASK = preference_race.problem()
TINY = preference_race.Config(methods=("DPO", "SimPO", "InfoNCA"), pairs=64, seeds=2, steps=10)


def test_the_strings_are_all_that_there_are():
    law = np.exp(np.asarray(racers.string_logps(TASK, TASK.logits).sum(-1), np.float64))
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-6)
    assert len(law) == 2**4 + sum(2**t for t in range(4))  # those that never end, and those that end after t tokens
    assert TASK.length.min() == 1
    assert TASK.length.max() == 4


def tilt_of(temperature):
    """Logits by the chain rule, from the mass of the strings that pass through each row of the table; and the law."""
    log_p = racers.string_logps(TASK, TASK.logits).sum(-1)
    tilt = np.asarray(jax.nn.softmax(log_p + TASK.reward / temperature), np.float64)
    mass = np.full(TASK.logits.shape, 1e-30)
    rows, tokens, mask = (np.asarray(x) for x in (TASK.rows, TASK.tokens, TASK.mask))
    for i in range(len(tilt)):
        for row, token, kept in zip(rows[i], tokens[i], mask[i], strict=True):
            mass[row, token] += kept * tilt[i]
    return jnp.log(mass), tilt


def test_a_policy_that_is_a_tilt_is_measured_as_one():
    logits, tilt = tilt_of(0.5)
    outcome = preference_race.measure(TASK, logits, jnp.asarray(0.5))
    np.testing.assert_allclose(outcome.own, 0, atol=1e-6)
    assert outcome.nearest < 1e-3  # the grid of temperatures may step over 0.5
    np.testing.assert_allclose(outcome.reward, tilt @ np.asarray(TASK.reward), rtol=1e-5)
    np.testing.assert_allclose(outcome.accuracy, 1, atol=1e-6)
    np.testing.assert_allclose(outcome.length, 0, atol=0.02)


def test_the_reference_is_nowhere_yet():
    outcome = preference_race.measure(TASK, TASK.logits, jnp.asarray(1.0))
    np.testing.assert_allclose(outcome.divergence, 0, atol=1e-6)
    np.testing.assert_allclose(outcome.accuracy, 0.5, atol=1e-6)
    assert outcome.nearest < 1e-3


def test_labels_follow_bradley_terry():
    data = racers.draw(jax.random.key(0), TASK, 20_000)
    reward = np.asarray(TASK.reward)
    gap = reward[data.chosen] - reward[data.rejected]
    distinct = np.abs(gap) > 0.1
    expected = 1 / (1 + np.exp(-np.abs(gap[distinct])))  # that the better one is the chosen one
    share, error = (gap[distinct] > 0).mean(), np.sqrt((expected * (1 - expected)).mean() / distinct.sum())
    assert abs(share - expected.mean()) < 4 * error


def slope_of(name, n):
    """Loss and gradient of a method on `n` pairs, as a function of logits, compiled."""
    racer, data = racers.RACERS[name], racers.draw(jax.random.key(1), TASK, n)

    def loss(logits, data):
        return racer.loss(racers.View(TASK, logits, data), jnp.asarray(racer.beta)).mean()

    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda logits: compiled(logits, data)


# DiscoPOP rises where it starts; the likelihood of the other two is per token, and short strings are worse here.
DOWNHILL = ("DiscoPOP", "iterative RPO", "ORPO")


@pytest.mark.parametrize("name", racers.RACERS)
def test_every_method_is_finite_and_its_first_step_raises_the_reward(name):
    slope = slope_of(name, 2048)
    value, gradient = slope(TASK.logits + 0.1 * jax.random.normal(jax.random.key(2), TASK.logits.shape))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-6
    first = -slope(TASK.logits)[1]
    reward = jax.grad(lambda logits: jnp.exp(racers.string_logps(TASK, logits).sum(-1)) @ TASK.reward)(TASK.logits)
    cosine = jnp.vdot(first, reward) / (jnp.linalg.norm(first) * jnp.linalg.norm(reward))
    assert cosine < -0.2 if name in DOWNHILL else cosine > 0.2


@pytest.mark.parametrize("name", [name for name, racer in racers.RACERS.items() if racer.tilts])
def test_methods_that_learn_the_tilt_rest_there(name):
    """Up to the noise of drawn labels, about 2% of the slope at the reference; soft ones have none."""
    slope, (logits, _) = slope_of(name, 2**17), tilt_of(racers.RACERS[name].beta)
    assert jnp.linalg.norm(slope(logits)[1]) < 0.05 * jnp.linalg.norm(slope(TASK.logits)[1])


def test_a_figure_has_ten_methods_at_most():
    families = [racer.family for racer in racers.RACERS.values()]
    assert max(map(families.count, families)) <= 10


def test_a_small_race_writes_its_report(tmp_path):
    preference_race.main(dataclasses.replace(TINY, runs=tmp_path))
    folder = tmp_path / "preference-race" / "default"
    report = (folder / "report.md").read_text()
    assert all(f"| {name} " in report for name in TINY.methods)
    assert len(list((folder / "figures").glob("*.png"))) == 3  # one for each family in the race


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ("DPO", "DOP")}, "--methods: no DOP; there are DPO"), ({"steps": 0}, "--steps must be at least 1")],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        preference_race.main(dataclasses.replace(TINY, runs=tmp_path, **changes))
    assert not list(tmp_path.iterdir())

"""Shaped rewards and curricula against closed forms, brute force, and the optima that they are made for."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives import curricula, rewards
from esscher.objectives.advantages import group_advantage

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)


def run(function, *arrays, **modes):
    """Compiled as a whole, which takes less time than each of its operations."""
    return jax.tree.map(np.asarray, jax.jit(lambda *given: function(*given, **modes))(*arrays))


def test_process_rewards_count_for_right_answers_alone():
    form, outcome, process = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.3, np.nan, 0.6]])
    np.testing.assert_allclose(run(rewards.gated_process_reward, form, outcome, process), [2.3, 1.0, 1.6])
    slope = run(jax.grad(lambda x: rewards.gated_process_reward(form, outcome, x).sum()), process)
    np.testing.assert_allclose(slope, outcome)
    solved = np.ones((1, 3))
    shaped = run(rewards.gated_process_reward, solved, solved, np.array([[0.1, 0.2, 0.3]]))
    ranked = run(group_advantage, shaped, eps=0.0)
    np.testing.assert_allclose(ranked, [[-1, 0, 1]], atol=1e-12)
    assert not run(group_advantage, 2 * solved).any()


@pytest.mark.parametrize("p", [0.3, 0.5, 0.85])
@pytest.mark.parametrize("score", ["brier", "spherical", "log"])
def test_the_best_confidence_is_the_chance_of_being_right(score, p):
    q = np.arange(0.0, 1.001, 0.05)
    right, wrong = (run(rewards.calibrated_correctness_reward, np.full(q.shape, y), q, score=score) for y in (1.0, 0.0))
    mean = p * right + (1 - p) * wrong
    assert round(float(q[mean.argmax()]), 2) == p
    best = {
        "brier": p**2,
        "spherical": p + math.hypot(p, 1 - p),
        "log": p + p * math.log(p) + (1 - p) * math.log(1 - p),
    }[score]
    np.testing.assert_allclose(mean.max(), best, rtol=1e-12)


def test_calibrated_reward_in_the_weights_of_its_authors_and_at_its_limits():
    y, q = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.2, 0.9, 0.2])
    brier = run(rewards.calibrated_correctness_reward, y, q)
    np.testing.assert_allclose(brier, [0.99, 0.36, -0.81, -0.04])
    np.testing.assert_allclose(0.5 * y + 0.5 * (1 - (y - q) ** 2), 0.5 * (1 + brier))
    # Wrong and sure is the worst of all, -1; what lies outside of [0, 1] is cut, and what was not said is missing.
    odd = run(rewards.calibrated_correctness_reward, np.array([0, 1, 1]), np.array([1.7, -3.0, np.nan]))
    np.testing.assert_allclose(odd, [-1, 0, np.nan])
    log = run(rewards.calibrated_correctness_reward, np.array([0.0, 1.0]), np.array([1.0, 1.0]), score="log")
    np.testing.assert_allclose(log, [math.log(1e-6), 1 + math.log1p(-1e-6)], rtol=1e-9)


# --- length and format ------------------------------------------------------------------------------------------------


def test_length_reward_at_quarters_and_its_slope_at_the_peak():
    lengths = np.array([0, 25, 50, 75, 100, 150])
    np.testing.assert_allclose(run(rewards.parabolic_length_reward, lengths, 100), [0, 0.75, 1, 0.5, -1, -1])
    slope = jax.jit(jax.vmap(jax.grad(lambda n: rewards.parabolic_length_reward(n, 100.0, peak=0.8))))
    near = slope(np.array([60.0, 80 - 1e-6, 80.0, 80 + 1e-6, 90.0]))
    np.testing.assert_allclose(near, [2 * 0.25 / 80, 0, 0, 0, -4 * 0.5 / 20], atol=1e-7)
    for peak, ends in ((0.0, [1, 0.5, -1]), (1.0, [0, 0.75, 1])):
        out = run(rewards.parabolic_length_reward, np.array([0, 50, 100]), 100, peak=peak)
        np.testing.assert_allclose(out, ends, err_msg=f"peak {peak}")


def test_a_wrong_format_earns_nothing_by_length_and_still_pays_for_it():
    lengths = np.array([25, 50, 100])
    right, wrong = (run(rewards.format_length_reward, np.full(3, ok), lengths, 100) for ok in (1, 0))
    np.testing.assert_allclose(right, [1.75, 2, 0])
    np.testing.assert_allclose(wrong, [0, 0, -1])


# --- sets and rubrics -------------------------------------------------------------------------------------------------


def test_f1_of_answer_sets_by_hand():
    one = np.ones(1)
    for n in range(1, 5):  # n answers, of which one is the only right one
        match = np.eye(n)[:, -1:]
        np.testing.assert_allclose(run(rewards.answer_set_f1, match, np.ones(n), one), 2 / (n + 1))
    assert run(rewards.answer_set_f1, np.zeros((2, 3)), np.ones(2), np.ones(3)) == 0
    assert run(rewards.answer_set_f1, np.ones((2, 3)), np.zeros(2), np.ones(3)) == 0
    assert run(rewards.answer_set_f1, np.ones((2, 3)), np.ones(2), np.zeros(3)) == 0
    # One of two answers matches two of three right ones: P = 1/2, R = 2/3.
    match = np.array([[1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(run(rewards.answer_set_f1, match, np.ones(2), np.ones(3)), 4 / 7)
    np.testing.assert_allclose(run(rewards.answer_set_f1, match, np.ones(2), np.array([1, 0, 1])), 1 / 2)


def test_f1_is_symmetric_in_the_two_sets():
    match = RNG.random((6, 4, 5)) < 0.3
    given, right = RNG.random((6, 4)) < 0.7, RNG.random((6, 5)) < 0.7
    one = run(rewards.answer_set_f1, match, given, right)
    other = run(rewards.answer_set_f1, match.swapaxes(1, 2), right, given)
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert 0 < one.max() <= 1


def test_jaccard_of_sets():
    flags = np.array(list(itertools.product([0, 1], repeat=3)))
    first, second = np.repeat(flags, 8, 0), np.tile(flags, (8, 1))
    sets = [[set(np.flatnonzero(row)) for row in side] for side in (first, second)]
    expected = [len(a & b) / len(a | b) if a | b else 1 for a, b in zip(*sets, strict=True)]
    np.testing.assert_allclose(run(rewards.jaccard, first, second), expected)


def test_rubric_scores_divide_by_what_can_be_earned():
    points = np.array([[3.0, 1.0, -2.0, 5.0]] * 4)
    met = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0.5, 1, 1, 0]])
    mask = np.array([[1, 1, 1, 0]] * 4)
    np.testing.assert_allclose(run(rewards.rubric_score, met, points, mask), [1, 0.25, -0.5, 0.125])
    assert run(rewards.rubric_score, np.ones(2), np.array([-1.0, 0.0]), np.ones(2)) == 0


# --- several rewards --------------------------------------------------------------------------------------------------


def test_rewards_that_are_missing_are_left_out_of_the_sum():
    given = np.array([[1.0, np.nan, np.nan], [2.0, 3.0, np.nan]])
    out = run(rewards.combine_rewards, given, np.array([10.0, -1.0]))
    np.testing.assert_allclose(out, [8, -3, np.nan])


def test_gdpo_is_what_trl_computes():
    """Its formula, written down once more in NumPy: normalise in the group, weigh, sum, normalise in the batch."""
    given, weights = RNG.normal(size=(2, 3, 4)), np.array([1.0, 0.3])
    total = np.zeros((3, 4))
    for reward, weight in zip(given, weights, strict=True):
        total += weight * (reward - reward.mean(1, keepdims=True)) / (reward.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(run(rewards.gdpo_advantage, given, weights), expected, rtol=1e-10)


def test_gdpo_hears_a_reward_however_small_its_unit():
    given, weights = RNG.normal(size=(2, 3, 4)), np.ones(2)
    unit = np.array([1.0, 1e-3])[:, None, None]
    out, small = (run(rewards.gdpo_advantage, x, weights, eps=1e-12) for x in (given, given * unit))
    np.testing.assert_allclose(small, out, rtol=1e-6)
    summed, small = (run(group_advantage, run(rewards.combine_rewards, x, weights)) for x in (given, given * unit))
    assert np.abs(summed - small).max() > 0.1


def test_gdpo_leaves_out_what_is_missing():
    given = RNG.normal(size=(2, 2, 4))
    given[0, 0, 1] = given[1, 0, 1] = given[1, 1, 2] = np.nan
    out = run(rewards.gdpo_advantage, given, np.array([1.0, 2.0]))
    assert out[0, 1] == 0
    assert np.isfinite(out).all()
    others = np.delete(out.reshape(-1), 1)
    np.testing.assert_allclose(others.sum(), 0, atol=1e-12)
    np.testing.assert_allclose(others.std(ddof=1), 1, rtol=1e-3)
    assert not run(rewards.gdpo_advantage, np.full((2, 2, 4), np.nan), np.ones(2)).any()


# --- curricula --------------------------------------------------------------------------------------------------------


def test_mean_size_of_advantages_is_twice_the_std_of_the_group():
    for size in (2, 5):
        k = np.arange(size + 1)
        solved = (np.arange(size) < k[:, None]) * 1.0
        scaled = run(group_advantage, solved, ddof=0, eps=1e-300)
        out = run(curricula.abs_advantage_signal, scaled, k, num_categories=size + 1)
        np.testing.assert_allclose(out.signal, 2 * np.sqrt(k * (size - k)) / size, rtol=1e-12)
        centred = run(group_advantage, solved, scale="none")
        out = run(curricula.abs_advantage_signal, centred, k, num_categories=size + 1)
        np.testing.assert_allclose(out.signal, 2 * k * (size - k) / size**2, atol=1e-15)


def test_signals_are_means_over_the_samples_of_a_category():
    advantages = np.array([[1.0, -2.0], [4.0, -4.0], [9.0, np.nan], [6.0, 6.0]])
    valid = np.array([[1, 1], [1, 1], [1, 0], [1, 1]])
    out = run(curricula.abs_advantage_signal, advantages, np.array([2, 2, 0, -1]), num_categories=3, valid=valid)
    np.testing.assert_allclose(out.signal, [9, 0, 2.75])
    assert out.seen.tolist() == [True, False, True]
    values = run(curricula.curriculum_update, np.array([1.0, 7.0, 1.0]), *out, alpha=0.25)
    np.testing.assert_allclose(values, [3, 7, 1.4375])


def test_probabilities_of_categories_prefer_what_teaches_more():
    values = np.array([1.0, 3.0, 2.0])
    out = run(curricula.curriculum_probs, values, 0.5)
    np.testing.assert_allclose(out[1:] / out[0], np.exp([4, 2]), rtol=1e-12)
    np.testing.assert_allclose(out.sum(), 1)
    np.testing.assert_allclose(run(curricula.curriculum_probs, values, 1e9), np.full(3, 1 / 3), rtol=1e-8)
    some = run(curricula.curriculum_probs, values, available=np.array([1, 0, 1]))
    np.testing.assert_allclose(some, [1 / (1 + math.e), 0, math.e / (1 + math.e)])
    assert not run(curricula.curriculum_probs, values, available=np.zeros(3)).any()


def test_angles_by_means_of_unit_vectors_are_means_of_pairwise_cosines():
    hidden, question = RNG.normal(size=(3, 6, 4)), np.array([[0, 0, 1, 1, 1, 0]] * 3)
    instruction = np.array([[1, 1, 0, 0, 0, 0]] * 3)
    out = run(curricula.angle_concentration, hidden, question, instruction, w_cross=3.0)
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    cosines = unit @ unit.swapaxes(1, 2)
    np.testing.assert_allclose(
        out, cosines[:, 2:5, 2:5].mean((1, 2)) + 3 * cosines[:, 2:5, :2].mean((1, 2)), rtol=1e-12
    )


def test_angles_of_equal_and_of_orthogonal_states():
    question, instruction = np.array([[1, 1, 1, 0, 0]]), np.array([[0, 0, 0, 1, 1]])
    same = run(curricula.angle_concentration, np.full((1, 5, 3), 2.0), question, instruction)
    np.testing.assert_allclose(same, [9], rtol=1e-12)
    apart = run(curricula.angle_concentration, 5 * np.eye(5)[None], question, instruction)
    np.testing.assert_allclose(apart, [1 / 3], rtol=1e-12)
    assert run(curricula.angle_concentration, np.ones((1, 5, 3)), 0 * question, instruction)[0] == 0
    assert run(curricula.angle_concentration, np.zeros((1, 5, 3)), question, instruction)[0] == 0


def test_order_probabilities_are_gaussian_in_the_rank():
    some = np.array([1, 1, 1, 0, 1])
    out = run(curricula.gaussian_order_probs, np.arange(5.0), 1.0, sigma=2.0, available=some)
    np.testing.assert_allclose(out[[0, 2, 4]] / out[1], np.exp([-1 / 8, -1 / 8, -9 / 8]), rtol=1e-12)
    assert out[3] == 0
    np.testing.assert_allclose(out.sum(), 1)
    np.testing.assert_allclose(run(curricula.gaussian_order_probs, np.arange(5), 1.0, sigma=1e9), np.full(5, 0.2))


def test_the_mean_of_the_order_moves_by_accuracy_and_angle_and_never_back():
    out = run(curricula.gaussian_mu_update, 100.0, 0.75, 0.2)
    np.testing.assert_allclose(out, 100 + 500 * (math.tanh(0.5) + math.tanh(0.4)), rtol=1e-12)
    assert run(curricula.gaussian_mu_update, 100.0, 0.0, 0.1) == 100
    assert run(curricula.gaussian_mu_update, 100.0, 1.0, 9.0, max_step=30.0) == 130


def test_scaffolds_fall_along_the_group_and_with_the_progress():
    line = np.linspace(1, 0, 5)
    for progress, height in ((0.0, 1.0), (0.2, 0.5), (1.0, 0.0)):
        np.testing.assert_allclose(curricula.scaffold_ratio(5, progress), height * line, atol=1e-10)
    np.testing.assert_allclose(curricula.scaffold_ratio(5, 0.25, kind="power"), 0.75 * line)
    np.testing.assert_allclose(curricula.scaffold_ratio(5, 0.5, kind="power", power=3.0), line / 8)
    np.testing.assert_allclose(curricula.scaffold_ratio(1, 0.5, kind="power"), [0.5])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("score", lambda: rewards.calibrated_correctness_reward(jnp.ones(2), jnp.ones(2), score="linear")),
        ("weights", lambda: rewards.combine_rewards(jnp.ones((2, 3)), jnp.ones(3))),
        ("gold_valid", lambda: rewards.answer_set_f1(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2))),
        ("kind", lambda: curricula.scaffold_ratio(3, 0.5, kind="cosine")),
        ("group_size", lambda: curricula.scaffold_ratio(0, 0.5)),
        ("categories", lambda: curricula.abs_advantage_signal(jnp.ones((2, 3)), jnp.ones(2), 2)),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, call):
    with pytest.raises(ValueError, match=name):
        call()

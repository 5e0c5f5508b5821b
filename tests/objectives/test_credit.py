"""Credit within an answer against values by enumeration, telescoping sums, and numbers computed apart from the code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.exact import TabularLM
from esscher.objectives import credit
from esscher.objectives.advantages import discounted_suffix_sum, group_advantage

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
TOKENS = np.array([[[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 0, 0]]])
MASK = np.array([[[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]])
REWARDS = np.array([[1.0, 0.0, 1.0, 0.0]])


def run(function, *arrays, **modes):
    """Compiled as a whole, which takes less time than each of its operations."""
    return jax.tree.map(np.asarray, jax.jit(lambda *given: function(*given, **modes))(*arrays))


def by_number(rewards, groups, **modes):
    return credit.segment_group_advantage(rewards, groups, 3, **modes)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("center", ["mean", "loo", "length_weighted", "none"])
def test_groups_by_number_are_groups_by_shape_in_another_order(center, scale):
    rewards, lengths = RNG.normal(size=(3, 4)), RNG.integers(1, 9, size=(3, 4)) + 0.0
    rewards[1, 2] = np.nan
    order = RNG.permutation(12)
    modes = {"center": center, "scale": scale, "ddof": 0, "eps": 1e-3}
    given = {"lengths": lengths} if center == "length_weighted" else {}
    expected = run(group_advantage, rewards, **modes, **given).reshape(-1)[order]
    given = {name: value.reshape(-1)[order] for name, value in given.items()}
    groups = np.repeat(np.arange(3), 4)[order]
    out = run(by_number, rewards.reshape(-1)[order], groups, **modes, **given)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-15)


def test_groups_by_number_may_differ_in_size_and_strangers_count_nowhere():
    rewards = np.array([1.0, 2.0, 5.0, 0.5, 9.0, 0.0, 7.0])
    groups = np.array([1, 1, 1, 0, -1, 2, 3])  # of three, of one, of one, and two of none
    out = run(by_number, rewards, groups, center="loo", scale="none")
    np.testing.assert_allclose(out, [1 - 3.5, 2 - 3, 5 - 1.5, 0, 0, 0, 0])
    batch = run(by_number, rewards, groups, scale="batch", eps=0.0)
    spread = np.std(rewards[[0, 1, 2, 3, 5]], ddof=1)
    np.testing.assert_allclose(batch, np.array([1 - 8 / 3, 2 - 8 / 3, 5 - 8 / 3, 0, 0, 0, 0]) / spread)


# --- trees of prefixes ------------------------------------------------------------------------------------------------


def test_common_prefix_is_equality_of_prefixes():
    tokens, lengths = RNG.integers(0, 2, size=(2, 5, 4)), RNG.integers(1, 5, size=(2, 5))
    mask = np.arange(4) < lengths[..., None]
    out = run(credit.common_prefix, tokens, mask)
    for p, i, j, t in itertools.product(range(2), range(5), range(5), range(4)):
        here = min(lengths[p, i], lengths[p, j]) > t and (tokens[p, i, : t + 1] == tokens[p, j, : t + 1]).all()
        assert out[p, i, j, t] == here


def test_tempo_golden():
    out = run(credit.tempo_advantage, TOKENS, MASK, REWARDS, ddof=0, eps=0.0)
    expected = np.array([[4, 2, 6], [-2, -4, -6], [4, 5, 0], [-6, -3, -3]]) / 3
    np.testing.assert_allclose(out[0], expected, rtol=1e-12, atol=1e-14)


def test_values_of_prefixes_before_and_after_each_token():
    before, after = run(credit.prefix_tree_values, TOKENS, MASK, REWARDS)
    np.testing.assert_allclose(after[0], [[2 / 3, 1 / 2, 1], [2 / 3, 1 / 2, 0], [2 / 3, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(6 * before[0], [[3, 4, 3], [3, 4, 3], [3, 4, 0], [3, 0, 0]], rtol=1e-12)


def test_differences_along_an_answer_of_its_own_sum_to_its_centred_reward():
    tokens, rewards = RNG.integers(0, 3, size=(4, 6, 5)), RNG.normal(size=(4, 6))
    tokens[..., -1] = np.arange(6)  # so that no two are alike
    before, after = run(credit.prefix_tree_values, tokens, np.ones((4, 6, 5)), rewards)
    np.testing.assert_allclose((after - before).sum(-1), rewards - rewards.mean(-1, keepdims=True), atol=1e-14)
    tokens[..., 0] = np.arange(6)
    before, after = run(credit.prefix_tree_values, tokens, np.ones((4, 6, 5)), rewards)
    assert not (after - before)[..., 1:].any()  # all part at the first token


def test_tree_of_all_strings_as_often_as_they_are_sampled_gives_exact_advantages():
    probs = np.array([[2, 1, 1], [1, 2, 1], [1, 1, 2], [3, 1, 0]]) / 4
    with np.errstate(divide="ignore"):
        model = TabularLM(jnp.log(probs), 2)
    reward = RNG.normal(size=9)
    times = np.rint(16 * np.exp(np.asarray(model.sequence_log_probs()))).astype(int)
    codes = np.repeat(np.arange(9), times)
    assert len(codes) == 16
    tokens = np.asarray(model.sequences())[codes][None]
    out = run(credit.tempo_advantage, tokens, np.ones((1, 16, 2)), reward[codes][None], scale="none")
    root, first, whole = (np.asarray(v) for v in model.values(jnp.asarray(reward)))
    exact = np.stack([first[codes // 3] - root[0], whole[codes] - first[codes // 3]], -1)
    np.testing.assert_allclose(out[0], exact + (reward[codes] - root[0])[:, None], atol=1e-13)


def test_answers_without_a_reward_are_in_no_mean_and_get_nothing():
    rewards = REWARDS.copy()
    rewards[0, 1] = np.nan
    out = run(credit.tempo_advantage, TOKENS, MASK, rewards, ddof=0)
    rest = [0, 2, 3]
    alone = run(credit.tempo_advantage, *(x[:, rest] for x in (TOKENS, MASK, REWARDS)), ddof=0)
    np.testing.assert_allclose(out[:, rest], alone, atol=1e-14)
    assert not out[:, 1].any()
    none = run(credit.tempo_advantage, TOKENS, MASK, np.full((1, 4), np.nan))
    assert not none.any()


# --- steps ------------------------------------------------------------------------------------------------------------

ENTROPY = np.array([[0.2, 0.8, 0.5], [1.0, 0.1, 0.4]])


def test_entropy_modulation_golden():
    """The sheet's numbers, which have six digits, and `g` again from differences of answers without a bonus."""
    ones = np.ones((2, 3))
    out = run(credit.entropy_modulated_advantage, np.array([1.0, -1.0]), ENTROPY, ones)
    expected = [[1.337288, 0.706039, 0.941275], [-0.492688, -1.436484, -1.055430]]
    np.testing.assert_allclose(out, expected, atol=5.1e-7)
    first, second = (run(credit.entropy_modulated_advantage, a, ENTROPY, ones, zeta=0.0) for a in np.eye(2))
    g = np.stack([first[0] - first[1], second[1] - second[0]])
    np.testing.assert_allclose(g, [[1.315987, 0.675650, 0.942946], [0.541018, 1.470640, 1.053760]], atol=5.1e-7)


def test_entropy_modulation_weighs_by_one_on_average_over_the_steps_that_are_there():
    entropy = RNG.uniform(size=(2, 5))
    mask = np.arange(5) < np.array([[4], [2]])
    first, second = (run(credit.entropy_modulated_advantage, a, entropy, mask, zeta=0.0) for a in np.eye(2))
    # The two answers share four numbers: g_0s - c_0 and -c_0, likewise for the other.
    g = np.concatenate([first[0, :4] - first[1, 0], second[1, :2] - second[0, 0]])
    np.testing.assert_allclose(g.mean(), 1, rtol=1e-12)
    assert not first[~mask].any()


def test_entropy_modulation_without_modulation_centres_and_without_range_weighs_all_alike():
    a, mask = np.array([2.0, -1.0]), np.array([[1, 1, 1], [1, 0, 0]])
    plain = run(credit.entropy_modulated_advantage, a, ENTROPY, mask, k=0.0, zeta=0.0)
    np.testing.assert_allclose(plain, [[0.75, 0.75, 0.75], [-2.25, 0, 0]], atol=1e-15)
    flat = run(credit.entropy_modulated_advantage, a, np.full((2, 3), 0.7), mask, k=3.0, zeta=0.0)
    np.testing.assert_allclose(flat, plain, atol=1e-15)
    # Of a bonus alone, f = 1: two steps of the first answer have a next one, none of the second has.
    bonus = run(credit.entropy_modulated_advantage, 0 * a, ENTROPY, mask, k_future=0.0, zeta=0.4)
    np.testing.assert_allclose(bonus, [[0.2, 0.2, -0.2], [-0.2, 0, 0]], atol=1e-15)
    assert not run(credit.entropy_modulated_advantage, a, ENTROPY, np.zeros((2, 3))).any()


def test_monte_carlo_steps_sum_to_correctness_less_the_pass_rate():
    model = TabularLM(jax.nn.log_softmax(RNG.normal(size=(7, 2))), 3)
    correct = np.array([0.0, 1, 0, 0, 1, 1, 0, 1])
    codes = np.arange(8)
    values = np.stack([v[codes // 2 ** (3 - t)] for t, v in enumerate(model.values(correct))], -1)
    out = run(credit.mc_step_advantage, values, np.ones((8, 3)))
    p = np.exp(np.asarray(model.sequence_log_probs())) @ correct
    np.testing.assert_allclose(out.sum(-1), correct - p, atol=1e-14)
    short = run(credit.mc_step_advantage, np.array([[0.3, 0.9, np.nan]]), np.array([[1, 0]]))
    np.testing.assert_allclose(short, [[0.6, 0]])


def test_clipped_and_telescoped_process_rewards_are_those_worked_out_by_hand():
    step_rewards, mask = np.array([[0.9, 0.8, 0.85, 0.7]]), np.ones((1, 4))
    np.testing.assert_allclose(
        run(credit.delta_process_reward, step_rewards, mask), [[0.1, -0.05, 0.85, 0]], atol=1e-15
    )
    np.testing.assert_allclose(
        run(credit.clip_process_reward, step_rewards, mask, eta=0.8), [[0, 0, 0, -0.1]], atol=1e-15
    )


def test_return_of_telescoped_process_rewards_is_the_reward_of_the_step():
    step_rewards, counts = RNG.uniform(size=(5, 4)), np.arange(5)  # of no step, of one, and so on
    mask = np.arange(4) < counts[:, None]
    out = run(credit.delta_process_reward, np.where(mask, step_rewards, np.nan), mask)
    returns = run(discounted_suffix_sum, out, np.ones_like(out))
    np.testing.assert_allclose(returns, np.where(np.arange(4) < counts[:, None] - 1, step_rewards, 0), atol=1e-15)


def test_a_step_repeated_for_ever_earns_nothing():
    long, mask = np.full((1, 50), 0.9), np.ones((1, 50))
    assert long.sum() > 40
    np.testing.assert_allclose(run(credit.delta_process_reward, long, mask).sum(), 0.9, rtol=1e-12)
    assert run(credit.clip_process_reward, long, mask, eta=0.8).sum() == 0
    assert run(credit.clip_process_reward, long, mask, eta=0.95).sum() < 0


def test_progress_that_leaks_to_the_first_turn_makes_it_learn_to_be_wrong():
    """Two turns, right with probabilities p and q: the slope in p that the first turn's score function sees."""
    alpha, p, q = 10.0, 0.3, 0.6
    first, second = np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])
    chance = np.where(first, p, 1 - p) * np.where(second, q, 1 - q)
    score = np.where(first, 1 / p, -1 / (1 - p))  # d log probability / dp
    turns = np.stack(run(credit.self_correction_rewards, first, second, alpha=alpha), -1)
    for gamma, slope in ((0.0, 1.0), (1.0, 1 - alpha)):
        returns = run(discounted_suffix_sum, turns, np.full_like(turns, gamma))
        np.testing.assert_allclose(chance @ (returns[:, 0] * score), slope, rtol=1e-12)
    np.testing.assert_allclose(turns[:, 1], [1, -alpha, 1 + alpha, 0])

"""Mixtures of imitation and reinforcement: exact gradients by enumeration, limits, and numbers computed apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import tokens
from esscher.core.exact.tabular_lm import TabularLM
from esscher.objectives.advantages import group_advantage
from esscher.objectives.policy import answers, hybrids
from esscher.objectives.policy.links import importance_link, ppo_link, score_link, tapered_link
from esscher.objectives.preference import nll

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
V, T = 3, 3
THETA, HINTED = RNG.normal(size=(2, 13, V))
STRINGS = np.stack(np.unravel_index(np.arange(V**T), (V,) * T), -1)
ROWS = np.stack([np.zeros(27, int), 1 + STRINGS[:, 0], 4 + STRINGS[:, :2] @ [3, 1]], -1)
REWARD = RNG.uniform(size=27) < 0.3

# The inputs of the golden numbers.
LOGP = np.array([[-0.5, -1, -0.2, -2], [-0.7, -0.1, -1.5, -0.3], [-1.2, -0.4, -0.6, -0.9], [-0.3, -2.2, -0.8, -0.05]])
RATIO = np.array([[0.1, -0.3, 0.4, 0], [0.25, -0.1, 0.05, -0.6], [1.5, -0.2, 0.3, 0.1], [-0.4, 0.2, -0.15, 0.02]])
MASK = np.arange(4) < np.array([3, 4, 2, 3])[:, None]
ADVANTAGES = np.array([1, -1, -0.5, 2.0])
REWARDS = np.array([[1, 0], [0.5, 0]])


def token_logps(theta):
    """Of every token of every string, `[27, 3]`."""
    return jax.nn.log_softmax(theta)[ROWS, STRINGS]


def pass_rate(theta):
    return TabularLM(jax.nn.log_softmax(theta), T).values(jnp.asarray(REWARD, float))[0][0]


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=atol)


def quotient(pair):
    return pair[0] / pair[1]


def value_and_slope(function, *arguments, of=0):
    """Compiled, because a hundred small operations take longer one by one."""
    return jax.jit(jax.value_and_grad(function, of))(*arguments)


@functools.cache
def pass_rate_and_slope():
    return value_and_slope(pass_rate, THETA)


# --- demonstrations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_dft_ascends_a_power_of_the_probability(exponent):
    loss, slope = value_and_slope(lambda logp: answers.dft_loss(logp, MASK, exponent=exponent).sum(), LOGP)
    close(slope, -1.0 * MASK * np.exp(exponent * LOGP))
    close(loss, -(MASK * np.exp(exponent * LOGP) * LOGP).sum())


def test_dft_without_exponent_is_the_likelihood_however_small():
    logp = jnp.full((1, 2), -50.0)
    loss, slope = value_and_slope(lambda x: answers.dft_loss(x, logp, exponent=0.0).sum(), logp)
    close(loss, 100)
    close(slope, -np.ones((1, 2)))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_asft_pulls_the_whole_law_to_the_reference(direction):
    logits, ref = RNG.normal(size=(2, 1, 2, V))
    targets, mask = jnp.array([[2, 0]]), jnp.array([[1, 0]])
    loss = lambda x: answers.asft_loss(x, ref, targets, mask, kl_weight=0.3, direction=direction).sum()  # noqa: E731
    pi, q = (np.exp(x[0, 0]) / np.exp(x[0, 0]).sum() for x in (logits, ref))
    kl = (q * np.log(q / pi)).sum() if direction == "forward" else (pi * np.log(pi / q)).sum()
    value, slope = value_and_slope(loss, logits)
    close(value, -pi[2] * np.log(pi[2]) + 0.3 * kl)
    pull = pi - q if direction == "forward" else pi * (np.log(pi / q) - kl)
    close(slope, [[-pi[2] * (np.eye(3)[2] - pi) + 0.3 * pull, np.zeros(3)]])


# --- gates ------------------------------------------------------------------------------------------------------------


@jax.jit
def hpt(logp, demo, rewards, solved=0.0):
    return quotient(
        hybrids.hpt(
            logp, LOGP - RATIO, jnp.asarray(rewards), MASK, demo, MASK[:2], length=7.0, solved=solved, demo_weight=0.3
        )
    )


def test_hpt_is_dr_grpo_where_solved_and_imitation_where_not():
    demo = LOGP[2:]
    rows = (np.exp(RATIO) * MASK).sum(1) * [-0.5, 0.5, -0.25, 0.25] / (4 * 7)
    imitation = 0.3 * -(demo * MASK[:2]).sum(1) / [3, 4] / 2
    close(hpt(LOGP, demo, REWARDS), rows.sum())
    close(hpt(LOGP, demo, 0 * REWARDS), imitation.sum())
    close(hpt(LOGP, demo, REWARDS, solved=1.0), imitation.sum())
    half = np.array([[0, 0], [0.5, 0]])
    close(hpt(LOGP, demo, half), rows[2:].sum() + imitation[0])
    _, (by_logp, by_demo) = value_and_slope(hpt, LOGP, demo, half, of=(0, 1))
    close(by_logp[:2], 0)
    close(by_logp[2:], (np.exp(RATIO) * MASK)[2:] * [[-0.25], [0.25]] / 28)
    close(by_demo, [-0.3 / 2 / 3 * MASK[0], np.zeros(4)])


def test_gate_counts_right_answers_only():
    rewards = jnp.array([[0.0, -1.0, jnp.nan], [1.0, 0.0, jnp.nan], [1.0, 1.0, 1.0]])
    close(hybrids.performance_gate(rewards).reward, [0, 1, 1])
    close(hybrids.performance_gate(rewards, solved=1.0).demonstration, [1, 1, 0])


def test_srft_trusts_rewards_more_where_the_policy_is_uncertain():
    weights = hybrids.srft_weights(jnp.log(jnp.array([1.0, 2.0])))
    close(weights.reward, [0.1, 0.2])
    close(weights.demonstration, [0.5, 0.25])


# --- two kinds of rows ------------------------------------------------------------------------------------------------


def test_mixed_rows_have_a_link_each_and_one_denominator():
    off, old = jnp.array([0, 1, 0, 1]), np.where([[0], [1], [0], [1]], 0, LOGP - RATIO)
    arguments = (old, ADVANTAGES, MASK, off)
    loss = jax.jit(lambda logp: hybrids.mixed_policy_gradient(logp, *arguments, link=score_link))
    per_token = loss(LOGP)
    p = np.exp(LOGP)
    close(per_token[0], -RATIO[0] * MASK[0])
    close(per_token[3], -2 * p[3] / (p[3] + 0.1) * MASK[3])
    _, slope = value_and_slope(lambda logp: loss(logp).sum(), LOGP)
    close(slope[1], 0.1 * p[1] / (p[1] + 0.1) ** 2)
    close(slope[2], 0.5 * MASK[2])


def test_without_foreign_rows_the_mixture_is_clipped_dr_grpo():
    own = jnp.zeros(4)
    losses = hybrids.mixed_policy_gradient(LOGP, LOGP - RATIO, ADVANTAGES, MASK, own)
    np.testing.assert_allclose(quotient(tokens.aggregate(losses, MASK, "constant", length=4)), -0.113606, atol=5e-7)
    groups = jnp.zeros((2, 2))
    ratio, a = np.exp(RATIO), np.array([0.5, -0.5, 0.25, -0.25])[:, None]
    expected = -(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) * MASK).sum()
    close(quotient(hybrids.mixed_grpo(LOGP, LOGP - RATIO, REWARDS, MASK, groups, length=9.0)), expected / 36)
    close(
        quotient(hybrids.mixed_grpo(LOGP, LOGP - RATIO, REWARDS, MASK, groups, how="token-mean")), expected / MASK.sum()
    )


def test_ampo_with_a_right_rollout_is_dr_grpo_and_else_takes_the_best_teachers():
    rewards = jnp.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, jnp.nan, 0.0]])
    scores, lengths = jnp.array([[0.1, 0.9, 0.3], [0.5, 0.7, 0.7]]), jnp.array([[5, 5, 5], [5, 9, 8]])
    keys = jax.random.split(jax.random.key(0), 400)
    out = jax.jit(jax.vmap(lambda key: hybrids.teacher_replace(key, rewards, scores, lengths)))(keys)
    assert (out.index[:, 0] == jnp.arange(4)).all()
    assert not out.off_policy[:, 0].any()
    close(out.rewards[:, 0], np.tile(rewards[0], (400, 1)))
    taken = np.asarray(out.off_policy[:, 1])
    assert (taken.sum(-1) == 2).all()
    # The shorter of the two best, 4 + 2, and the other, 4 + 1; 1 in 3e6 that a share of 1/2 is further off than this.
    assert (np.sort(np.asarray(out.index[:, 1]), -1)[:, 2:] == [5, 6]).all()
    assert (np.abs(taken.mean(0) - 0.5) < 5.0 * 0.5 / np.sqrt(400)).all()
    close(out.rewards[:, 1][taken], 1)
    mixed = group_advantage(out.rewards[0], scale="none")[1]
    keep = ~np.isnan(out.rewards[0, 1])
    close(mixed[keep], np.asarray(out.rewards[0, 1])[keep] - np.nanmean(out.rewards[0, 1]))


def test_ampo_replaces_wrong_rollouts_only():
    rewards = jnp.array([[1.0, 0.0, 1.0]])
    out = hybrids.teacher_replace(jax.random.key(1), rewards, jnp.ones((1, 2)), jnp.ones((1, 2)), min_correct=3)
    assert out.index.tolist() == [[0, 3, 2]]
    close(out.rewards, np.ones((1, 3)))


def test_guide_rolls_again_where_all_fail():
    plain, hinted = jnp.array([[0.0, 0.0], [1.0, 0.0], [jnp.nan, 0.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0], [0.5, 1]])
    out = hybrids.hint_reroll_select(plain, hinted)
    assert out.hinted.tolist() == [True, False, True]
    close(out.rewards, [[1, 0], [1, 0], [0.5, 1]])
    assert out.off_policy.tolist() == [[True, True], [False, False], [True, True]]


def test_guide_tapers_at_a_quantile_of_the_foreign_ratios():
    ratio, zero = np.array([[-0.5, 0.1, 0.7, -1.2], [9.0, 9.0, 9.0, 9.0]]), jnp.zeros((2, 4))
    scale = hybrids.taper_scale(ratio, zero, jnp.ones((2, 4)), jnp.array([1, 0]))
    np.testing.assert_allclose(scale, 1.741178, atol=5e-7)
    f = tapered_link(scale)(ratio[0], jnp.ones(4))
    np.testing.assert_allclose(f, [0.258350, 0.388277, 0.536296, 0.147473], atol=5e-7)
    close(hybrids.taper_scale(ratio, zero, jnp.ones((2, 4)), jnp.zeros(2)), 1e-4)


def test_guide_without_taper_is_exact_for_whole_sequences_from_the_hinted_policy():
    mu, reward = np.asarray(token_logps(HINTED)), REWARD.astype(float)
    first, second = (x.ravel() for x in np.meshgrid(np.arange(27), np.arange(27), indexing="ij"))
    weight = np.exp(mu.sum(-1)[first] + mu.sum(-1)[second])
    a = group_advantage(jnp.stack([reward[first], reward[second]], -1), center="loo", scale="none")[:, 0]

    def estimate(theta, sequences):
        collect = lambda x: x.sum(-1, keepdims=True) if sequences else x  # noqa: E731
        logp, old = collect(token_logps(theta))[first], collect(mu)[first]
        losses = hybrids.mixed_policy_gradient(
            logp, old, a, jnp.ones_like(logp), jnp.ones(len(a)), off_policy_link=importance_link
        )
        return weight @ losses.sum(-1)

    _, exact = pass_rate_and_slope()
    whole, token = (value_and_slope(lambda x: estimate(x, sequences), THETA)[1] for sequences in (True, False))
    close(whole, -exact)
    assert np.abs(token + exact).max() > 1e-3


# --- prefixes ---------------------------------------------------------------------------------------------------------


def test_prefix_rft_without_prefixes_is_dr_grpo():
    out = hybrids.hybrid_prefix_advantage(REWARDS, jnp.zeros((4, 4)), MASK)
    close(out, MASK * np.array([[0.5], [-0.5], [0.25], [-0.25]]))


def test_prefix_rft_credits_the_prefix_against_plain_rollouts():
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.8], [1.0, 0.0, 0.4, 0.6], [1.0, 1.0, jnp.nan, 0.2]])
    mask = np.ones((12, 3))
    mask[3, 2] = 0
    prefix = np.zeros((12, 3))
    prefix[[3, 6, 7, 10, 11], 0] = 1
    prefix[3, 2] = 1
    out = np.asarray(hybrids.hybrid_prefix_advantage(rewards, prefix, mask))
    close(out[:3], [[2 / 3] * 3, [-1 / 3] * 3, [-1 / 3] * 3])
    close(out[3], [0.8 - 1 / 3, 0, 0])  # alone: nothing to compare its continuation with
    close(out[6:8], [[(0.4 - 0.5) / 2, -0.1, -0.1], [(0.6 - 0.5) / 2, 0.1, 0.1]])
    close(out[10:], [[0, 0, 0], [0.2 - 1.0, 0, 0]])


def test_prefix_rft_of_whole_demonstrations_is_weighted_imitation():
    out = hybrids.hybrid_prefix_advantage(jnp.array([[1.0], [0.3]]), MASK[:2], MASK[:2])
    close(out, MASK[:2] * np.array([[1.0], [0.3]]))


# --- reference answers ------------------------------------------------------------------------------------------------


def test_verifree_is_the_exact_gradient_of_the_answers_probability():
    answer = 1
    batch = np.arange(answer, 27, 3)  # the nine strings that end in the reference answer
    first, second = (batch[x.ravel()] for x in np.meshgrid(np.arange(9), np.arange(9), indexing="ij"))

    def objective(theta):
        return jnp.exp(token_logps(theta)[batch].sum(-1)).sum()

    think, final = (jnp.broadcast_to(mask, (2, 3)) for mask in (np.array([1, 1, 0]), np.array([0, 0, 1])))

    def estimate(theta):
        logp = jnp.stack([token_logps(theta)[first], token_logps(theta)[second]], 1)
        each = jax.vmap(lambda logp: quotient(answers.verifree(logp, think, final, group_size=2)))(logp)
        return jax.lax.stop_gradient(jnp.exp(logp[..., :2].sum((1, 2)))) @ each

    _, exact = value_and_slope(objective, THETA)
    close(value_and_slope(estimate, THETA)[1], -exact)
    assert np.abs(exact).max() > 0.05


def test_verifree_counts_a_missing_answer_as_improbable():
    logp, think = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([[1, 0], [1, 0]])
    final = jnp.array([[0, 1], [0, 0]])
    loss = lambda logp: quotient(answers.verifree(logp, think, final, group_size=2))  # noqa: E731
    close(value_and_slope(loss, logp)[1], [[-0.25, -0.25], [0.25, 0]])


def test_answer_scores_agree_on_single_tokens_and_part_on_more():
    logp, mask = jnp.log(jnp.array([[0.9, 0.2], [0.4, 0.5], [0.3, 0.3]])), jnp.array([[0, 1], [1, 1], [0, 0]])
    scores = {kind: answers.reference_answer_score(logp, mask, kind) for kind in ("prob", "mean_prob", "log")}
    close(scores["prob"], [0.2, 0.2, 0])
    close(scores["mean_prob"], [0.2, 0.45, 0])
    close(scores["log"], [np.log(0.2), np.log(0.2), -np.inf])
    close(answers.reference_answer_score(logp, mask, "mean_log"), [np.log(0.2), np.log(0.2) / 2, -np.inf])


def test_rlpr_rewards_the_gain_over_no_reasoning():
    reward = answers.reference_probability_reward(jnp.array([0.8, 0.2]), jnp.array([0.3, 0.4]), jnp.array([1, 1]))
    close(reward, [0.9 * 0.5 + 0.1, 0.1])


def test_rlpr_drops_prompts_of_little_spread():
    rewards = jnp.array([[0.0, 1.0], [0.5, 0.5], [0.2, 0.3], [0.4, jnp.nan]])
    std = np.array([np.sqrt(0.5), 0, np.sqrt(0.005), 0])
    keep, running = answers.std_filter(rewards, 0.2, ratio=0.5)
    assert keep.tolist() == [True, False, False, False]
    close(running, 0.99 * 0.2 + 0.01 * std.mean())
    assert answers.std_filter(rewards, 0.2, ratio=0.0)[0].tolist() == [True, False, True, False]


# --- many answers -----------------------------------------------------------------------------------------------------


def test_marginal_likelihood_of_all_right_answers_is_the_log_pass_rate():
    def loss(theta):
        return answers.marginal_likelihood_loss(token_logps(theta).sum(-1)[None], jnp.asarray(REWARD)[None])[0]

    value, slope = value_and_slope(loss, THETA)
    rate, exact = pass_rate_and_slope()
    close(value, -np.log(rate))
    close(slope, -exact / rate)


def test_marginal_likelihood_of_one_answer_of_none_and_of_small_beta():
    logp = jnp.array([[-3.0, -1.0, -2.0], [jnp.nan, -4.0, jnp.inf], [-1.0, -2.0, -3.0]])
    valid = jnp.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    loss = lambda logp, **kind: answers.marginal_likelihood_loss(logp, valid, **kind)  # noqa: E731
    close(loss(logp, beta=0.3)[1:], [4, 0])
    close(loss(logp, beta=1e-6, normalize=True), nll(logp, valid, normalize=True), atol=2e-6)
    _, slope = value_and_slope(lambda logp: loss(logp, beta=2.0).sum(), logp)
    w = np.exp(2 * np.asarray(logp[0]))
    close(slope, [-w / w.sum(), [0, -1, 0], [0, 0, 0]])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("k", lambda: hybrids.teacher_replace(jax.random.key(0), REWARDS * 1.0, jnp.ones((2, 1)), jnp.ones((2, 1)))),
        ("logp", lambda: hybrids.mixed_grpo(LOGP[:3], LOGP[:3], REWARDS, MASK[:3], REWARDS, link=ppo_link())),
        ("off_policy", lambda: hybrids.taper_scale(LOGP, LOGP, MASK, jnp.ones(3))),
        ("mask", lambda: hybrids.hybrid_prefix_advantage(REWARDS, MASK[:2], MASK[:2])),
        ("group_size", lambda: answers.verifree(jnp.asarray(LOGP), MASK, MASK, group_size=3)),
        ("kind", lambda: answers.reference_answer_score(LOGP, MASK, "sum")),
        ("demo_logp", lambda: hybrids.hpt(LOGP, LOGP, REWARDS, MASK, LOGP, MASK, length=4)),
    ],
)
def test_refusals_name_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()

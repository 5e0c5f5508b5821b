"""Weighted likelihood, regression, distillation, diffusion: exact optima, enumeration, numbers computed apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import norm

from esscher.core import schedules
from esscher.core.contracts import ReverseKernel
from esscher.core.exact.mixtures import GaussianMixture
from esscher.core.exact.tabular_lm import golden_testbed
from esscher.objectives.advantages import group_advantage
from esscher.objectives.policy import diffusion, distillation, regression
from esscher.objectives.policy.links import importance_link, score_link
from esscher.objectives.policy.losses import policy_gradient

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
LOGP = np.array([[-0.5, -1, -0.2, -2], [-0.7, -0.1, -1.5, -0.3], [-1.2, -0.4, -0.6, -0.9], [-0.3, -2.2, -0.8, -0.05]])
RATIO = np.array([[0.1, -0.3, 0.4, 0], [0.25, -0.1, 0.05, -0.6], [1.5, -0.2, 0.3, 0.1], [-0.4, 0.2, -0.15, 0.02]])
MASK = np.arange(4) < np.array([3, 4, 2, 3])[:, None]
CORRECT, RATE = jnp.array([1, 0, 1, 0]), jnp.array([0.5, 0.5, 0.25, 0.25])


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=atol)


def value_and_slope(function, *arguments, of=0):
    return jax.jit(jax.value_and_grad(function, of))(*arguments)


# --- NFT --------------------------------------------------------------------------------------------------------------


def test_nft_has_its_numbers_off_the_policy():
    def loss(logp):
        return regression.nft_loss(logp, LOGP - RATIO, CORRECT, RATE, MASK).sum()

    value, slope = value_and_slope(loss, LOGP)
    np.testing.assert_allclose(value, -1.418879, atol=5e-7)
    close(slope[0], [-0.5, -0.5, -0.5, 0])
    np.testing.assert_allclose(slope[1], [0.642013, 0.413106, 0.525636, 0.189090], atol=5e-7)


@pytest.mark.parametrize(("weight", "scale"), [("one_minus_rate", "none"), ("sqrt_odds", "group")])
def test_nft_on_the_policy_is_grpo(weight, scale):
    rewards = jnp.array([[1.0, 0, 0, 1], [1.0, 0, 0, 0], [1.0, 1, 1, 0]])
    rate = jnp.repeat(rewards.mean(-1), 4)
    logp, mask = jnp.asarray(np.tile(LOGP, (3, 1))), np.tile(MASK, (3, 1))
    _, slope = value_and_slope(
        lambda x: regression.nft_loss(x, logp, rewards.reshape(-1), rate, mask, weight=weight).sum(), logp
    )
    advantages = group_advantage(rewards, scale=scale, ddof=0, eps=0.0)
    close(slope, -advantages.reshape(-1, 1) * mask)


def test_nft_fits_the_law_of_right_answers():
    log_old, right = log_softmax(RNG.normal(size=6)), np.array([1, 0, 0, 1, 1, 0])
    p = np.exp(log_old) @ right

    def risk(logits):
        logp = jax.nn.log_softmax(logits)[:, None]
        ones = jnp.ones((6, 1))
        loss = regression.nft_loss(logp, log_old[:, None], right, p * ones[:, 0], ones, level="sequence")
        return jnp.exp(log_old) @ loss[:, 0]

    pi, q = np.exp(log_old), right - p
    close(value_and_slope(risk, log_old)[1], -pi * q)  # the slope of the pass rate in the logits, turned round
    close(value_and_slope(risk, np.where(right, log_old, -80.0))[1], 0)


def test_nft_floors_the_value_of_wrong_answers_and_not_their_slope():
    one, wrong = jnp.ones((1, 1)), jnp.zeros(1)
    for ratio, floor, denominator in ((3.0, 1.0, 1.0), (3.0, 0.5, 0.5), (0.5, 1.0, (1 - 0.125) / 0.75)):
        loss = lambda logp: regression.nft_loss(  # noqa: E731
            logp * one, 0 * one, wrong, jnp.array([0.25]), one, floor=floor, negative_weight=2.0
        ).sum()
        value, slope = value_and_slope(loss, np.log(ratio))
        close(value, -0.75 * 2 * np.log(denominator))
        close(slope, 0.75 * 2 * 0.25 * ratio / (0.75 * denominator))


def test_nft_keeps_its_floor_in_single_precision_at_large_ratios():
    one = jnp.ones((1, 1), jnp.float32)
    loss = regression.nft_loss(20 * one, 0 * one, jnp.zeros(1), 0.5 * one[0], one, floor=0.5, weight="none")
    np.testing.assert_allclose(loss, [[np.log(2)]], rtol=1e-6)


# --- weighted likelihood ----------------------------------------------------------------------------------------------


def test_weights_make_the_tilt_the_optimum_of_the_likelihood():
    model, reward = golden_testbed()
    strings, beta = np.asarray(model.sequences()), 0.5
    codes = np.stack([strings[:, :t] @ 3 ** np.arange(t)[::-1] for t in range(4)], -1)
    rows = (3 ** np.arange(4) - 1) // 2 + codes.astype(int)
    weights = regression.advantage_weights(reward, beta=beta, weight_max=None)
    sampled = jnp.exp(model.sequence_log_probs())

    def risk(table):
        logp = jax.nn.log_softmax(table)[rows, strings]
        ones = jnp.ones((81, 4))
        losses = policy_gradient(logp, logp, ones[:, 0], ones, link=score_link, weight=weights, form="score")
        return sampled @ losses.sum(-1)

    _, slope = value_and_slope(risk, model.tilt(reward, beta).table)
    close(slope, 0)
    assert np.abs(value_and_slope(risk, model.tilt(reward, -beta).table)[1]).max() > 0.1


def test_weights_of_awr_are_bounded():
    close(regression.advantage_weights(jnp.array([-2.0, 0.5, 800.0])), [np.exp(-2), np.exp(0.5), 20])
    close(regression.advantage_weights(jnp.array([1.0]), beta=0.25, weight_max=100.0), [np.exp(4)])


def test_the_dual_of_mpo_bounds_the_divergence_of_its_weights():
    q, epsilon = jnp.asarray(RNG.normal(size=7)), 0.3

    @jax.jit
    def slope(t):
        return jax.grad(lambda t: regression.tilted_samples(q, t, epsilon=epsilon).temperature_loss)(t)

    t = brentq(lambda t: float(slope(t)), 0.05, 20.0, xtol=1e-14)
    weights = regression.tilted_samples(q, t, epsilon=epsilon).weights
    close(weights, softmax(q / t))
    np.testing.assert_allclose((weights * np.log(weights * 7)).sum(), epsilon, rtol=1e-9)
    assert slope(2 * t) > 0 > slope(t / 2)


def test_mpo_leaves_out_actions_without_a_value():
    logp, q = RNG.normal(size=(2, 3, 4))
    q[0, 1], q[2] = np.nan, np.nan
    loss, (by_logp, by_t) = value_and_slope(
        lambda logp, t: regression.mpo_loss(logp, q, t, epsilon=0.2).sum(), logp, 0.7, of=(0, 1)
    )
    w = softmax(q[0, [0, 2, 3]] / 0.7)
    close(by_logp[0], -np.insert(w, 1, 0))
    close(by_logp[2], 0)
    values = [q[0, [0, 2, 3]], q[1]]
    duals = [0.7 * (0.2 + logsumexp(v / 0.7) - np.log(len(v))) for v in values] + [0.7 * 0.2]
    fits = [-w @ logp[0, [0, 2, 3]], -softmax(q[1] / 0.7) @ logp[1]]
    close(loss, sum(duals) + sum(fits))
    assert np.isfinite(by_t)


def test_vmpo_learns_from_the_better_half():
    a = np.array([[0.5, -1.0, 2.0, 9.0], [0.1, 0.3, -0.2, 1.0], [7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    out = regression.vmpo(LOGP, a, mask, 0.8, epsilon=0.1)
    best, kept = [(0, 0), (0, 2), (1, 3)], 7  # half of seven, rounded down
    w = softmax([a[i] / 0.8 for i in best])
    expected = np.zeros((4, 4))
    for i, weight in zip(best, w, strict=True):
        expected[i] = -kept * weight * LOGP[i]
    close(out.policy_loss, expected)
    close(out.temperature_loss, 0.8 * (0.1 + logsumexp([a[i] / 0.8 for i in best]) - np.log(3)))


def test_top_fraction_counts_over_the_batch_or_each_row():
    values = jnp.array([[5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0, 99.0]])
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    top = regression.top_fraction_mask
    assert top(values, mask, 0.5).tolist() == [[False] * 5, [True] * 4 + [False]]
    rows = top(values, mask, 0.4, over="sequence").tolist()
    assert rows == [[True, True, False, False, False], [True, False, False, False, False]]
    assert not top(values, mask, 0.0).any()
    assert (top(values, mask, 1.0) == mask).all()


def test_the_multiplier_grows_above_the_bound():
    kl = jnp.array([0.3, 0.05])
    loss = lambda kl, alpha: regression.kl_constraint_loss(kl, alpha, epsilon=0.1).sum()  # noqa: E731
    value, (by_kl, by_alpha) = value_and_slope(loss, kl, 2.0, of=(0, 1))
    close(value, 2 * 2.0 * 0.1)
    close(by_kl, [2, 2])
    close(by_alpha, (0.1 - 0.3) + (0.1 - 0.05))


# --- A*-PO ------------------------------------------------------------------------------------------------------------


def test_a2po_vanishes_at_the_tilt_and_nowhere_else():
    model, reward = golden_testbed()
    beta, ref = 0.5, model.sequence_log_probs()
    value = jnp.full(81, model.log_z(reward, beta) * beta)
    tilt = model.tilt(reward, beta).sequence_log_probs()
    close(regression.a2po_loss(tilt, ref, reward, value, beta=beta), 0)
    other = model.tilt(reward, 2 * beta).sequence_log_probs()
    gap = beta * (reward / (2 * beta) - model.log_z(reward, 2 * beta)) - (reward - value)
    close(regression.a2po_loss(other, ref, reward, value, beta=beta), gap**2)
    assert np.abs(gap).max() > 0.1


def test_optimal_values_lie_between_mean_and_maximum():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [2.0, jnp.nan, 1.0, jnp.nan], [jnp.nan] * 4])
    mean_exp = [(np.exp(2) + 1) / 2, (np.exp(4) + np.exp(2)) / 2]
    close(regression.optimal_value(rewards, 0.5), [*(0.5 * np.log(mean_exp)), 0])
    np.testing.assert_allclose(regression.optimal_value(rewards, 1e6), [0.5, 1.5, 0], atol=1e-6)
    np.testing.assert_allclose(regression.optimal_value(rewards, 1e-4), [1, 2, 0], atol=1e-3)


# --- distillation -----------------------------------------------------------------------------------------------------


def test_divergences_have_trls_numbers():
    teacher, student = np.log([0.7, 0.2, 0.1]), np.log([0.3, 0.3, 0.4]) + 2.0
    found = [distillation.divergence(student, teacher, kind) for kind in ("forward", "reverse")]
    found += [distillation.divergence(student, teacher, "jsd", beta=beta) for beta in (0.1, 0.5, 0.9)]
    np.testing.assert_allclose(found, [0.373386, 0.421968, 0.033460, 0.094362, 0.036678], atol=5e-7)
    for beta, limit in ((1e-7, found[0]), (1 - 1e-7, found[1])):
        jsd = distillation.divergence(student, teacher, "jsd", beta=beta)
        np.testing.assert_allclose(jsd / (beta * (1 - beta)), limit, rtol=1e-6)
    close(distillation.divergence(student, teacher, "jsd", beta=0.0), 0)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_forbidden_tokens_do_not_count_and_get_no_gradient(kind):
    student, teacher = RNG.normal(size=(2, 4))
    beta = {"beta": 0.3} if kind == "jsd" else {}
    loss = lambda x, y: distillation.divergence(x, y, kind, **beta)  # noqa: E731
    value, slope = value_and_slope(loss, student[:3], teacher[:3])
    forbidden = (np.where(np.arange(4) < 3, x, -np.inf) for x in (student, teacher))
    with_more, with_more_slope = value_and_slope(loss, *forbidden)
    close(with_more, value)
    close(with_more_slope, [*slope, 0])


def test_a_token_that_only_the_teacher_allows_makes_the_forward_divergence_infinite():
    student, teacher = jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])
    assert distillation.divergence(student, teacher, "forward") == np.inf
    close(distillation.divergence(student, teacher, "reverse"), np.log(2))
    close(distillation.divergence(student, teacher, "jsd", beta=0.5), 0.5 * (np.log(4 / 3) + 0.5 * np.log(4 / 3)))


def test_logit_distillation_weighs_soft_and_hard_targets():
    student, teacher = RNG.normal(size=(2, 2, 3))
    target = jnp.array([2, 0])
    t, s = softmax(teacher / 2, -1), log_softmax(student / 2, -1)
    soft = (t * (np.log(t) - s)).sum(-1)
    hard = -log_softmax(student, -1)[[0, 1], target]
    close(distillation.logit_distillation(student, teacher, target, alpha=0.3), 0.3 * 4 * soft + 0.7 * hard)


STRINGS = np.stack(np.unravel_index(np.arange(27), (3, 3, 3)), -1)
PREFIXES = np.stack([np.zeros(27, int), 1 + STRINGS[:, 0], 4 + STRINGS[:, :2] @ [3, 1]], -1)
STUDENT, TEACHER = RNG.normal(size=(2, 13, 3))


def of_strings(table):
    return jnp.take_along_axis(jax.nn.log_softmax(table)[PREFIXES], STRINGS[..., None], -1)[..., 0]


def test_minillm_is_the_exact_gradient_of_the_reverse_divergence():
    def exact(table):
        log_p, log_q = of_strings(table).sum(-1), of_strings(TEACHER).sum(-1)
        return jnp.exp(log_p) @ (log_p - log_q)

    def estimate(table, gamma=1.0):
        p = jax.lax.stop_gradient(jnp.exp(of_strings(table).sum(-1)))
        each = jax.vmap(
            lambda s, t, y: distillation.minillm(s[None], t[None], y[None], jnp.ones((1, 3)), gamma=gamma)[0]
        )
        return p @ each(table[PREFIXES], TEACHER[PREFIXES], STRINGS)

    _, wanted = value_and_slope(exact, STUDENT)
    close(value_and_slope(estimate, STUDENT)[1], wanted)
    assert np.abs(value_and_slope(lambda x: estimate(x, 0.5), STUDENT)[1] - wanted).max() > 1e-2


def test_minillm_divides_by_the_number_of_later_tokens():
    logits, mask = RNG.normal(size=(2, 1, 4, 3)), jnp.array([[1, 0, 1, 1]])
    y = jnp.array([[0, 9, 1, 2]])
    student, teacher = (log_softmax(x[0], -1) for x in logits)
    r = np.array([teacher[0, 0] - student[0, 0], 0, teacher[2, 1] - student[2, 1], teacher[3, 2] - student[3, 2]])
    kl = (np.exp(student) * (student - teacher)).sum(-1)
    later, logp = np.array([(r[2] + r[3]) / 2, 0, r[3], 0]), np.array([student[0, 0], 0, student[2, 1], student[3, 2]])
    numerator, denominator = distillation.minillm(*logits, y, mask, length_normalized=True)
    close(numerator, kl[[0, 2, 3]].sum() - later @ logp)
    close(denominator, 1)


@pytest.mark.parametrize(
    ("distilled", "rows"), [("all", [1, 1, 1, 1]), ("wrong", [0, 1, 1, 1]), ("unsolved", [0, 0, 1, 1])]
)
def test_kdrl_adds_the_teacher_where_it_is_asked_for(distilled, rows):
    teacher, rewards = LOGP + np.flip(RATIO), jnp.array([[1.0, 0.0], [0.0, jnp.nan]])

    def loss(logp):
        numerator, denominator = distillation.kdrl(
            logp, LOGP, teacher, rewards, MASK, beta=0.2, distilled=distilled, link=score_link
        )
        return numerator / denominator

    _, slope = value_and_slope(loss, LOGP)
    pull = 0.2 * (LOGP - teacher) * np.array(rows)[:, None]
    close(slope, (pull - np.array([[0.5], [-0.5], [0], [0]])) * MASK / MASK.sum())


# --- diffusion --------------------------------------------------------------------------------------------------------


def test_chain_logps_of_the_exact_reverse_are_bayes_rule():
    schedule = schedules.cosine()
    law = GaussianMixture(jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-1.0], [1.5]]), jnp.array([[[0.2]], [[0.4]]]))
    times, chain = jnp.array([0.9, 0.6, 0.25]), jnp.asarray(RNG.normal(size=(3, 4, 1)))
    logps = jax.jit(lambda x, t: diffusion.chain_logps(law.reverse_kernel(schedule), x, t))(chain, times)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    for k in range(2):
        a = alpha[k] / alpha[k + 1]
        forward = norm.logpdf(chain[k, :, 0], a * chain[k + 1, :, 0], np.sqrt(sigma[k] ** 2 - (a * sigma[k + 1]) ** 2))
        marginal = [law.at(schedule, times[j]).log_prob(chain[j]) for j in (k, k + 1)]
        np.testing.assert_allclose(logps[:, k], forward + marginal[1] - marginal[0], rtol=1e-8)


SHRINK, NOISE = 0.8, np.array([0.5, 0.3])


def linear_kernel(shift):
    """`x_{k+1} ~ N(0.8 x_k + shift, noise_k^2)`, with the noise as a function of time."""

    def log_prob(x_s, x, t, s):
        std = jnp.where(t > 1.5, *NOISE)
        z = (x_s - SHRINK * x - shift) / std
        return (-0.5 * z**2 - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)

    return ReverseKernel(lambda key, x, t, s: x, log_prob)


@pytest.mark.parametrize("link", [score_link, importance_link])
def test_ddpo_is_the_gradient_of_the_expected_reward(link):
    shift, start, times = 0.4, 1.3, jnp.array([2.0, 1.0, 0.0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    first, second = (x.ravel() for x in np.meshgrid(nodes, nodes, indexing="ij"))
    x1 = SHRINK * start + shift + NOISE[0] * first
    x2 = SHRINK * x1 + shift + NOISE[1] * second
    chain = jnp.stack([np.full(25, start), x1, x2])[..., None]
    reward, mask = 2.0 * x2 - x2**2, jnp.ones((25, 2))

    def loss(theta):
        old = diffusion.chain_logps(linear_kernel(shift), chain, times)
        logp = diffusion.chain_logps(linear_kernel(theta), chain, times)
        each = jax.vmap(lambda *rows: diffusion.ddpo(*(x[None] for x in rows), link=link, advantage_max=jnp.inf))
        numerator, _ = each(logp, old, jnp.asarray(reward), mask)
        return jnp.outer(weights, weights).ravel() @ numerator

    # The mean is start SHRINK^2 + shift (1 + SHRINK), and only the mean moves.
    mean = start * SHRINK**2 + shift * (1 + SHRINK)
    close(value_and_slope(loss, shift)[1], -(2.0 - 2 * mean) * (1 + SHRINK))


def test_chain_logps_may_be_means_over_coordinates():
    chain = jnp.asarray(RNG.normal(size=(3, 2, 5)))
    total, mean = (
        diffusion.chain_logps(linear_kernel(0.1), chain, jnp.array([2.0, 1.0, 0.0]), reduce=reduce)
        for reduce in ("sum", "mean")
    )
    close(total, 5 * mean)
    first = norm.logpdf(chain[1], SHRINK * chain[0] + 0.1, NOISE[0]).sum(-1)
    close(total[:, 0], first)


def test_ddpo_and_flow_grpo_clip_and_average_over_steps():
    a = jnp.array([9.0, -9.0, 1.0, 0.5])
    ratio, bounded = np.exp(RATIO), np.clip(a, -5, 5)[:, None]
    clipped = -np.minimum(ratio * bounded, np.clip(ratio, 1 - 1e-4, 1 + 1e-4) * bounded)
    numerator, denominator = diffusion.ddpo(LOGP, LOGP - RATIO, a, MASK)
    close(numerator / denominator, (clipped * MASK).sum() / MASK.sum())
    rewards = jnp.array([[1.0, 0.0], [0.2, 0.8]])
    std = np.array([[np.sqrt(0.5)], [np.sqrt(0.18)]]) + 1e-6
    a = ((rewards - 0.5) / std).reshape(-1, 1)
    clipped = -np.minimum(ratio * a, np.clip(ratio, 1 - 1e-4, 1 + 1e-4) * a)
    kl = jnp.where(MASK, RATIO**2, jnp.nan)
    numerator, denominator = diffusion.flow_grpo(LOGP, LOGP - RATIO, rewards, MASK, kl=kl, beta=0.3)
    close(numerator / denominator, ((clipped + 0.3 * RATIO**2) * MASK).sum() / MASK.sum())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda: regression.nft_loss(LOGP, LOGP, CORRECT, RATE, MASK, weight="odds")),
        ("pass_rate", lambda: regression.nft_loss(LOGP, LOGP, CORRECT, RATE[:2], MASK)),
        ("over", lambda: regression.top_fraction_mask(LOGP, MASK, 0.5, over="row")),
        ("beta", lambda: distillation.divergence(LOGP, LOGP, "forward", beta=0.5)),
        ("beta", lambda: distillation.divergence(LOGP, LOGP, "jsd")),
        ("kind", lambda: distillation.divergence(LOGP, LOGP, "js")),
        ("distilled", lambda: distillation.kdrl(LOGP, LOGP, LOGP, LOGP[:2, :2], MASK, distilled="none")),
        ("times", lambda: diffusion.chain_logps(linear_kernel(0.0), jnp.ones((3, 2, 1)), jnp.ones(2))),
    ],
)
def test_refusals_name_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()

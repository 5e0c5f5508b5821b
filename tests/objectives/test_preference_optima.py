"""What the preference methods learn: exact population optima on a softmax over five actions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq
from scipy.special import lambertw, log_softmax

from esscher.objectives.preference import anchored, pair_scores, pair_terms, pairs, reference_free

pytestmark = pytest.mark.usefixtures("x64")

K, BETA = 5, 0.7
RNG = np.random.default_rng(0)
REWARD = RNG.normal(size=K)
LOG_P = np.log(RNG.dirichlet(np.full(K, 3.0)))
LABELS = 1 / (1 + np.exp(REWARD[None, :] - REWARD[:, None]))  # [i, j]: i is preferred
PRODUCT = np.outer(*[RNG.dirichlet(np.full(K, 3.0))] * 2)
CHAIN = np.diag(RNG.uniform(0.5, 1.5, K - 1), 1)
CHAIN += CHAIN.T  # pairs of neighbours only, and so connected
WEIGHTS = {"product": PRODUCT / PRODUCT.sum(), "chain": CHAIN / CHAIN.sum()}
each_law = pytest.mark.parametrize("mu", WEIGHTS.values(), ids=WEIGHTS)

ROW, COLUMN = (x.ravel() for x in np.indices((K, K)))


TILT = log_softmax(LOG_P + REWARD / BETA)


def population(loss, mu, labels=LABELS, reference=True):
    """Expected loss, as a function of logits, over labelled pairs of the law `mu`."""
    weight = (mu * labels).ravel()

    def risk(theta):
        log_pi = jax.nn.log_softmax(theta)
        arguments = (
            (log_pi[ROW], log_pi[COLUMN], LOG_P[ROW], LOG_P[COLUMN]) if reference else (log_pi[ROW], log_pi[COLUMN])
        )
        return jnp.vdot(weight, loss(*map(jnp.asarray, arguments)))

    return risk


def assert_optimum(risk, log_pi, tolerance=1e-9):
    gradient = jax.jit(jax.grad(risk))
    assert np.isfinite(log_pi).all()
    assert np.abs(gradient(jnp.asarray(log_pi))).max() < tolerance
    elsewhere = gradient(log_pi + 0.3 * jnp.asarray(np.random.default_rng(1).normal(size=len(log_pi))))
    assert np.abs(elsewhere).max() > 1e-4


def descend(risk, theta, steps=150):
    """Logits where L-BFGS ends."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(risk)

    def step(carry, _):
        theta, state = carry
        value, gradient = value_and_grad(theta, state=state)
        updates, state = optimizer.update(gradient, state, theta, value=value, grad=gradient, value_fn=risk)
        return (optax.apply_updates(theta, updates), state), None

    (theta, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((theta, optimizer.init(theta)))
    return jax.nn.log_softmax(theta)


def learns(risk, log_pi):
    np.testing.assert_allclose(descend(risk, jnp.zeros(K)), log_pi, atol=1e-6)


# --- pairs ------------------------------------------------------------------------------------------------------------


def dpo(*pair):
    return pairs.dpo(*pair, beta=BETA)


@each_law
def test_dpo_learns_the_tilt_whatever_pairs_are_compared(mu):
    assert_optimum(population(dpo, mu), TILT)


@each_law
def test_labels_that_were_flipped(mu):
    """Smoothing clean labels is DPO on flipped ones; the unbiased loss on flipped labels is DPO on clean ones."""
    e = 0.2
    flipped = (1 - e) * LABELS + e * LABELS.T
    theta = jnp.asarray(RNG.normal(size=K))
    smooth = population(lambda *pair: pairs.cdpo(*pair, beta=BETA, flip_prob=e), mu)
    unbiased = population(lambda *pair: pairs.rdpo(*pair, beta=BETA, flip_prob=e), mu, flipped)
    np.testing.assert_allclose(smooth(theta), population(dpo, mu, flipped)(theta), rtol=1e-12)
    np.testing.assert_allclose(unbiased(theta), population(dpo, mu)(theta), rtol=1e-12)
    assert_optimum(unbiased, TILT)


def test_soft_labels_and_win_rates_learn_their_tilt():
    """A pair with a soft label stands for both orders, so its law is `mu` itself; DNO's reward is the win rate."""
    each = np.full((K, K), 1.0)
    soft = population(lambda *pair: pairs.soft_dpo(*pair, beta=BETA, label_prob=LABELS.ravel()), PRODUCT, each)
    assert_optimum(soft, TILT)
    rates = LABELS @ np.exp(LOG_P)
    given = {"win_rate_chosen": jnp.asarray(rates[ROW]), "win_rate_rejected": jnp.asarray(rates[COLUMN])}
    nash = population(lambda *pair: pairs.dno(*pair, beta=BETA, **given), PRODUCT, each)
    assert_optimum(nash, log_softmax(LOG_P + rates / BETA))


def test_margins_move_the_tilt_by_what_they_say():
    """With margins V_i - V_j and labels of rewards r, the optimum is the tilt of r + V; a length is -V / alpha."""
    value = np.array([0.3, -0.4, 0.0, 1.1, -0.2])
    given = {"value_chosen": jnp.asarray(value[ROW]), "value_rejected": jnp.asarray(value[COLUMN])}
    steps = population(lambda *pair: pairs.step_apo(*pair, beta=BETA, **given), PRODUCT)
    assert_optimum(steps, log_softmax(LOG_P + (REWARD + value) / BETA))
    lengths = np.array([3, 9, 4, 7, 12])
    given = {"len_chosen": jnp.asarray(lengths[ROW]), "len_rejected": jnp.asarray(lengths[COLUMN])}
    short = population(lambda *pair: pairs.r_dpo(*pair, beta=BETA, alpha=0.05, **given), PRODUCT)
    assert_optimum(short, log_softmax(LOG_P + (REWARD - 0.05 * lengths) / BETA))


def test_ipo_learns_the_tilt_of_win_rates_under_a_product_law():
    ipo = population(lambda *pair: pairs.ipo(*pair, beta=BETA, normalize=False), WEIGHTS["product"])
    opponent = WEIGHTS["product"].sum(0)
    log_pi = log_softmax(LOG_P + LABELS @ opponent / BETA)
    assert_optimum(ipo, log_pi)
    learns(ipo, log_pi)


def test_ipo_learns_least_squares_under_any_law():
    """Flow balance: sum_j mu_ij (h_i - h_j - (P_ij - 1/2) / tau) = 0 for each i, a graph Laplacian."""
    mu = CHAIN / CHAIN.sum()
    ipo = population(lambda *pair: pairs.ipo(*pair, beta=BETA, normalize=False), mu)
    laplacian = np.diag(mu.sum(1)) - mu
    h = np.linalg.lstsq(laplacian, (mu * (LABELS - 0.5) / BETA).sum(1), rcond=None)[0]
    assert_optimum(ipo, log_softmax(LOG_P + h))


def test_inpo_takes_a_step_of_mirror_descent():
    """Pairs are the previous policy's; any other preference would do: here a general, cyclic one."""
    cyclic = np.clip(0.5 + 0.45 * np.sin(2 * np.pi * (ROW - COLUMN) / K).reshape(K, K), 0, 1)
    previous = log_softmax(RNG.normal(size=K))
    eta, ratio = 0.3, 0.4
    given = {"previous_chosen": jnp.asarray(previous[ROW]), "previous_rejected": jnp.asarray(previous[COLUMN])}
    law = np.outer(np.exp(previous), np.exp(previous))
    step = population(lambda *pair: pair_scores.inpo(*pair, **given, eta=eta, ratio=ratio), law, cyclic)
    wins = cyclic @ np.exp(previous)
    assert_optimum(step, log_softmax(ratio * LOG_P + (1 - ratio) * previous + wins / eta))


def penalised(inverse_slope, low):
    """`p u((r - lam) / beta)` with the `lam` that normalises it; `u` inverts the divergence's `f'`."""
    excess = lambda lam: np.sum(np.exp(LOG_P) * inverse_slope((REWARD - lam) / BETA)) - 1  # noqa: E731
    lam = brentq(excess, low + 1e-9, low + 200.0, xtol=1e-15)
    return LOG_P + np.log(inverse_slope((REWARD - lam) / BETA))


PAPER_ALPHA = 0.5  # TRL's is one minus it
DIVERGENCES = {
    "forward_kl": ({}, lambda x: -1 / x, REWARD.max()),
    "js": ({}, lambda x: np.exp(x) / (2 - np.exp(x)), REWARD.max() - BETA * np.log(2)),
    "alpha": (
        {"alpha": 1 - PAPER_ALPHA},
        lambda x: (1 - PAPER_ALPHA * x) ** (-1 / PAPER_ALPHA),
        REWARD.max() - BETA / PAPER_ALPHA,
    ),
    "chi2_kl": ({}, lambda x: lambertw(np.exp(x)).real, -50.0),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_f_dpo_learns_the_best_policy_under_its_divergence(kind):
    given, inverse_slope, low = DIVERGENCES[kind]
    log_pi = penalised(inverse_slope, low)
    risk = population(lambda *pair: pair_scores.f_dpo(*pair, kind=kind, beta=BETA, **given), PRODUCT)
    assert_optimum(risk, log_pi)
    learns(risk, log_pi)


def test_chi_po_maximises_reward_less_both_its_penalties():
    log_pi = penalised(*DIVERGENCES["chi2_kl"][1:])
    assert_optimum(population(lambda *pair: pair_scores.chi_po(*pair, beta=BETA, clip=20.0), PRODUCT), log_pi)

    def cost(theta):
        log_pi = jax.nn.log_softmax(theta)
        pi, ratio = jnp.exp(log_pi), jnp.exp(log_pi - LOG_P)
        return BETA * (jnp.vdot(pi, log_pi - LOG_P) + jnp.vdot(jnp.exp(LOG_P), (ratio - 1) ** 2) / 2) - pi @ REWARD

    assert_optimum(cost, log_pi)
    clipped = jax.grad(lambda x: pair_scores.chi_po(x, x - 9, x, x, beta=1.0, clip=2.0).sum())(jnp.zeros(1))
    assert clipped == 0


def test_dpo_descends_to_the_tilt():
    learns(population(dpo, CHAIN / CHAIN.sum()), TILT)


def test_self_play_rests_where_the_policy_is_the_data():
    """SPIN: chosen from the data, rejected from the reference, which is the last policy."""
    data = np.exp(LOG_P)
    assert_optimum(population(dpo, np.outer(data, data), np.ones((K, K))), LOG_P)


def test_betas_that_differ_by_pair_move_the_optimum_off_the_tilt():
    betas = jnp.asarray(BETA * (1 + 0.5 * np.abs(REWARD[ROW] - REWARD[COLUMN])))
    risk = population(lambda *pair: pair_terms.mm_dpo(*pair, beta=betas, nll=0.0), PRODUCT)
    assert np.abs(jax.grad(risk)(jnp.asarray(TILT))).max() > 1e-3


def test_the_incentive_of_vpo_is_the_optimal_value_of_centred_rewards():
    calibration = np.random.default_rng(4).dirichlet(np.ones(K))
    centred = REWARD - calibration @ REWARD
    tilt = jnp.asarray(log_softmax(LOG_P + centred / BETA))
    given = {"beta": BETA, "alpha": 1.0, "attitude": "optimistic"}
    zero = jnp.zeros(K)
    loss = pair_terms.vpo(*[zero] * 4, policy_calibration=tilt, ref_calibration=jnp.asarray(LOG_P), **given)
    value = BETA * np.log(np.sum(np.exp(LOG_P + centred / BETA)))
    np.testing.assert_allclose(-calibration @ (loss - np.log(2)), value, rtol=1e-12)


SIMPO = {"beta": 2.0, "gamma": 0.0}


def test_simpo_learns_a_tilt_of_the_uniform_law_that_depends_on_length():
    """log pi_i = (L_i / beta) (r_i + c), where c normalises; at equal lengths the tilt at temperature beta / L."""
    for lengths in (np.array([4, 9, 5, 7, 12]), np.full(K, 6)):
        given = {"len_chosen": jnp.asarray(lengths[ROW]), "len_rejected": jnp.asarray(lengths[COLUMN])}
        simpo = lambda *pair, given=given: reference_free.simpo(*pair, **given, **SIMPO)  # noqa: E731
        excess = lambda c, lengths=lengths: np.sum(np.exp(lengths / 2 * (REWARD + c))) - 1  # noqa: E731
        log_pi = lengths / 2 * (REWARD + brentq(excess, -50, 10, xtol=1e-15))
        risk = population(simpo, PRODUCT, reference=False)
        assert_optimum(risk, log_pi)
        learns(risk, log_pi)
    np.testing.assert_allclose(log_pi, log_softmax(6 * REWARD / 2), rtol=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(0.6, 0.642688), (0.9, 2.906695)])
def test_simpo_with_a_margin_exaggerates(p, expected):
    """Where a pair's two orders, of probabilities p and 1 - p, balance; without margin it would be logit p."""

    def risk(x):
        one, zero = jnp.ones(1), jnp.zeros(1)
        simpo = lambda *pair: reference_free.simpo(*pair, len_chosen=one, len_rejected=one, beta=1.0, gamma=0.8)  # noqa: E731
        return (p * simpo(x[None], zero) + (1 - p) * simpo(zero, x[None])).sum()

    a = np.exp(-0.8)
    root = np.sqrt((2 * p - 1) ** 2 + 4 * a**2 * p * (1 - p))
    x = np.log(((2 * p - 1) + root) / (2 * a * (1 - p)))
    np.testing.assert_allclose(x, expected, atol=1e-6)
    assert abs(jax.grad(risk)(jnp.asarray(x))) < 1e-12


def test_optimal_margin_of_one_pair_by_method():
    def slope(method, z, p=1.0, **given):
        def risk(z):
            x, zero = z[None], jnp.zeros(1)
            return (p * method(x, zero, zero, zero, **given) + (1 - p) * method(zero, x, zero, zero, **given)).sum()

        return float(jax.grad(risk)(jnp.asarray(z)))

    e = 0.03
    z = np.log((1 - e) / e)
    for method in (pairs.cdpo, pairs.exo_pair):
        assert abs(slope(method, z, beta=1.0, flip_prob=e)) < 1e-12
    x, s = jnp.asarray([z]), jax.nn.sigmoid(0.4)
    np.testing.assert_allclose(pairs.exo_pair(x, 0 * x, 0 * x, 0 * x, beta=1.0, flip_prob=e), 0, atol=1e-12)
    np.testing.assert_allclose(slope(pairs.exo_pair, 0.4, beta=1.0, flip_prob=e), s * (1 - s) * (0.4 - z))
    assert slope(pairs.hinge, 0.99, p=0.6, beta=1.0) < 0 < slope(pairs.hinge, 1.01, p=0.6, beta=1.0)
    assert slope(pairs.dpo, 30.0, beta=1.0) < 0  # to infinity
    np.testing.assert_allclose(slope(pairs.rdpo, 0.4, beta=1.0, flip_prob=e), s - 1 - e / (1 - 2 * e))


def test_contrastive_preference_learns_the_softmax_of_advantages():
    """One state and segments of one step: labels compare advantages, and the reference is not there."""

    def loss(chosen, rejected):
        one = jnp.ones((K * K, 1))
        segments, masks = (chosen[:, None], rejected[:, None]), {"chosen_mask": one, "rejected_mask": one}
        return pair_scores.contrastive_preference(*segments, **masks, beta=BETA, bias=1.0)

    assert_optimum(population(loss, PRODUCT, reference=False), log_softmax(REWARD / BETA))


# --- single responses -------------------------------------------------------------------------------------------------

GOOD = 1 / (1 + np.exp(-REWARD))


def single(method, good=GOOD, log_p=LOG_P, nu=None, **given):
    nu = np.full(len(good), 1 / len(good)) if nu is None else nu
    loss = lambda theta: method(  # noqa: E731
        jax.nn.log_softmax(theta), jnp.asarray(log_p), jnp.asarray(good), **given
    )
    return lambda theta: jnp.vdot(nu, loss(theta))


def test_bco_learns_the_tilt_only_with_the_right_baseline():
    value = BETA * np.log(np.sum(np.exp(LOG_P + REWARD / BETA)))
    odds = log_softmax(LOG_P + np.log(GOOD / (1 - GOOD)) / BETA)
    np.testing.assert_allclose(odds, TILT)
    assert_optimum(single(anchored.bco, beta=BETA, baseline=-value), TILT)
    assert np.abs(jax.grad(single(anchored.bco, beta=BETA, baseline=0.0))(TILT)).max() > 1e-4


def test_kto_learns_a_majority_vote_and_no_tilt():
    good, log_p = np.array([0.9, 0.6, 0.4, 0.1]), np.log(np.full(4, 0.25))
    risk = single(anchored.kto, good, log_p, beta=0.5, kl_baseline=0.0)
    tilt = log_softmax(log_p + np.log(good / (1 - good)) / 0.5)
    np.testing.assert_allclose(np.exp(tilt), [0.968, 0.027, 0.005, 0.0001], atol=6e-4)
    gradient = jax.grad(risk)
    assert np.abs(gradient(tilt)).max() > 1e-3

    # By the closed form: sum of nu w beta s (1 - s) over actions, less its mean under the policy.
    h, weight = tilt - log_p, 2 * good - 1
    s = 1 / (1 + np.exp(-0.5 * h))
    g = -0.25 * weight * 0.5 * s * (1 - s)
    np.testing.assert_allclose(gradient(tilt), g - np.exp(tilt) * g.sum(), atol=1e-12)

    # On the two with a majority the optimum is interior; the others are starved, and want it so.
    majority = lambda x: risk(jnp.stack([x, 0.0, -60.0, -60.0]))  # noqa: E731
    x = brentq(jax.jit(jax.grad(majority)), -3.0, 5.0)
    np.testing.assert_allclose(1 / (1 + np.exp(-x)), 0.787, atol=5e-4)
    assert majority(x) < risk(tilt)
    assert np.all(gradient(jnp.array([x, 0.0, -6.0, -6.0]))[2:] > 0)  # descent lowers them further


def test_kto_and_its_label_noise():
    """Flips at a rate e scale a symmetric loss by 1 - 2e and shift it: the optimum stays."""
    theta, e = jnp.asarray(RNG.normal(size=K)), 0.2
    clean, noisy = (
        single(anchored.kto, good, beta=BETA, kl_baseline=0.3) for good in (GOOD, (1 - e) * GOOD + e * (1 - GOOD))
    )
    np.testing.assert_allclose(noisy(theta), (1 - 2 * e) * clean(theta) + e, rtol=1e-12)


def test_nca_ends_at_the_log_share_of_winners():
    """Scores without a constraint; W winners' law, m the mean of winners' and losers'."""
    joint = PRODUCT * LABELS
    joint = joint / joint.sum()
    winners, mean = joint.sum(1), (joint.sum(1) + joint.sum(0)) / 2

    def risk(h):
        zero = jnp.zeros(K * K)
        return jnp.vdot(joint.ravel(), anchored.nca_pair(h[ROW], h[COLUMN], zero, zero, beta=BETA))

    assert_optimum(risk, np.log(winners / mean) / BETA)

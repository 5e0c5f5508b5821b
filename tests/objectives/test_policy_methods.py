"""What the policy methods are to each other, and what their gradients are in expectation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from esscher.core import tokens
from esscher.core.exact import TabularLM
from esscher.objectives import advantages as adv
from esscher.objectives.policy import group_methods, links, losses, methods

pytestmark = pytest.mark.usefixtures("x64")


def divided(fraction):
    return fraction[0] / fraction[1]


# --- identities of losses ---------------------------------------------------------------------------------------------


def random_rows(seed, rows=6, width=5, spread=0.6):
    rng = np.random.default_rng(seed)
    logp, ratio = -rng.exponential(size=(rows, width)), spread * rng.normal(size=(rows, width))
    mask = np.arange(width) < rng.integers(1, width + 1, rows)[:, None]
    return (jnp.asarray(x) for x in (logp, logp - ratio, rng.normal(size=rows), mask))


def test_dual_clip_is_trl_s_delta():
    """TRL bounds the ratio of the branch that is not clipped."""
    logp, old, a, _ = random_rows(0, spread=1.0)
    ratio, a = jnp.exp(logp - old), a[:, None]
    expected = -jnp.minimum(jnp.minimum(ratio, 1.4) * a, jnp.clip(ratio, 0.8, 1.28) * a)
    actual = methods.ppo(logp, old, a[:, 0], jnp.ones_like(logp), low=0.2, high=0.28, dual=1.4)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert (actual != methods.ppo(logp, old, a[:, 0], jnp.ones_like(logp), high=0.28)).any()


def test_token_form_of_gspo_is_the_form_of_the_sequence():
    logp, old, a, mask = random_rows(1, spread=0.1)

    def loss(logp, level):
        out = losses.policy_gradient(logp, old, a, mask, level=level, link=links.ppo_link(0.03, 0.04))
        return divided(tokens.aggregate(out, mask, "seq-mean-token-mean"))

    (first, slope), (second, other) = (
        jax.value_and_grad(loss)(logp, level) for level in ("geometric", "geometric_token")
    )
    np.testing.assert_allclose(first, second, rtol=1e-13)
    np.testing.assert_allclose(slope, other, atol=1e-15)
    idle = ~np.asarray(slope).any(-1)
    assert idle.any()  # some sequences are clipped, others not
    assert not idle.all()


LINKS = {
    "score": links.score_link,
    "importance": links.importance_link,
    "ppo": links.ppo_link(0.2, 0.3, 3.0),
    "clipped weight": links.clipped_weight_link(0.8, 1.28),
    "truncated": links.clipped_weight_link(),
    "signed weight": links.signed_weight_link((1.0, 1.0), (0.0, 1.0)),
    "soft gate": links.soft_gate_link(),
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_slope_at_the_policy_itself_is_the_advantage(link):
    a = jnp.array([2.0, 0.3, -0.1, -4])
    np.testing.assert_allclose(links.link_slope(link, jnp.zeros(4), a), a, rtol=1e-14)


def test_slopes_away_from_the_policy():
    l, a = jnp.log(jnp.array([0.5, 0.9, 1.2, 3.5])), jnp.array([[1.0], [-2.0]])  # noqa: E741
    ratio = np.array([0.5, 0.9, 1.2, 3.5])
    slope = lambda link: links.link_slope(link, jnp.broadcast_to(l, (2, 4)), a)  # noqa: E731
    np.testing.assert_allclose(slope(links.ppo_link(0.2, 0.1, 3.0)), [ratio * [1, 1, 0, 0], -2 * ratio * [0, 1, 1, 0]])
    np.testing.assert_allclose(slope(links.clipped_weight_link(0.8, 1.28)), np.clip(ratio, 0.8, 1.28) * a)
    signed = links.signed_weight_link((1.0, 1.0), (0.0, 1.0))
    np.testing.assert_allclose(slope(signed), [np.ones(4), -2 * np.minimum(ratio, 1)])
    s = np.stack([scipy.special.expit(tau * (ratio - 1)) for tau in (1.0, 1.05)])
    np.testing.assert_allclose(slope(links.soft_gate_link()), 4 * s * (1 - s) * ratio * a)
    np.testing.assert_allclose(slope(links.tapered_link(0.1)), a * 0.1 * ratio / (ratio + 0.1) ** 2)


def test_topr_and_vespo_weigh_by_the_sequence():
    logp, old, a, mask = random_rows(2)
    total = np.where(mask, logp - old, 0).sum(-1)
    slope = lambda method: np.asarray(jax.jit(jax.grad(lambda x: method(x, old, a, mask).sum()))(logp))  # noqa: E731
    topr = np.where(a >= 0, 1, np.minimum(np.exp(total), 1)) * a
    np.testing.assert_allclose(slope(methods.topr), -topr[:, None] * mask, rtol=1e-12)
    k, lam = np.where(a >= 0, 2, 3), np.where(a >= 0, 3, 2)
    weight = np.exp(lam) * np.exp(total) ** k * np.exp(-lam * np.exp(total)) * a
    np.testing.assert_allclose(slope(methods.vespo), -weight[:, None] * mask, rtol=1e-10)


def test_gmpo_has_one_coefficient_for_the_tokens_that_it_does_not_clip():
    logp, old, a, mask = random_rows(3)
    l, mask, sign = np.asarray(logp - old), np.asarray(mask), np.asarray(a)[:, None]  # noqa: E741
    free = np.where(sign > 0, l < 0.4, l > -0.4) & mask
    clipped = np.where(mask, np.where(sign > 0, np.minimum(l, 0.4), np.maximum(l, -0.4)), 0).sum(-1)
    coefficient = np.exp(clipped / mask.sum(-1)) * np.asarray(a)
    actual = jax.grad(lambda x: tokens.aggregate(methods.gmpo(x, old, a, mask), mask, "seq-mean-token-mean")[0])(logp)
    np.testing.assert_allclose(actual, -(coefficient / mask.sum(-1))[:, None] * free, rtol=1e-12)
    assert (free != mask).any()


def test_covariance_chooses_tokens():
    logp, old, _, mask = random_rows(4, rows=8, spread=0.05)
    a = jnp.asarray(np.random.default_rng(5).normal(size=8))
    kept = np.asarray(mask)
    x, y = np.asarray(logp), np.broadcast_to(np.asarray(a)[:, None], kept.shape)
    covariance = (x - x[kept].mean()) * (y - y[kept].mean())
    free = methods.kl_cov(logp, old, a, mask, fraction=0.0, coefficient=0.0)
    np.testing.assert_allclose(free, np.where(kept, -np.exp(logp - old) * y, 0), rtol=1e-12)
    added = np.asarray(methods.kl_cov(logp, old, a, mask, fraction=0.2, coefficient=3.0) - free)
    count = int(0.2 * kept.sum())
    largest = kept & (covariance >= np.sort(covariance[kept])[-count])
    np.testing.assert_allclose(added, np.where(largest, 3 * np.abs(logp - old), 0), atol=1e-12)
    bounds, base = (0.1, 1.0), np.asarray(methods.ppo(logp, old, a, mask, low=0.03, high=0.03))
    given = {"low": 0.03, "high": 0.03, "bounds": bounds}
    out = np.asarray(methods.clip_cov(jax.random.key(0), logp, old, a, mask, **given, fraction=0.1))
    candidates = kept & (base == np.asarray(free)) & (covariance > bounds[0]) & (covariance < bounds[1])
    zeroed = (out == 0) & (base != 0)
    assert zeroed.sum() == int(0.1 * kept.sum()) < candidates.sum()
    assert not (zeroed & ~candidates).any()
    np.testing.assert_array_equal(out[~zeroed], base[~zeroed])
    every = np.asarray(methods.clip_cov(jax.random.key(0), logp, old, a, mask, **given, fraction=1.0))
    np.testing.assert_array_equal((every == 0) & (base != 0), candidates)


def test_imitation_is_of_what_was_good():
    logp, _, a, mask = random_rows(6)
    good = np.asarray(mask) & (np.asarray(a) > 0)[:, None]
    total, count = methods.positive_nll(logp, a, mask)
    np.testing.assert_allclose([total, count], [-np.asarray(logp)[good].sum(), good.sum()])
    value, slope = jax.value_and_grad(lambda x: methods.positive_nll(x, -jnp.abs(a), mask)[0])(logp)
    assert value == 0
    assert not slope.any()


def test_penalties_and_lengths():
    lengths = jnp.array([10, 16384, 18432, 20480, 30000])
    np.testing.assert_allclose(group_methods.overlong_penalty(lengths), [0, 0, -0.5, -1, -1])
    np.testing.assert_allclose(group_methods.overlong_penalty(lengths, coefficient=0.3)[2], -0.15)
    mask = jnp.arange(100) < jnp.array([0, 1, 20, 40, 100])[:, None]
    np.testing.assert_allclose(methods.length_adaptive_lambda(mask), [0, 0, 0, 0.5, 0.8])
    rewards = jnp.array([[1.0, 1, 1], [1, 0, 1], [jnp.nan, 1, 1], [jnp.nan, 1, 0], [jnp.nan] * 3])
    np.testing.assert_array_equal(group_methods.keep_mixed_groups(rewards), [False, True, False, True, False])


# --- Beta normalisation -----------------------------------------------------------------------------------------------


def test_beta_normalization():
    rewards = jnp.asarray(np.random.default_rng(7).integers(0, 2, (6, 8)).astype(float))
    p = np.asarray(rewards).mean(-1, keepdims=True)
    shaped = jax.jit(lambda alpha, beta: group_methods.beta_normalized_advantage(rewards, shape=(alpha, beta)))
    fit = jax.jit(group_methods.beta_normalized_advantage)
    out = shaped(1.7, 1.2)
    np.testing.assert_allclose(out, (rewards - p) / scipy.stats.beta.pdf(p, 1.7, 1.2), rtol=1e-10)
    plain = shaped(1.0, 1.0)
    np.testing.assert_allclose(plain, rewards - p, atol=1e-14)
    root = shaped(1.5, 1.5)
    grpo = adv.group_advantage(rewards, ddof=0, eps=0.0)
    np.testing.assert_allclose(root, grpo * np.pi / 8, rtol=1e-10)
    m, variance = p.mean(), p.var()
    a, b = (m * (1 - m) / variance - 1) * np.array([m, 1 - m])
    fitted = shaped(1 + a / 3, 1 + b / 3)
    np.testing.assert_allclose(fit(rewards), fitted, rtol=1e-10)
    np.testing.assert_allclose((scipy.stats.beta.mean(a, b), scipy.stats.beta.var(a, b)), (m, variance))
    alike = jnp.array([[1.0, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(fit(alike)[0], [2 / 3, -1 / 3, -1 / 3])
    assert not fit(jnp.array([[1.0, 1], [0, 0], [jnp.nan] * 2])).any()


def test_fitted_shape_has_the_least_variance():
    """`E[p (1 - p) / f^2]` under the fitted `Beta(a, b)`, by its moments, is least at the shape that is used."""
    rewards = jnp.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    p = np.asarray(rewards).mean(1)
    a, b = (p.mean() * (1 - p.mean()) / p.var() - 1) * np.array([p.mean(), 1 - p.mean()])

    def log_variance(shape):
        alpha, beta = shape
        return scipy.special.betaln(a + 3 - 2 * alpha, b + 3 - 2 * beta) + 2 * scipy.special.betaln(alpha, beta)

    best = scipy.optimize.minimize(
        log_variance, (1.2, 1.2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13}
    )
    expected = group_methods.beta_normalized_advantage(rewards, shape=tuple(best.x))
    np.testing.assert_allclose(group_methods.beta_normalized_advantage(rewards), expected, rtol=1e-4)


# --- expectations over all samples of a policy that is a table --------------------------------------------------------

V, T = 2, 3
RIGHT = np.array([1, 0, 0, 1, 0, 0, 0, 1.0])


def table(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=((V**T - 1) // (V - 1), V)))


def token_logps(logits):
    """Log-probabilities of each token of each string, `[V^T, T]`, differentiable in the table's logits."""
    rows = jax.nn.log_softmax(logits)
    strings = np.indices((V,) * T).reshape(T, -1).T
    prefixes = np.stack([(V**t - 1) // (V - 1) + strings[:, :t] @ V ** np.arange(t)[::-1] for t in range(T)], -1)
    return rows[prefixes.astype(int), strings]


def pass_rate(logits):
    model = TabularLM(jax.nn.log_softmax(logits), T)
    return jnp.exp(model.sequence_log_probs()) @ RIGHT


def expected(method, logits, group):
    """The expected gradient of a method on groups drawn from the policy itself."""
    logp = token_logps(logits)
    old = jax.lax.stop_gradient(logp)
    combos = np.array(list(itertools.product(range(V**T), repeat=group)))
    weights = jnp.exp(old.sum(-1)[combos].sum(-1))

    def loss(logits):
        logp = token_logps(logits)
        one = lambda rows: divided(method(jnp.asarray(RIGHT)[rows][None], logp[rows], old[rows]))  # noqa: E731
        return weights @ jax.vmap(one)(jnp.asarray(combos))

    return jax.jit(jax.grad(loss))(logits)


ONES = jnp.ones((2, T), bool)
UNBIASED = {
    "rloo": (lambda r, x, old: group_methods.rloo(r, x, old, ONES), 2, 1),
    "dr_grpo": (lambda r, x, old: group_methods.dr_grpo(r, x, old, ONES, length=5.0), 2, 1 / 10),
    "grpo of two, up to eps": (lambda r, x, old: group_methods.grpo(r, x, old, ONES, eps=1e-12), 2, 1 / np.sqrt(2) / T),
    "remax": (lambda r, x, old: group_methods.remax(r, jnp.full(1, 0.3), x, ONES[:1]), 1, 1),
    "psr": (lambda r, x, old: signed(r, x, 1.0, 0.0), 1, 1),
    "nsr": (lambda r, x, old: signed(r, x, 0.0, 1.0), 1, 1),
    "w-reinforce": (lambda r, x, old: signed(r, x, 0.1, 1.0), 1, 1.1),
}


def signed(rewards, logp, positive, negative):
    a = methods.signed_advantage(rewards[0], positive=positive, negative=negative)
    return tokens.aggregate(methods.reinforce(logp, a, ONES[:1]), ONES[:1], "seq-mean-token-sum")


@pytest.mark.parametrize(("method", "group", "factor"), UNBIASED.values(), ids=UNBIASED)
def test_expected_gradient_is_that_of_the_pass_rate(method, group, factor):
    logits = table(8)
    exact = jax.grad(pass_rate)(logits)
    np.testing.assert_allclose(expected(method, logits, group), -factor * exact, atol=1e-11)
    assert np.abs(exact).max() > 0.01


def test_psr_and_nsr_add_up_to_reinforce():
    logp, _, _, mask = random_rows(9)
    correct = jnp.array([1, 0, 0, 1, 1, 0])
    loss = lambda *signs: methods.reinforce(  # noqa: E731
        logp, methods.signed_advantage(correct, positive=signs[0], negative=signs[1]), mask
    )
    np.testing.assert_allclose(loss(1.0, 0.0) + loss(0.0, 1.0), loss(1.0, 1.0), rtol=1e-14)
    np.testing.assert_allclose(loss(1.0, 1.0)[1:3], np.where(mask, logp, 0)[1:3])


def test_negative_samples_spread_their_mass_in_proportion():
    z = jnp.array([0.3, -1.0, 0.8, 0.1])
    one = jnp.ones((1, 1))

    def loss(z):
        a = methods.signed_advantage(jnp.zeros(1), positive=0.0, negative=1.0)
        return methods.reinforce(jax.nn.log_softmax(z)[None, :1], a, one).sum()

    p = jax.nn.softmax(z)
    np.testing.assert_allclose(-jax.grad(loss)(z), p.at[0].add(-1.0), rtol=1e-12)

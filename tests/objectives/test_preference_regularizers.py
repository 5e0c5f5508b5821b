"""Penalties, weights, temperatures and means beside a preference loss: limits, identities, numbers of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import tokens
from esscher.objectives.preference import losses, regularizers

pytestmark = pytest.mark.usefixtures("x64")

MASK = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# --- penalties --------------------------------------------------------------------------------------------------------


def test_nll_sums_or_averages_and_the_batch_mean_is_an_aggregate():
    logp = jnp.where(MASK, -jnp.abs(draw(0, 3, 4)), jnp.nan)
    rows = [-np.asarray(logp[b])[MASK[b] > 0] for b in range(3)]
    out = regularizers.nll(logp, MASK, normalize=False)
    np.testing.assert_allclose(out, [row.sum() for row in rows], rtol=1e-13)
    mean = regularizers.nll(logp, MASK, normalize=True)
    np.testing.assert_allclose(mean, [rows[0].mean(), rows[1].mean(), 0], rtol=1e-13)
    numerator, denominator = tokens.aggregate(-logp, MASK, "token-mean")
    np.testing.assert_allclose(out.sum() / MASK.sum(), numerator / denominator, rtol=1e-13)


def test_dpop_penalty_acts_below_the_reference_only_and_gives_the_golden_loss():
    policy, reference = jnp.array([-40.0, -45.0, -12.5]), jnp.array([-42.0, -42.0, -13.0])
    penalty = regularizers.dpop_penalty(policy, reference)
    np.testing.assert_array_equal(penalty, [0, 3, 0])
    slope = jax.vmap(jax.grad(regularizers.dpop_penalty))(jnp.array([-40.0, -45.0, -42.0]), jnp.full(3, -42.0))
    np.testing.assert_array_equal(slope, [0, -1, 0])
    assert np.isnan(regularizers.dpop_penalty(jnp.array([jnp.nan]), reference[:1]))
    dpop = losses.pairwise(policy - reference - 5 * penalty, jnp.array([-5.0, -10.0, 1.0]), beta=0.1)
    np.testing.assert_allclose(dpop, [0.4031860489, 1.171100666, 0.718459648], rtol=1e-9)


def test_value_incentive_is_the_optimal_value_of_a_calibrated_reward():
    """`beta log E_ref e^{r/beta} = -beta E (log pi_r - log ref)` for `E r = 0` over the calibration law, exactly."""
    beta, alpha = 0.7, 0.3
    log_ref, calibration = jax.nn.log_softmax(draw(1, 6)), jax.nn.softmax(draw(2, 6))
    reward = draw(3, 6)
    reward = reward - calibration @ reward
    value = beta * jax.nn.logsumexp(log_ref + reward / beta)
    policy = jax.nn.log_softmax(log_ref + reward / beta)
    terms = {
        sign: calibration @ regularizers.value_incentive(policy, log_ref, coef=alpha * beta, attitude=sign)
        for sign in ("optimistic", "pessimistic")
    }
    np.testing.assert_allclose(terms["optimistic"], -alpha * value, rtol=1e-12)
    np.testing.assert_allclose(terms["pessimistic"], alpha * value, rtol=1e-12)


def test_pessimism_is_imitation_and_optimism_its_opposite():
    logp = -jnp.abs(draw(4, 3, 4))
    incentive = lambda logp, sign: regularizers.value_incentive(  # noqa: E731
        tokens.sequence_logp(logp, MASK), jnp.full(3, -2.0), coef=0.1, attitude=sign
    ).sum()
    imitation = jax.grad(lambda logp: 0.1 * regularizers.nll(logp, MASK, normalize=False).sum())(logp)
    np.testing.assert_allclose(jax.grad(incentive)(logp, "pessimistic"), imitation, rtol=1e-13)
    np.testing.assert_allclose(jax.grad(incentive)(logp, "optimistic"), -imitation, rtol=1e-13)
    with pytest.raises(ValueError, match="'online'"):
        regularizers.value_incentive(logp[:, 0], logp[:, 1], coef=0.1, attitude="online")


def test_token_kl_is_unbiased_and_at_rest_where_the_policies_agree():
    """Its mean over the tokens of a policy, all listed once in a row each and weighted by hand, is the divergence."""
    policy, other = jax.nn.log_softmax(draw(5, 2, 7))
    estimates = regularizers.token_kl(policy[:, None], other[:, None], jnp.ones((7, 1)))
    assert (estimates > 0).all()
    np.testing.assert_allclose(jnp.exp(policy) @ estimates, jnp.exp(policy) @ (policy - other), rtol=1e-12)
    same = jax.value_and_grad(lambda p: regularizers.token_kl(p[None], policy[None], jnp.ones((1, 7)))[0])(policy)
    assert same[0] == 0
    np.testing.assert_array_equal(same[1], 0)


def test_token_kl_averages_over_unmasked_tokens_and_stops_at_its_clip():
    logp, other = jnp.where(MASK, draw(6, 2, 3, 4), jnp.nan)
    d = np.asarray(other - logp)
    k3 = np.exp(d) - 1 - d
    expected = [k3[0, :3].mean(), k3[1, [1, 3]].mean(), 0]
    np.testing.assert_allclose(regularizers.token_kl(logp, other, MASK), expected, rtol=1e-10)
    far = lambda x: regularizers.token_kl(x, jnp.zeros((1, 1)), jnp.ones((1, 1)))[0]  # noqa: E731
    value, slope = jax.value_and_grad(far)(jnp.full((1, 1), -30.0))
    np.testing.assert_allclose(value, np.exp(20) - 21, rtol=1e-12)
    assert slope == 0


# --- weights and temperatures -----------------------------------------------------------------------------------------


def test_wpo_weights_of_uniform_and_of_certain_policies_are_one():
    flat = jnp.full((3, 4), -jnp.log(9.0))
    np.testing.assert_allclose(regularizers.wpo_weight(flat, flat, MASK), 1, rtol=1e-14)
    logits = jnp.array([60.0, 0, 0])
    statistics = tokens.linear_token_statistics(jnp.eye(3)[None, :1], logits[:, None] * jnp.eye(3), jnp.array([[0]]))
    weight = regularizers.wpo_weight(statistics.logp, statistics.log_collision, jnp.ones((1, 1)))
    np.testing.assert_allclose(weight, 1, rtol=1e-12)


def test_wpo_weight_is_the_geometric_mean_of_probabilities_over_collisions():
    hidden, unembedding, targets = draw(7, 3, 4, 5), draw(8, 5, 6), jnp.arange(12).reshape(3, 4) % 6
    statistics = tokens.linear_token_statistics(hidden, unembedding, targets)
    p = np.asarray(jax.nn.softmax(hidden @ unembedding))
    ratio = np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0] / np.sum(p**2, -1)
    expected = [np.prod(ratio[b][MASK[b] > 0]) ** (1 / max(MASK[b].sum(), 1)) for b in range(3)]
    out = regularizers.wpo_weight(statistics.logp, statistics.log_collision, MASK)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_margin_scaled_beta_rises_from_beta_to_its_bound():
    gap = jnp.array([0.0, 1, 5, 50])
    out = regularizers.margin_scaled_beta(gap, beta=0.1, w=0.5, k=0.5)
    np.testing.assert_allclose(out, [0.1, 0.119673, 0.145892, 0.15], atol=5e-6)
    np.testing.assert_allclose(out, 0.1 * (1 + 0.5 * (1 - np.exp(-0.5 * gap))), rtol=1e-13)
    np.testing.assert_array_equal(regularizers.margin_scaled_beta(gap, beta=0.1, w=0.0, k=0.5), 0.1)
    np.testing.assert_array_equal(regularizers.margin_scaled_beta(-gap, beta=0.1, w=0.5, k=0.5), 0.1)


def test_adaptive_beta_follows_the_mean_margin_and_has_a_floor():
    margins = jnp.array([1.0, 3.0, 8.0])
    beta = lambda mean, **settings: regularizers.adaptive_beta(  # noqa: E731
        margins, mean, **{"beta": 0.1, "alpha": 0.6, **settings}
    )
    np.testing.assert_allclose(beta(3.0), 0.1 * (1 + 0.6), rtol=1e-13)
    np.testing.assert_allclose(beta(3.0, weights=jnp.array([1.0, 1, 0])), 0.1 * (1 - 0.6), rtol=1e-13)
    np.testing.assert_allclose(beta(9.0), 1e-3)
    assert beta(9.0, alpha=0.0) == 0.1
    assert beta(9.0, weights=jnp.zeros(3)) == 0.1
    slope = jax.grad(lambda m: regularizers.adaptive_beta(m, 3.0, beta=0.1, alpha=0.6))(margins)
    np.testing.assert_array_equal(slope, 0)


def test_typical_margins_are_kept_with_their_weights():
    """Frequencies over 4,000 keys within 4 standard errors of the law of two draws in turn without replacement.

    Three such frequencies: a false alarm in 5,000 runs.
    """
    margins, mean, std = jnp.array([0.0, 1.5, -2.0]), 0.5, 1.2
    keep = lambda key: regularizers.keep_typical_margins(key, margins, mean, std, keep=0.67)  # noqa: E731
    kept = np.asarray(jax.jit(jax.vmap(keep))(jax.random.split(jax.random.key(9), 4000)))
    np.testing.assert_array_equal(kept.sum(-1), 2)
    w = np.exp(-0.5 * ((np.asarray(margins) - mean) / std) ** 2)
    p = w / w.sum()
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)])
    chance = p + second
    assert np.all(np.abs(kept.mean(0) - chance) < 4 * np.sqrt(chance * (1 - chance) / 4000))
    everything = regularizers.keep_typical_margins(jax.random.key(0), margins, mean, 0.0, keep=1.0)
    assert everything.all()


def test_running_means_are_exponential_or_over_all_values_and_skip_empty_batches():
    values, mask = jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0])
    np.testing.assert_allclose(regularizers.running_mean_update(0.5, values, mask=mask), 0.9 * 0.5 + 0.1 * 1.5)
    stream, mean = draw(10, 4, 5), 0.0
    for i, batch in enumerate(stream):
        mean = regularizers.running_mean_update(mean, batch, momentum=i / (i + 1))
    np.testing.assert_allclose(mean, stream.mean(), rtol=1e-13)
    assert regularizers.running_mean_update(0.5, values, mask=jnp.zeros(3)) == 0.5


# --- tilted means -----------------------------------------------------------------------------------------------------

GOLDEN = np.array([0.4031860489, 0.4031860489, 0.7184596480])  # DPO of the golden pairs


@pytest.mark.parametrize("t", [-50.0, -1.0, -1e-3, 1e-3, 0.3, 50.0])
def test_tilted_mean_by_definition_and_its_weights(t):
    x = 3 * draw(11, 7)
    value, slope = jax.value_and_grad(regularizers.tilted_mean)(x, t)
    np.testing.assert_allclose(value, np.log(np.mean(np.exp(t * np.asarray(x)))) / t, rtol=1e-10)
    np.testing.assert_allclose(slope, jax.nn.softmax(t * x), rtol=1e-9, atol=1e-14)


def test_tilted_mean_goes_from_the_smallest_loss_over_the_mean_to_the_largest():
    x = jnp.asarray(GOLDEN)
    np.testing.assert_allclose(regularizers.tilted_mean(x, -1.0), 0.4976472042, rtol=1e-9)  # Dr. DPO, beta' = 1
    np.testing.assert_allclose(regularizers.tilted_mean(x, -1e9), x.min(), rtol=1e-7)
    np.testing.assert_allclose(regularizers.tilted_mean(x, 1e9), x.max(), rtol=1e-7)
    assert regularizers.tilted_mean(x, 0.0) == x.mean()
    np.testing.assert_allclose(jax.grad(regularizers.tilted_mean)(x, 0.0), 1 / 3, rtol=1e-14)
    np.testing.assert_allclose(jax.grad(regularizers.tilted_mean, 1)(x, 0.0), np.var(x) / 2, rtol=1e-12)


def test_tilted_mean_keeps_its_digits_near_zero_and_far_away_in_float32():
    x = jnp.float32(100.0) + draw(12, 50).astype(jnp.float32)
    for t in (1e-12, 1e-6, 1e-4):
        expected = x.mean() + t * x.var() / 2
        np.testing.assert_allclose(regularizers.tilted_mean(x, jnp.float32(t)), expected, rtol=3e-7)
    far = jax.value_and_grad(regularizers.tilted_mean)(jnp.array([1e4, -1e4], jnp.float32), jnp.float32(3.0))
    np.testing.assert_allclose(far[0], 1e4, rtol=1e-4)
    np.testing.assert_allclose(far[1], [1, 0], atol=1e-6)


@pytest.mark.parametrize("t", [-2.0, 0.0, 1e-5, 4.0])
def test_masked_losses_are_left_out_and_none_give_zero(t):
    x, mask = draw(13, 5), jnp.array([1, 0, 1, 1, 0])
    masked = lambda x: regularizers.tilted_mean(x, t, mask=mask)  # noqa: E731
    value, slope = jax.value_and_grad(masked)(jnp.where(mask, x, jnp.nan))
    short, short_slope = jax.value_and_grad(regularizers.tilted_mean)(x[mask > 0], t)
    np.testing.assert_allclose(value, short, rtol=1e-13)
    np.testing.assert_allclose(slope[mask > 0], short_slope, rtol=1e-12)
    np.testing.assert_array_equal(slope[mask == 0], 0)
    empty = jax.value_and_grad(lambda x: regularizers.tilted_mean(x, t, mask=jnp.zeros(5)))(x)
    assert empty[0] == 0
    np.testing.assert_array_equal(empty[1], 0)
    assert np.isnan(regularizers.tilted_mean(x.at[0].set(jnp.nan), t))


BAD = [
    (lambda x: regularizers.nll(x, x[:, :1], normalize=True), "logp .*, mask"),
    (lambda x: regularizers.tilted_mean(x[0], x[0]), "t must be a scalar, got "),
    (lambda x: regularizers.tilted_mean(x[0], 1.0, mask=x[0, :2]), "losses .*, mask"),
    (lambda x: regularizers.adaptive_beta(x[0], x[0], beta=0.1, alpha=0.6), "running_mean must be a scalar"),
    (lambda x: regularizers.adaptive_beta(x[0], 0.0, beta=0.1, alpha=0.6, weights=x[0, :2]), "margins .*, weights"),
    (lambda x: regularizers.keep_typical_margins(jax.random.key(0), x, 0.0, 1.0), r"margins must have shape \[B\]"),
    (lambda x: regularizers.margin_scaled_beta(x[0], beta=x[0, :2], w=0.1, k=0.5), "beta must be a scalar or"),
    (lambda x: regularizers.value_incentive(x[0], x[0], coef=x, attitude="optimistic"), "coef must be a scalar or"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((3, 4)))

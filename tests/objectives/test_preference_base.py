"""The axes of preference losses: links and labels, scores, arities; limits, identities, autodiff, golden numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import links, losses, scores

pytestmark = pytest.mark.usefixtures("x64")

Z = np.concatenate([-np.geomspace(1e-3, 25, 9)[::-1], [0.0], np.geomspace(1e-3, 25, 9)])
LINKS = {
    "logistic": links.logistic_link,
    "hinge": links.hinge_link,
    "squared": links.squared_link(0.7),
    "sigmoid": links.sigmoid_link,
    "exponential": links.exponential_link,
    "truncated_quadratic": links.truncated_quadratic_link,
    "savage": links.savage_link,
    "linear": links.linear_link,
    "discopop": links.discopop_link(0.05),
}
each_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_are_their_formulas():
    z = jnp.asarray(Z[np.abs(Z) < 15])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    modulation = sigmoid(z / 0.05)
    expected = {
        "logistic": -np.log(sigmoid(z)),
        "hinge": np.maximum(0, 1 - z),
        "squared": (z - 0.7) ** 2,
        "sigmoid": 1 - sigmoid(z),
        "exponential": np.exp(-z),
        "truncated_quadratic": np.maximum(0, 1 - z) ** 2,
        "savage": 1 / (1 + np.exp(z)) ** 2,
        "linear": -z,
        "discopop": -(1 - modulation) * np.log(sigmoid(z)) + modulation * np.exp(-z),
    }
    assert expected.keys() == LINKS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(LINKS[name](z), values, rtol=1e-9, atol=1e-12, err_msg=name)


@each_link
def test_links_fall_at_zero_and_pass_nan_on(link):
    slope = jax.grad(link)(0.0)
    if link is LINKS["discopop"]:  # the slope of its modulation wins where tau is small
        np.testing.assert_allclose(slope, (1 - np.log(2)) / 4 / 0.05 - 0.75, rtol=1e-12)
        slope = jax.grad(links.discopop_link(0.5))(0.0)
    assert slope < 0
    assert np.isnan(link(jnp.asarray(np.nan)))
    assert link(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32


def test_hinges_have_no_gradient_at_and_beyond_the_kink():
    for link in (links.hinge_link, links.truncated_quadratic_link):
        np.testing.assert_array_equal(jax.vmap(jax.grad(link))(jnp.array([1.0, 1.5])), 0)
    assert jax.grad(links.hinge_link)(0.999) == -1


def test_links_at_both_ends():
    far = jnp.array([-1e6, 1e6])
    np.testing.assert_array_equal(links.logistic_link(far), [1e6, 0])
    np.testing.assert_array_equal(links.sigmoid_link(far), [1, 0])
    np.testing.assert_array_equal(links.savage_link(far), [1, 0])
    np.testing.assert_allclose(links.exponential_link(far), [np.exp(20), 0])
    np.testing.assert_allclose(links.discopop_link()(far), [1e6, 0])


def test_small_temperatures_give_every_link_of_slope_minus_one_the_same_gradient():
    chosen, rejected = draw(0, 2, 6)
    for link in (links.hinge_link, links.exponential_link, links.squared_link(0.5), links.linear_link):
        slope = jax.grad(lambda x, link=link: losses.pairwise(x, rejected, beta=1e-7, link=link).sum())(chosen)
        np.testing.assert_allclose(slope, -1e-7, rtol=1e-5)


def test_whole_margins_are_refused():
    with pytest.raises(ValueError, match="z must be of a floating type, got int"):
        links.logistic_link(jnp.arange(3))


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.13, 0.5, 0.9, 1.0])
def test_three_identities_of_noisy_logistic_labels(p):
    z, logistic, e = jnp.asarray(Z), links.logistic_link, p / 2.01
    near = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(links.label_model(logistic, label_prob=p)(z), logistic(z) + (1 - p) * z, **near)
    np.testing.assert_allclose(links.label_model(logistic, flip_prob=e)(z), logistic(z) + e * z, **near)
    unbiased = links.label_model(logistic, flip_prob=p / 2.5, mode="unbiased")(z)
    np.testing.assert_allclose(unbiased, logistic(z) - p / 2.5 / (1 - 2 * p / 2.5) * z, **near)


@each_link
def test_the_mean_of_unbiased_losses_under_flips_is_the_clean_loss(link):
    z, e = jnp.asarray(Z[np.abs(Z) < 4]), 0.23
    unbiased = links.label_model(link, flip_prob=e, mode="unbiased")
    np.testing.assert_allclose((1 - e) * unbiased(z) + e * unbiased(-z), link(z), rtol=1e-12, atol=1e-12)
    smooth = links.label_model(link, flip_prob=e)
    np.testing.assert_allclose(smooth(z), (1 - e) * link(z) + e * link(-z), rtol=1e-14)


def test_rdpo_on_flipped_labels_has_the_loss_of_dpo_on_clean_ones():
    """All pairs of five actions with Bradley-Terry labels: exact expectations, at a policy that is not optimal."""
    rewards, score, e = draw(1, 5), draw(2, 5), 0.3
    i, j = (jnp.asarray(x) for x in zip(*itertools.permutations(range(5), 2), strict=True))
    clean = jax.nn.sigmoid(rewards[i] - rewards[j])
    noisy = (1 - e) * clean + e * (1 - clean)
    loss = lambda s, p, **kwargs: p @ losses.pairwise(s[i], s[j], beta=0.7, **kwargs)  # noqa: E731
    for function in (loss, jax.grad(loss)):
        robust = function(score, noisy, flip_prob=e, mode="unbiased")
        np.testing.assert_allclose(robust, function(score, clean), rtol=1e-12)
        conservative = function(score, clean, flip_prob=e)  # smoothing is training on flipped labels
        np.testing.assert_allclose(conservative, function(score, noisy), rtol=1e-12)


def test_labels_of_symmetric_links_do_not_matter_for_the_minimum():
    z = jnp.asarray(Z)
    np.testing.assert_allclose(links.sigmoid_link(z) + links.sigmoid_link(-z), 1, rtol=1e-14)
    noisy = links.label_model(links.sigmoid_link, flip_prob=0.2)(z)
    np.testing.assert_allclose(noisy, 0.6 * links.sigmoid_link(z) + 0.2, rtol=1e-13)


def test_a_soft_label_is_least_at_its_log_odds():
    slope = jax.grad(links.label_model(links.logistic_link, label_prob=0.8))
    np.testing.assert_allclose(slope(jnp.log(4.0)), 0, atol=1e-15)


def test_labels_that_are_no_probabilities_are_refused_or_nan():
    with pytest.raises(ValueError, match="'hard'"):
        links.label_model(links.logistic_link, mode="hard")
    with pytest.raises(ValueError, match="exclude each other"):
        links.label_model(links.logistic_link, label_prob=0.5, flip_prob=0.1)
    for settings in ({"label_prob": 1.1}, {"flip_prob": -0.1}, {"flip_prob": 0.5, "mode": "unbiased"}):
        assert np.isnan(links.label_model(links.logistic_link, **settings)(jnp.asarray(0.3)))


# --- scores -----------------------------------------------------------------------------------------------------------

ALPHA = 0.4
DIVERGENCES = {  # generators f of E_ref f(pi / ref)
    "reverse_kl": lambda u: u * jnp.log(u),
    "forward_kl": lambda u: -jnp.log(u),
    "js": lambda u: u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2),
    "alpha": lambda u: u**ALPHA / (ALPHA * (ALPHA - 1)),
    "chi2_kl": lambda u: u * jnp.log(u) + 0.5 * (u - 1) ** 2,
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_scores_are_slopes_of_their_generators_up_to_a_constant(kind):
    h = jnp.linspace(-4.0, 4.0, 9)
    score = scores.divergence_score(h, kind, alpha=ALPHA if kind == "alpha" else None)
    slope = jax.vmap(jax.grad(DIVERGENCES[kind]))(jnp.exp(h))
    np.testing.assert_allclose(score - score[4], slope - slope[4], rtol=1e-12, atol=1e-12)


def test_alpha_divergences_end_at_the_two_kullback_leiblers():
    h = jnp.linspace(-4.0, 4.0, 9)
    alpha = lambda alpha: scores.divergence_score(h, "alpha", alpha=alpha)  # noqa: E731
    np.testing.assert_allclose(alpha(0.0), scores.divergence_score(h, "forward_kl"), rtol=1e-13)
    near_one = alpha(1 - 1e-6) - alpha(1 - 1e-6)[4]
    np.testing.assert_allclose(near_one, h, rtol=1e-5, atol=1e-9)


def test_divergence_scores_need_what_they_need():
    with pytest.raises(ValueError, match="alpha must be given"):
        scores.divergence_score(jnp.zeros(2), "alpha")
    with pytest.raises(ValueError, match="alpha must be given"):
        scores.divergence_score(jnp.zeros(2), "js", alpha=0.5)
    with pytest.raises(ValueError, match=r"kind must be .*'kl'"):
        scores.divergence_score(jnp.zeros(2), "kl")


def test_odds_are_direct_odds():
    a = -jnp.geomspace(1e-5, 30, 20)
    np.testing.assert_allclose(scores.odds_score(a), np.log(np.exp(a)) - np.log1p(-np.exp(a)), rtol=1e-10)
    np.testing.assert_allclose(scores.odds_score(jnp.log(jnp.array([0.5, 0.8]))), [0, np.log(4)], atol=1e-14)
    certain = jax.value_and_grad(scores.odds_score)(jnp.float32(0.0))
    assert np.isfinite(certain).all()
    np.testing.assert_allclose(certain[0], np.log(1e6), rtol=1e-6)


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = np.array([-1e-12, -1e-3, -np.log(2), -0.7, -5.0, -40.0])
    expected = [np.log(1e-12), np.log(-np.expm1(-1e-3)), -np.log(2), np.log1p(-np.exp(-0.7)), np.log1p(-np.exp(-5.0)),
                -np.exp(-40.0)]  # fmt: skip
    np.testing.assert_allclose(scores.log1mexp(jnp.asarray(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.grad(scores.log1mexp))(jnp.asarray(x)), 1 / -np.expm1(-x) - 0, rtol=1e-9)


def test_box_cox_score_tends_to_its_argument_and_is_linear_in_probability_at_minus_one():
    x = -jnp.geomspace(1e-3, 20, 9)
    for alpha in (0.0, 1e-9, -1e-9):
        np.testing.assert_allclose(scores.box_cox_score(x, alpha), x, rtol=2e-8)
    np.testing.assert_allclose(scores.box_cox_score(x, -1.0), jnp.exp(x) - 1, rtol=1e-12)
    np.testing.assert_allclose(scores.box_cox_score(x, 0.25), (1 - np.exp(-0.25 * x)) / 0.25, rtol=1e-12)


def test_references_mix_geometrically_and_lengths_divide():
    policy, reference = draw(3, 2, 4)
    mixed = scores.mixed_reference(jnp.stack([policy, reference]), jnp.array([0.3, 0.7]))
    np.testing.assert_allclose(mixed, 0.3 * policy + 0.7 * reference, rtol=1e-14)
    np.testing.assert_allclose(scores.log_ratio(policy, reference, ref_weight=0.4), policy - 0.4 * reference)
    np.testing.assert_allclose(scores.per_token(policy, jnp.array([1, 4, 0, 2])), policy / jnp.array([1, 4, 1, 2]))


# --- pairs and points -------------------------------------------------------------------------------------------------


def test_beta_multiplies_the_score_and_the_margin_is_subtracted_after_it():
    chosen, rejected, margin = draw(4, 3, 5)
    beta = jnp.linspace(0.1, 2, 5)
    expected = np.log1p(np.exp(-(beta * (chosen - rejected) - margin)))
    np.testing.assert_allclose(losses.pairwise(chosen, rejected, beta=beta, margin=margin), expected, rtol=1e-12)
    shifted = losses.pairwise(chosen + 3, rejected + 3, beta=beta, margin=margin)
    np.testing.assert_allclose(shifted, expected, rtol=1e-12)


def test_a_pair_has_the_gradients_of_dpo():
    z = 0.3 * (1.2 + 0.4)
    slopes = jax.grad(lambda chosen, rejected: losses.pairwise(chosen, rejected, beta=0.3), (0, 1))(
        jnp.asarray(1.2), jnp.asarray(-0.4)
    )
    np.testing.assert_allclose(slopes, 0.3 / (1 + np.exp(z)) * np.array([-1, 1]), rtol=1e-13)


def test_single_responses_are_pairs_with_their_baseline():
    score, baseline = draw(5, 2, 6)
    good = losses.pointwise(score, 1.0, beta=0.4, baseline=0.4 * baseline)
    np.testing.assert_allclose(good, losses.pairwise(score, baseline, beta=0.4), rtol=1e-13)
    bad = losses.pointwise(score, jnp.zeros(6, bool), beta=0.4, baseline=0.4 * baseline, negative_weight=0.7)
    np.testing.assert_allclose(bad, 0.7 * losses.pairwise(baseline, score, beta=0.4), rtol=1e-13)
    half = losses.pointwise(score, 0.25, beta=1.0, positive_weight=2.0)
    soft = links.label_model(links.logistic_link, label_prob=0.25)(score)
    np.testing.assert_allclose(half, soft + 0.25 * links.logistic_link(score), rtol=1e-13)


BAD = [
    (lambda: losses.pairwise(jnp.ones(2), jnp.ones(3), beta=1.0), "one shape: chosen .2,., rejected .3,."),
    (lambda: losses.pairwise(jnp.ones((2, 2)), jnp.ones((2, 2)), beta=jnp.ones(2)), r"chosen must have shape \[B\]"),
    (lambda: losses.pairwise(jnp.ones(2), jnp.ones(2), beta=1.0, label_prob=jnp.ones((2, 1))), "label_prob must be"),
    (lambda: losses.pairwise(jnp.ones(2), jnp.ones(2), beta=1.0, margin=jnp.ones(3)), "margin must be a scalar"),
    (lambda: losses.pointwise(jnp.ones((2, 2)), 1.0, beta=1.0), r"score must have shape \[B\]"),
    (lambda: losses.listwise_softmax(jnp.ones((2, 3)), jnp.ones((2, 3)), direction="both"), "direction .*'both'"),
    (lambda: losses.listwise_softmax(jnp.ones(3), jnp.ones(3)), r"logits must have shape \[P, G\], got \(3,\)"),
    (lambda: losses.plackett_luce(jnp.ones((2, 3)), mask=jnp.ones((2, 2))), "one shape: score .*, mask"),
    (lambda: losses.pairwise_list(jnp.ones((2, 3)), jnp.ones((2, 3)), pair_weight=jnp.ones((2, 3))), "pair_weight"),
    (lambda: losses.group_mean_pairwise(jnp.ones((2, 3)), jnp.ones((3, 3)), beta=1.0), "rejected must have 2 rows"),
    (lambda: scores.log_ratio(jnp.ones(2), jnp.ones(2), ref_weight=jnp.ones(3)), "ref_weight must be a scalar"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- lists and groups -------------------------------------------------------------------------------------------------

LIST, LEVELS, REWARDS = np.array([[0.7, 0.2, -0.1, -0.9]]), np.array([[3, 2, 1, 0]]), np.array([[1, 0.5, 0, -1]])


def test_golden_lists():
    target = REWARDS / 0.5
    np.testing.assert_allclose(losses.plackett_luce(LIST), 1.914801422, rtol=1e-9)
    np.testing.assert_allclose(losses.listwise_softmax(LIST, target), 1.025680403, rtol=1e-9)
    np.testing.assert_allclose(losses.listwise_softmax(LIST, target, direction="reverse"), 0.1931020746, rtol=1e-9)
    chosen, rejected = jnp.array([[9.0, 4.0]]), jnp.array([[-2.0, 1.0, -6.0]])
    np.testing.assert_allclose(losses.group_mean_pairwise(chosen, rejected, beta=0.1), 6.595999991, rtol=1e-9)
    pair = losses.group_mean_pairwise(chosen, rejected, beta=0.1, variance_coef=0.0)
    np.testing.assert_allclose(pair, 0.345999991, rtol=1e-8)


def test_golden_lambda_loss_is_a_weighted_sum_over_the_pairs_of_a_list():
    gain, discount = 2.0 ** LEVELS[0], 1 / np.log1p(np.arange(1, 5))
    weight = jnp.abs(gain[:, None] - gain) * np.abs(discount[:, None] - discount)
    out = losses.pairwise_list(LIST, LEVELS, pair_weight=weight[None])
    np.testing.assert_allclose(out, 4.168774762, rtol=1e-9)


def test_lists_of_two_are_pairs():
    score = draw(6, 5, 2)
    pair = losses.pairwise(score[:, 0], score[:, 1], beta=1.0)
    hard = jnp.broadcast_to(jnp.array([0.0, -jnp.inf]), (5, 2))
    better = jnp.broadcast_to(jnp.array([1.0, 0.0]), (5, 2))
    for loss in (
        losses.plackett_luce(score),
        losses.listwise_softmax(score, hard),
        losses.pairwise_list(score, better, normalize=True),
        losses.group_mean_pairwise(score[:, :1], score[:, 1:], beta=1.0, variance_coef=3.0),
    ):
        np.testing.assert_allclose(loss, pair, rtol=1e-13)


def test_pairs_of_a_list_by_loops_with_ties_and_any_link():
    score, label = draw(7, 3, 5), jnp.round(draw(8, 3, 5))
    out = losses.pairwise_list(score, label, link=links.hinge_link)
    mean = losses.pairwise_list(score, label, link=links.hinge_link, normalize=True)
    for p in range(3):
        ordered = [(i, j) for i, j in itertools.permutations(range(5), 2) if label[p, i] > label[p, j]]
        terms = [max(0, 1 - float(score[p, i] - score[p, j])) for i, j in ordered]
        assert len(terms) < 10  # there are ties
        np.testing.assert_allclose([out[p], mean[p]], [sum(terms), np.mean(terms)], rtol=1e-12)
    np.testing.assert_array_equal(losses.pairwise_list(score, jnp.ones((3, 5)), normalize=True), 0)


MASK = jnp.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
OVER_LISTS = {
    "forward": losses.listwise_softmax,
    "reverse": lambda s, r, mask=None: losses.listwise_softmax(s, r, mask=mask, direction="reverse"),
    "plackett_luce": lambda s, r, mask=None: losses.plackett_luce(s, mask=mask),
    "pairs": losses.pairwise_list,
    "pair_mean": lambda s, r, mask=None: losses.pairwise_list(s, r, mask=mask, normalize=True),
    "groups": lambda s, r, mask=None: losses.group_mean_pairwise(
        s, r, beta=0.4, chosen_mask=mask, rejected_mask=mask
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", OVER_LISTS.values(), ids=OVER_LISTS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_lists_are_shorter_lists(loss, poison):
    score, reward = (jnp.where(MASK, x, poison) for x in draw(9, 2, 4, 5))
    values, slopes = jax.vmap(jax.value_and_grad(lambda s, r, m: loss(s[None], r[None], mask=m[None])[0]))(
        score, reward, MASK
    )
    for p in range(3):
        kept = np.flatnonzero(MASK[p])
        short = lambda s, r: loss(s[None], r[None])[0]  # noqa: E731
        value, slope = jax.value_and_grad(short)(score[p, kept], reward[p, kept])
        np.testing.assert_allclose(values[p], value, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(slopes[p, kept], slope, rtol=1e-12, atol=1e-15)
    assert values[3] == 0
    assert not np.where(MASK, 0, slopes).any()


@pytest.mark.parametrize("name", sorted(set(OVER_LISTS) - {"plackett_luce"}))
def test_the_order_of_a_list_and_a_constant_of_its_prompt_do_not_matter(name):
    score, reward = draw(10, 2, 3, 5)
    order = jnp.array([3, 0, 4, 2, 1])
    expected = OVER_LISTS[name](score, reward)
    np.testing.assert_allclose(OVER_LISTS[name](score[:, order], reward[:, order]), expected, rtol=1e-12)
    if name != "groups":  # whose sides are both scores
        np.testing.assert_allclose(OVER_LISTS[name](score + 2, reward + 1), expected, rtol=1e-11)
    else:
        np.testing.assert_allclose(OVER_LISTS[name](score + 2, reward + 2), expected, rtol=1e-11)


def test_both_directions_are_least_at_the_target_and_coefficients_sum_to_zero():
    score, reward = draw(11, 2, 3, 4)
    for direction in ("forward", "reverse"):
        slope = jax.grad(lambda s, d=direction: losses.listwise_softmax(s, reward, direction=d).sum())
        np.testing.assert_allclose(slope(reward + 0.7), 0, atol=1e-14)
        assert np.abs(slope(score)).max() > 0.01
        np.testing.assert_allclose(slope(score).sum(-1), 0, atol=1e-14)
    forward = jax.grad(lambda s: losses.listwise_softmax(s, reward).sum())(score)
    np.testing.assert_allclose(forward, jax.nn.softmax(score) - jax.nn.softmax(reward), rtol=1e-12)


def test_plackett_luce_is_the_likelihood_of_the_order():
    score = draw(12, 1, 4)
    total = sum(np.exp(-losses.plackett_luce(score[:, order])[0]) for order in itertools.permutations(range(4)))
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_groups_that_agree_are_a_pair_of_means_and_a_missing_side_leaves_the_variance():
    chosen, rejected = jnp.full((2, 3), 1.2), draw(13, 2, 4)
    out = losses.group_mean_pairwise(chosen, rejected, beta=0.3, variance_coef=5.0)
    np.testing.assert_allclose(out, losses.pairwise(chosen[:, 0], rejected.mean(-1), beta=0.3), rtol=1e-13)
    spread = jnp.array([[1.0, 3.0]])
    alone = losses.group_mean_pairwise(spread, spread, beta=0.3, rejected_mask=jnp.zeros((1, 2)))
    np.testing.assert_allclose(alone, 1.0)


def test_golden_transport_of_sorted_margins():
    margins, ref_margins = jnp.array([15.0, 15.0, -3.5]), jnp.array([8.0, 8.0, -3.0])
    out = losses.pairwise(*losses.sorted_scores(margins, ref_margins), beta=0.1)
    np.testing.assert_allclose(out, [0.718459648, 0.4031860489, 0.4031860489], rtol=1e-9)

"""What a preference loss trains on, and how its outcome is judged: numbers of the papers, brute force, Monte Carlo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from esscher.core import tokens
from esscher.objectives.preference import curation, evaluation, links, losses

pytestmark = pytest.mark.usefixtures("x64")


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# --- rewards of a response --------------------------------------------------------------------------------------------


def test_confidence_is_the_mean_probability_of_the_answer_and_not_its_inverse_perplexity():
    logp, mask = -jnp.abs(draw(0, 3, 5)), jnp.array([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    out = curation.answer_confidence(jnp.where(mask, logp, jnp.nan), mask)
    p = np.exp(logp)
    np.testing.assert_allclose(out, [p[0, [1, 2, 4]].mean(), p[1, 2], 0], rtol=1e-13)
    assert out[0] > np.exp(tokens.sequence_logp(logp, mask, normalize=True)[0])
    np.testing.assert_allclose(curation.answer_confidence(jnp.full((1, 5), jnp.log(0.3)), mask[:1]), 0.3, rtol=1e-14)


def test_the_density_ratio_of_a_tilt_is_its_reward():
    """Strong = weak e^{r/beta} / Z over all strings of two tokens: the ratio is r / beta - log Z, exactly."""
    reward, beta = draw(1, 9), 0.4
    weak = jax.nn.log_softmax(draw(2, 9))
    strong = jax.nn.log_softmax(weak + reward / beta)
    first = lambda x: jax.nn.logsumexp(x.reshape(3, 3), axis=1).repeat(3)  # noqa: E731
    per_token = lambda x: jnp.stack([first(x), x - first(x), jnp.full(9, jnp.nan)], axis=1)  # noqa: E731
    mask = jnp.array([[1, 1, 0]] * 9)
    out = curation.density_ratio_reward(per_token(strong), per_token(weak), mask)
    log_z = jax.nn.logsumexp(weak + reward / beta)
    np.testing.assert_allclose(out, reward / beta - log_z, rtol=1e-12)
    mean = curation.density_ratio_reward(per_token(strong), per_token(weak), mask, normalize=True)
    np.testing.assert_allclose(mean, out / 2, rtol=1e-13)
    np.testing.assert_array_equal(curation.density_ratio_reward(per_token(weak), per_token(weak), mask), 0)


def test_apc_counts_the_statements_that_are_respected():
    contradicts, ignores, entails = jnp.eye(3)
    nli = jnp.stack([jnp.stack([entails, ignores, contradicts]), jnp.stack([contradicts, ignores, entails])])
    np.testing.assert_array_equal(curation.apc_score(jnp.array([[1.0, 1, 0], [0.0, 0, 1]]), nli), [1, 2])
    nli = jax.nn.softmax(draw(3, 2, 4, 3))
    np.testing.assert_allclose(curation.apc_score(jnp.ones((2, 4)), nli), nli[..., 2].sum(-1), rtol=1e-13)
    part = curation.apc_score(jnp.full((2, 4), 0.3), nli.at[:, 2:].set(jnp.nan), jnp.array([[1, 1, 0, 0]] * 2))
    np.testing.assert_allclose(part, curation.apc_score(jnp.full((2, 2), 0.3), nli[:, :2]), rtol=1e-13)


def test_scalarized_tilts_are_tilts_by_the_weighted_reward():
    rewards, weights, beta = draw(4, 6, 2), jnp.array([0.6, 0.8]), 0.5
    total = curation.linear_scalarize(rewards, weights)
    np.testing.assert_allclose(total, rewards @ weights, rtol=1e-13)
    np.testing.assert_array_equal(curation.linear_scalarize(rewards, jnp.array([0.0, 1.0])), rewards[:, 1])
    stages = jax.nn.log_softmax(rewards[:, 0] * 0.6 / beta) + rewards[:, 1] * 0.8 / beta
    np.testing.assert_allclose(jax.nn.log_softmax(stages), jax.nn.log_softmax(total / beta), rtol=1e-12)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_of_the_largest_gaps_by_brute_force():
    score, correct, mask = draw(5, 4, 4), draw(6, 4, 4) > 0, draw(7, 4, 4) > -1
    correct, mask = correct.at[3].set(True), mask.at[0].set(True)
    out = jax.jit(curation.top_gap_pairs, static_argnums=2)(jnp.where(mask, score, jnp.nan), correct, 5, mask=mask)
    for p in range(4):
        every = [
            (float(score[p, j] - score[p, i]), i, j)
            for i, j in itertools.product(range(4), repeat=2)
            if mask[p, i] and mask[p, j] and correct[p, i] and not correct[p, j]
        ]
        best = [(i, j) for _, i, j in sorted(every)[:5]]
        found = [(int(i), int(j)) for i, j, v in zip(out.chosen[p], out.rejected[p], out.valid[p], strict=True) if v]
        assert found == best
    assert out.valid[:3].any(-1).all()
    assert not out.valid[3].any()  # all correct
    with pytest.raises(ValueError, match=r"k must be in 1\.\.16, got 17"):
        curation.top_gap_pairs(score, correct, 17)


def test_reward_gaps_split_in_two_and_temperatures_of_stages_add_up_as_inverses():
    gap = jnp.array([0.5, 2.0, -1.0, jnp.nan, 1.0])
    easy, hard = curation.reward_gap_split(gap, jnp.zeros(5), 1.0)
    np.testing.assert_array_equal(easy, [False, True, False, False, True])
    np.testing.assert_array_equal(hard, [True, False, True, False, False])
    reward, log_ref = draw(8, 2, 6)
    two_stages = jax.nn.log_softmax(jax.nn.log_softmax(log_ref + reward / 0.4) + reward / 1.2)
    np.testing.assert_allclose(two_stages, jax.nn.log_softmax(log_ref + reward / 0.3), rtol=1e-12)


def test_goals_double_the_pairs_and_a_policy_blind_to_them_learns_nothing_from_ties():
    chosen, rejected = jnp.arange(6).reshape(3, 2), 10 + jnp.arange(6).reshape(3, 2)
    better, worse = jnp.array([3.0, 5.0, 9.0]), jnp.array([1.0, 4.0, 2.0])
    pairs = curation.goal_relabel(chosen, rejected, better, worse)
    np.testing.assert_array_equal(pairs.prompt, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(pairs.chosen, [*chosen, *rejected])
    np.testing.assert_array_equal(pairs.rejected, [*rejected, *chosen])
    np.testing.assert_array_equal(pairs.goal, [3, 5, 9, 1, 4, 2])
    rewards = dict(zip([*map(tuple, np.asarray([*chosen, *rejected]))], [*better, *worse], strict=True))
    reward = lambda responses: np.array([rewards[tuple(row)] for row in np.asarray(responses)])  # noqa: E731
    assert np.all(np.abs(pairs.goal - reward(pairs.chosen)) < np.abs(pairs.goal - reward(pairs.rejected)))
    h = draw(9, 6)
    pairs = curation.goal_relabel(jnp.arange(3), jnp.arange(3, 6), better, worse)
    loss = lambda h: losses.pairwise(h[pairs.chosen], h[pairs.rejected], beta=0.7).sum()  # noqa: E731
    z = 0.7 * (h[:3] - h[3:])
    np.testing.assert_allclose(loss(h), (links.logistic_link(z) + links.logistic_link(-z)).sum(), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(6)), 0, atol=1e-15)


@pytest.mark.parametrize(("size", "golden"), [(8, [0.156, 0.250, 0.306, 0.287]), (64, [0.097, 0.167, 0.214, 0.523])])
def test_the_first_response_accepted_tends_to_the_tilt(size, golden):
    """4,000 groups against the law of a pass, summed exactly: four frequencies within 4 standard errors.

    A false alarm in 4,000 runs. A group without the best action is sampled relative to the best that it has.
    """
    n, p, reward, beta = 4000, np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 0.5, 1.0, 2.0]), 0.5
    keys = jax.random.split(jax.random.key(10))
    action = jax.random.choice(keys[0], 4, (n, size), p=jnp.asarray(p))
    sample = jax.jit(curation.statistical_rejection_sample)
    accepted = sample(keys[1], jnp.asarray(reward)[action], jnp.ones((n, size)), beta=beta, n=1)
    np.testing.assert_array_equal(accepted.sum(-1), 1)
    share = np.bincount(np.asarray(action[accepted]), minlength=4) / n
    law = first_accepted(p, np.exp(reward / beta), size)
    np.testing.assert_allclose(law, golden, atol=0.012)  # the sheet's own simulation
    assert np.all(np.abs(share - law) < 4 * np.sqrt(law * (1 - law) / n))
    if size == 64:
        tilt = p * np.exp(reward / beta)
        np.testing.assert_allclose(tilt / tilt.sum(), [0.0970, 0.1582, 0.2151, 0.5297], atol=5e-5)


def first_accepted(p, weight, size):
    """Law of the first action that a pass accepts: it always ends, since the group's best action is accepted.

    Given the best action m of the group, sum over the position k of the first accepted one. The draws before it were
    refused; the group's best must be m: all draws at most m, and at least one is m, which is the difference of the
    laws of two groups of actions up to m, of which the second has none above m - 1 but is judged against m.
    """
    law = np.zeros(4)
    for m in range(4):
        accept = weight / weight[m]
        up_to, below = p[: m + 1], p[:m]
        refused_to = (up_to * (1 - accept[: m + 1])).sum()
        refused_below = (below * (1 - accept[:m])).sum()
        for k in range(size):
            later = size - 1 - k
            law[: m + 1] += up_to * accept[: m + 1] * refused_to**k * up_to.sum() ** later
            law[:m] -= below * accept[:m] * refused_below**k * below.sum() ** later
    return law


def test_rejection_sampling_takes_the_best_when_cold_and_the_first_when_hot():
    rewards = draw(11, 50, 6).at[:, 1].set(jnp.nan)
    mask = jnp.ones((50, 6)).at[:, 4].set(0)
    sample = jax.jit(curation.statistical_rejection_sample)
    known = jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)
    best = tokens.masked_rank(known, mask) < 3
    for cold in (0.0, 1e-6):
        np.testing.assert_array_equal(sample(jax.random.key(0), rewards, mask, beta=cold, n=3), best)
    clean = jnp.nan_to_num(rewards)
    first = sample(jax.random.key(1), clean, mask, beta=jnp.inf, n=3)
    np.testing.assert_array_equal(first, jnp.broadcast_to(jnp.array([1, 1, 1, 0, 0, 0], bool), (50, 6)))
    counts = jnp.arange(50) % 7
    some = sample(jax.random.key(2), rewards, mask, beta=0.5, n=counts)
    np.testing.assert_array_equal(some.sum(-1), jnp.minimum(counts, 5))
    assert not some[:, 4].any()


# --- conditions -------------------------------------------------------------------------------------------------------


def test_buckets_have_equal_mass_and_one_edge_is_a_threshold_on_badness():
    score = draw(12, 1000)
    edges = curation.quantile_edges(score, 5)
    codes = curation.quantile_bucket(score, edges)
    np.testing.assert_array_equal(np.bincount(codes), 200)
    assert all(score[codes == i].max() < score[codes == i + 1].min() for i in range(4))
    assert curation.quantile_edges(score, 1).shape == (0,)
    np.testing.assert_array_equal(curation.quantile_bucket(score, edges[:0]), 0)
    badness, threshold = jnp.array([[1e-4, 5.6e-4], [5.7e-4, 1.0]]), jnp.array([5.6e-4])
    np.testing.assert_array_equal(curation.quantile_bucket(badness, threshold), [[0, 0], [1, 1]])


def test_conditions_are_dropped_field_by_field_and_as_a_whole():
    """Frequencies of 40,000 examples within 4 standard errors: a false alarm in 3,000 runs."""
    n, each, whole = 40_000, jnp.array([0.1, 0.0, 0.6]), 0.2
    codes = jnp.arange(3 * n).reshape(n, 3)
    out = curation.condition_dropout(jax.random.key(13), codes, drop_prob=each, null=-1, drop_all_prob=whole)
    dropped = np.asarray(out == -1)
    np.testing.assert_array_equal(np.where(dropped, codes, out), codes)
    chance = whole + (1 - whole) * np.asarray(each)
    assert np.all(np.abs(dropped.mean(0) - chance) < 4 * np.sqrt(chance * (1 - chance) / n))
    together, expected = dropped[:, [0, 2]].all(-1).mean(), whole + (1 - whole) * 0.06
    assert abs(together - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    np.testing.assert_array_equal(curation.condition_dropout(jax.random.key(0), codes, drop_prob=1.0, null=7), 7)
    np.testing.assert_array_equal(curation.condition_dropout(jax.random.key(0), codes, drop_prob=0.0, null=7), codes)
    assert curation.condition_dropout(jax.random.key(0), jnp.arange(4), drop_prob=0.5, null=-1).shape == (4,)


def test_private_vectors_are_clipped_as_a_whole_and_flip_as_the_gaussian_law_says():
    """20,000 releases: flips within 4 standard errors, noise within 4.5 of its deviation: a false alarm in 10,000."""
    x = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
    clipped = curation.gaussian_mechanism(jax.random.key(0), x, clip_norm=1.0, sigma=0.0)
    np.testing.assert_allclose(clipped, [[0.6, 0.8], [0.3, 0.4], [0, 0], [0, 0], [0, 0]], rtol=1e-14)
    slope = jax.grad(lambda x: curation.gaussian_mechanism(jax.random.key(0), x, clip_norm=1.0, sigma=0.0).sum())
    np.testing.assert_array_equal(slope(jnp.zeros((1, 2))), 1)
    n, clip_norm, sigma = 20_000, 2.0, 0.7
    rows = jnp.broadcast_to(jnp.array([1.0, 0.2, -0.3]), (n, 3))
    released = np.asarray(curation.gaussian_mechanism(jax.random.key(14), rows, clip_norm=clip_norm, sigma=sigma))
    std = sigma * clip_norm
    assert abs((released - rows).std() / std - 1) < 4.5 / np.sqrt(6 * n)
    flips = scipy.stats.norm.cdf(-0.8 / (np.sqrt(2) * std))
    assert abs((released[:, 0] < released[:, 1]).mean() - flips) < 4 * np.sqrt(flips * (1 - flips) / n)


# --- evaluation: rankings ---------------------------------------------------------------------------------------------


def test_a_pair_is_ranked_right_exactly_where_its_loss_is_below_the_threshold():
    ref_chosen, ref_rejected, chosen, rejected = 4 * draw(15, 4, 500)
    loss = losses.pairwise(chosen - ref_chosen, rejected - ref_rejected, beta=0.3)
    threshold = evaluation.flip_loss_threshold(ref_chosen, ref_rejected, beta=0.3)
    ranked = evaluation.ranking_accuracy(chosen, rejected)
    np.testing.assert_array_equal(ranked == 1, loss <= threshold)
    assert 0.3 < ranked.mean() < 0.7
    thresholds = evaluation.flip_loss_threshold(jnp.array([0.0, 2.0]), jnp.array([5.0, 0.0]), beta=0.1)
    np.testing.assert_allclose(thresholds, [0.474077, 0.798139], atol=5e-7)


def test_accuracies_of_a_few_pairs():
    chosen, rejected = jnp.array([-40.0, -45.0, -12.5, -9.0, jnp.nan]), jnp.array([-55.0, -40.0, -9.0, -9.0, 0.0])
    np.testing.assert_array_equal(evaluation.ranking_accuracy(chosen, rejected), [1, 0, 0, 1, np.nan])
    np.testing.assert_array_equal(evaluation.implicit_reward_accuracy(chosen, rejected), [1, 0, 0, 0, np.nan])
    lengths = {"len_chosen": jnp.array([10, 50, 5, 9, 1]), "len_rejected": jnp.array([50, 10, 2, 3, 1])}
    np.testing.assert_array_equal(evaluation.ranking_accuracy(chosen, rejected, **lengths), [0, 1, 1, 1, np.nan])
    with pytest.raises(ValueError, match="go together"):
        evaluation.ranking_accuracy(chosen, rejected, len_chosen=chosen)


def test_the_idealized_accuracy_is_that_of_the_tilt():
    """With Bradley-Terry labels DPO's optimum is ref e^{r/beta}: its rankings, computed directly."""
    log_ref, reward = draw(16, 2, 40)
    beta = jnp.linspace(0.2, 3.0, 20)
    tilt = log_ref.reshape(2, 20) + reward.reshape(2, 20) / beta
    prob = jax.nn.sigmoid(reward[:20] - reward[20:])
    out = evaluation.idealized_ranking_accuracy(log_ref[:20], log_ref[20:], prob, beta=beta)
    np.testing.assert_array_equal(out, evaluation.ranking_accuracy(*tilt))
    assert 0 < out.mean() < 1
    certain = evaluation.idealized_ranking_accuracy(
        -9.0 * jnp.ones(3), jnp.zeros(3), jnp.array([1.0, 0, 1.5]), beta=0.1
    )
    np.testing.assert_array_equal(certain, [1, 0, np.nan])


# --- evaluation: displacement -----------------------------------------------------------------------------------------


def test_the_four_token_example_is_displaced_first_and_learned_later():
    parameters = {"W": jnp.array([[-2.5, -1.5], [-3.0, -1.5], [0.5, 0.0], [1.5, 0.5]]), "h": jnp.array([0.0, -0.25])}
    logp = lambda parameters: jax.nn.log_softmax(parameters["W"] @ parameters["h"])  # noqa: E731
    chosen, rejected = (jax.grad(lambda x, i=i: logp(x)[i])(parameters) for i in range(2))
    np.testing.assert_allclose(evaluation.displacement_rate(chosen, rejected), -0.542874694, rtol=1e-8)

    def step(parameters, _):
        loss = lambda x: losses.pairwise(logp(x)[:1], logp(x)[1:2], beta=0.1)[0]  # noqa: E731
        slope = jax.grad(loss)(parameters)
        return jax.tree.map(lambda x, g: x - 0.5 * g, parameters, slope), jnp.exp(logp(parameters)[0])

    probabilities = jax.jit(lambda x: jax.lax.scan(step, x, length=201)[1])(parameters)
    np.testing.assert_allclose(probabilities[jnp.array([0, 60])], [0.3036, 0.1054], atol=5e-5)
    assert probabilities[200] > 0.998


def test_a_table_of_logits_is_never_displaced():
    logits = draw(17, 5)
    pi = jax.nn.softmax(logits)
    chosen, rejected = (jax.grad(lambda x, i=i: jax.nn.log_softmax(x)[i])(logits) for i in range(2))
    np.testing.assert_allclose(evaluation.displacement_rate(chosen, rejected), 1 - pi[0] + pi[1], rtol=1e-12)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_ches_scores_of_sums_and_means_of_hidden_states(length_normalize):
    hidden, other = draw(18, 3, 5, 2), draw(19, 3, 4, 2)
    mask, other_mask = jnp.arange(5) < jnp.array([[5], [2], [3]]), jnp.arange(4) < jnp.array([[1], [4], [3]])
    out = evaluation.ches_score(
        jnp.where(mask[..., None], hidden, jnp.nan), mask, jnp.where(other_mask[..., None], other, jnp.inf), other_mask,
        length_normalize=length_normalize,
    )  # fmt: skip
    reduce = np.mean if length_normalize else np.sum
    for b in range(3):
        w, r = reduce(hidden[b][mask[b]], axis=0), reduce(other[b][other_mask[b]], axis=0)
        np.testing.assert_allclose(out[b], w @ r - w @ w, rtol=1e-12)
    same = evaluation.ches_score(hidden, mask, hidden, mask, length_normalize=length_normalize)
    np.testing.assert_array_equal(same, 0)


# --- evaluation: win rates --------------------------------------------------------------------------------------------


def judged(n=300, phi=-1.3, psi=0.7):
    """Preferences that are exactly logistic, with lengths that favour the model, and the rate without that effect."""
    len_model, len_base, difficulty = 200 * jnp.exp(0.5 * draw(20, n)), 150 * jnp.exp(0.5 * draw(21, n)), draw(22, n)
    gap = len_base - len_model
    fair = 0.4 + psi * difficulty
    preference = jax.nn.sigmoid(fair + phi * jnp.tanh(gap / gap.std(ddof=1)))
    return preference, len_model, len_base, difficulty, jax.nn.sigmoid(fair).mean()


def test_the_length_effect_is_removed_and_the_fit_is_exact():
    *data, fair = judged()
    out = jax.jit(evaluation.length_controlled_winrate)(*data)
    np.testing.assert_allclose(out.coefficients, [0.4, -1.3, 0.7], rtol=1e-9)
    np.testing.assert_allclose([out.controlled, out.raw], [fair, data[0].mean()], rtol=1e-10)
    assert out.raw - out.controlled > 0.03
    *plain, fair = judged(psi=0.0)
    out = evaluation.length_controlled_winrate(*plain[:3])
    np.testing.assert_allclose([out.controlled, fair], jax.nn.sigmoid(0.4), rtol=1e-10)
    *fair_judge, _ = judged(phi=0.0)
    out = evaluation.length_controlled_winrate(*fair_judge)
    np.testing.assert_allclose(out.controlled, out.raw, rtol=1e-10)


def test_win_rates_of_hard_labels_obey_the_score_equations_and_swap():
    preference, len_model, len_base, difficulty, _ = judged()
    label = jax.random.bernoulli(jax.random.key(23), preference).astype(float)
    out = evaluation.length_controlled_winrate(label, len_model, len_base, difficulty, l2=0.02)
    gap = len_base - len_model
    features = jnp.stack([jnp.ones(300), jnp.tanh(gap / gap.std(ddof=1)), difficulty])
    residual = jax.nn.sigmoid(out.coefficients @ features) - label
    np.testing.assert_allclose(features @ residual / 300, -0.02 * out.coefficients.at[0].set(0), atol=1e-12)
    swapped = evaluation.length_controlled_winrate(1 - label, len_base, len_model, difficulty, l2=0.02)
    np.testing.assert_allclose(swapped.controlled, 1 - out.controlled, rtol=1e-10)
    twice = [jnp.concatenate([x, x]) for x in (jnp.zeros(300), len_model, len_base, difficulty)]
    twice[0] = jnp.concatenate([jnp.ones(300), jnp.zeros(300)])
    weight = jnp.concatenate([preference, 1 - preference])  # soft labels as two rows each; std has 599 for 299
    rows = evaluation.length_controlled_winrate(*twice, sample_weight=weight)
    soft = evaluation.length_controlled_winrate(preference, len_model, len_base, difficulty)
    np.testing.assert_allclose(rows.controlled, soft.controlled, rtol=2e-4)


def test_win_rates_against_oneself_without_spread_or_without_a_loss():
    ties = evaluation.length_controlled_winrate(jnp.full(8, 0.5), jnp.arange(8), jnp.arange(8))
    np.testing.assert_allclose([ties.controlled, ties.raw], 0.5, rtol=1e-14)
    _, len_model, len_base, difficulty, _ = judged(40)
    for dtype in (jnp.float32, jnp.float64):
        always = evaluation.length_controlled_winrate(jnp.ones(40, dtype), len_model, len_base, difficulty)
        np.testing.assert_allclose([always.controlled, always.raw], 1, rtol=1e-6)
        separable = evaluation.length_controlled_winrate((len_model > len_base).astype(dtype), len_model, len_base)
        assert np.isfinite(separable.coefficients).all()
        held = evaluation.length_controlled_winrate((len_model > len_base).astype(dtype), len_model, len_base, l2=0.1)
        assert -8 < held.coefficients[1] < -1


def test_the_gradient_of_a_win_rate_is_that_of_the_refitted_one():
    *data, _ = judged(30)
    rate = jax.jit(lambda *data: evaluation.length_controlled_winrate(*data, l2=0.05).controlled)
    for i, direction in enumerate(draw(24, 4, 30) * jnp.array([0.01, 30.0, 30.0, 1.0])[:, None]):
        moved = [rate(*[x + s * 1e-4 * direction * (i == j) for j, x in enumerate(data)]) for s in (1, -1)]
        slope = jax.grad(rate, i)(*data) @ direction
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-4, rtol=1e-6)

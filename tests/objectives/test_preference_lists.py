"""List losses: golden values, reductions to pairs, optima on all actions at once, and gradients in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import lists, losses

pytestmark = pytest.mark.usefixtures("x64")

SCORES = [0.7, 0.2, -0.1, -0.9]
LABELS, REWARDS = [3.0, 2.0, 1.0, 0.0], [1.0, 0.5, 0.0, -1.0]
PI_W, PI_L = [-40.0, -45.0, -12.5], [-55.0, -60.0, -9.0]
REF_W, REF_L = [-42.0, -42.0, -13.0], [-50.0, -50.0, -10.0]


def row(values):
    return jnp.asarray([values], dtype=jnp.float64)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def softplus(z):
    return np.logaddexp(0, z)


def of_policy(loss, rewards, beta, theta, reference, **hyper):
    """A list loss of all actions of one prompt, each listed once, for the policy `softmax(theta)`."""
    return loss(jax.nn.log_softmax(theta), reference, rewards, beta=beta, **hyper).sum()


# --- golden values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "labels", "hyper", "value"), [
    (lists.lipo, LABELS, {}, 4.168774762),
    (lists.infonca, REWARDS, {"temperature": 0.5}, 1.025680403),
    (lists.nca_list, REWARDS, {"temperature": 0.5}, 1.212477851),
    (lists.exo_list, REWARDS, {"temperature": 0.5}, 0.1931020746),
])  # fmt: skip
def test_golden_lists(loss, labels, hyper, value):
    policy, reference = row(SCORES) / 0.1 - 40, jnp.full((1, 4), -40.0)
    np.testing.assert_allclose(loss(policy, reference, row(labels), beta=0.1, **hyper), [value], rtol=1e-9)


def test_golden_plackett_luce_and_gepo():
    np.testing.assert_allclose(
        lists.plackett_luce_dpo(row(SCORES) / 0.1 - 40, jnp.full((1, 4), -40.0), beta=0.1), [1.914801422], rtol=1e-9
    )
    gepo = losses.group_mean_pairwise(row([9.0, 4.0]), row([-2.0, 1.0, -6.0]), beta=0.1)
    np.testing.assert_allclose(gepo, [6.595999991], rtol=1e-9)


def test_golden_set_contrast():
    mean_logp, labels = row([-0.5, -0.8, -0.7, -1.6]), row([1, 1, 0, 0])
    np.testing.assert_allclose(lists.set_contrast(mean_logp, labels), [1.309980575], rtol=1e-9)
    np.testing.assert_allclose(lists.set_contrast(mean_logp, labels, detach_worse=True), [1.309980575], rtol=1e-9)
    np.testing.assert_allclose(lists.set_contrast(mean_logp, labels, boundary=0.2), [2.0672187], rtol=1e-7)


def test_golden_transport():
    pair = [jnp.asarray(x, jnp.float64) for x in (PI_W, PI_L, REF_W, REF_L)]
    paired, unpaired = (f(*pair, beta=0.1) for f in (lists.aot_paired, lists.aot_unpaired))
    np.testing.assert_allclose(paired, [0.718459648, 0.4031860489, 0.4031860489], rtol=1e-9)
    np.testing.assert_allclose(unpaired, [0.4031860489, 0.4554924815, 0.6443966601], rtol=1e-9)


# --- two responses are a pair -----------------------------------------------------------------------------------------


def dpo(policy, reference, beta):
    h = policy - reference
    return softplus(-beta * (h[:, 0] - h[:, 1]))


def test_two_responses_make_dpo():
    policy, reference = normal(0, 5, 2), normal(1, 5, 2)
    best_first = jnp.tile(row([1, 0]), (5, 1))
    hard = 1e4 * best_first
    close = lambda a, beta: np.testing.assert_allclose(a, dpo(policy, reference, beta), rtol=1e-12)  # noqa: E731
    close(lists.plackett_luce_dpo(policy, reference, beta=0.3), 0.3)
    close(lists.infonca(policy, reference, hard, beta=0.3, temperature=1.0), 0.3)
    close(lists.brain(policy, reference, reference, hard), 1.0)
    close(losses.pairwise_list(0.3 * (policy - reference), best_first), 0.3)
    gain = 1 / np.log(2) - 1 / np.log(3)  # LiPO's only pair: 2^1 - 2^0 times the discounts of the two ranks
    close(lists.lipo(policy, reference, best_first, beta=0.3) / gain, 0.3)
    close(lists.contrastive_ranking(0.3 * (policy - reference), best_first, bias=1.0), 0.3)
    close(lists.set_contrast(policy - reference, best_first), 1.0)
    close(lists.pro(policy - reference, best_first, nll_weight=0.0), 1.0)


def test_brain_is_infonca_when_all_laws_but_the_policy_are_one():
    policy, reference, rewards = normal(2, 3, 5), normal(3, 3, 5), normal(4, 3, 5)
    np.testing.assert_allclose(
        lists.brain(policy, reference, reference, rewards / 0.7),
        lists.infonca(policy, reference, rewards, beta=1.0, temperature=0.7),
        rtol=1e-12,
    )


# --- optima and gradients ---------------------------------------------------------------------------------------------


def brain_of_all(policy, reference, rewards, *, beta, proposal):
    """Every action once: `q` drops out of both sides once it is uniform over what is listed."""
    return lists.brain(policy, proposal, reference, rewards / beta)


@pytest.mark.parametrize("loss", ["infonca", "exo_list", "brain"])
def test_the_tilt_is_the_minimiser(loss):
    reference, rewards, beta = jax.nn.log_softmax(normal(5, 1, 5)), normal(6, 1, 5), 0.4
    if loss == "brain":
        f, hyper = brain_of_all, {"proposal": jnp.zeros((1, 5))}
    else:
        f, hyper = getattr(lists, loss), {"temperature": 1.0}
    gradient = jax.grad(lambda theta: of_policy(f, rewards, beta, theta, reference, **hyper))
    tilt = reference + rewards / beta
    np.testing.assert_allclose(gradient(tilt), 0, atol=1e-12)
    value = of_policy(f, rewards, beta, tilt, reference, **hyper)
    for seed in range(5):  # both are convex in the direction of the logits near the optimum, and less is nowhere
        assert of_policy(f, rewards, beta, tilt + normal(7 + seed, 1, 5), reference, **hyper) > value
        assert np.abs(gradient(tilt + normal(7 + seed, 1, 5))).max() > 1e-3


def test_nca_fixes_the_level_of_the_scores():
    """Free scores: `e^{beta h_i} = G a_i`, where the softmaxes of the others leave a constant open."""
    rewards, beta = normal(12, 1, 4), 0.3
    target = jax.nn.softmax(rewards / 0.5)
    best = jnp.log(4 * target) / beta
    f = lambda h: lists.nca_list(h, jnp.zeros((1, 4)), rewards, beta=beta, temperature=0.5).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(best), 0, atol=1e-12)
    assert np.abs(jax.grad(f)(best + 1)).max() > 1e-3


@pytest.mark.parametrize("name", ["plackett_luce_dpo", "infonca", "exo_list", "lipo", "brain"])
def test_coefficients_of_a_prompt_sum_to_zero(name):
    policy, reference, proposal, rewards = normal(20, 4, 3, 6)
    calls = {
        "plackett_luce_dpo": lambda x: lists.plackett_luce_dpo(x, reference, beta=0.3),
        "infonca": lambda x: lists.infonca(x, reference, rewards, beta=0.3, temperature=0.5),
        "exo_list": lambda x: lists.exo_list(x, reference, rewards, beta=0.3, temperature=0.5),
        "lipo": lambda x: lists.lipo(x, reference, rewards, beta=0.3),
        "brain": lambda x: lists.brain(x, proposal, reference, rewards),
    }
    gradient = jax.grad(lambda x: calls[name](x).sum())(policy)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-13)
    assert (np.abs(gradient) > 1e-3).any(-1).all()


def test_brain_gradient_is_the_posterior_against_a_self_normalised_baseline():
    policy, proposal, reference, goodness = normal(21, 4, 3, 6)
    gradient = jax.grad(lambda x: lists.brain(x, proposal, reference, goodness).sum())
    a, b = jax.nn.softmax(reference - proposal + goodness), jax.nn.softmax(policy - proposal)
    np.testing.assert_allclose(gradient(policy), b - a, atol=1e-14)
    np.testing.assert_allclose(gradient(reference + goodness), 0, atol=1e-14)


# --- ranks and weights ------------------------------------------------------------------------------------------------


def test_lambda_weight_is_what_a_swap_changes_in_dcg():
    score, label = normal(22, 1, 5), row([3, 0, 2, 2, 1])

    def dcg(order):
        return sum((2 ** label[0, i] - 1) / np.log(2 + k) for k, i in enumerate(order))

    order = list(np.argsort(-score[0]))
    weight = lists.lambda_pair_weight(score, label)
    for i, j in itertools.combinations(range(5), 2):
        swapped = [j if k == i else i if k == j else k for k in order]
        np.testing.assert_allclose(weight[0, i, j], abs(dcg(order) - dcg(swapped)), atol=1e-12)
    np.testing.assert_allclose(lists.lambda_pair_weight(score + 7, label), weight, atol=1e-12)


def test_pro_and_rrhf_written_out():
    m, r = [-1.2, -0.4, -2.0, -0.9], [0.3, -0.5, 1.1, 0.8]
    total = 0.0
    for k in range(4):
        worse = [i for i in range(4) if r[i] < r[k]]
        if worse:
            own = m[k] * max(r[k] - r[i] for i in worse)
            total += np.log(np.exp(own) + sum(np.exp(m[i] * (r[k] - r[i])) for i in worse)) - own
    np.testing.assert_allclose(lists.pro(row(m), row(r), nll_weight=0.3), [total + 0.3 * 2.0], rtol=1e-12)
    hinges = sum(max(0, m[j] - m[i]) for i in range(4) for j in range(4) if r[i] > r[j])
    assert hinges > 0
    np.testing.assert_allclose(lists.rrhf(row(m), row(r)), [hinges + 2.0], rtol=1e-12)
    np.testing.assert_allclose(lists.rrhf(row(m), row([1, 1, 1, 1])), [1.2], rtol=1e-12)  # ties: the first one's NLL


def test_contrastive_ranking_has_its_bias_on_the_worse_segment():
    score, label, bias = normal(23, 1, 4), row([1, 3, 0, 2]), 0.6
    f = lambda s: lists.contrastive_ranking(s, label, bias=bias).sum()  # noqa: E731
    pairs = [(i, j) for i in range(4) for j in range(4) if label[0, i] > label[0, j]]
    z = np.array([score[0, i] - bias * score[0, j] for i, j in pairs])
    np.testing.assert_allclose(f(score), softplus(-z).mean(), rtol=1e-12)
    expected = np.zeros(4)
    for (i, j), slope in zip(pairs, 1 / (1 + np.exp(z)) / 6, strict=True):
        expected[i] -= slope
        expected[j] += bias * slope
    np.testing.assert_allclose(jax.grad(f)(score)[0], expected, rtol=1e-12)

    def shift(bias):
        moved, still = (lists.contrastive_ranking(s, label, bias=bias) for s in (score + 5, score))
        return moved - still

    np.testing.assert_allclose(shift(1.0), 0, atol=1e-12)
    assert shift(bias) < -0.1  # likelier data are better


def test_contrastive_ranking_has_the_soft_optimal_policy_as_optimum():
    """One state, pairs of actions labelled by Bradley-Terry of the advantage: `softmax(A / alpha)`."""
    advantage, alpha = normal(24, 4), 0.3

    def population(theta):
        score = alpha * jax.nn.log_softmax(theta)
        i, j = (jnp.asarray(x) for x in zip(*itertools.permutations(range(4), 2), strict=True))
        loss = lists.contrastive_ranking(jnp.stack([score[i], score[j]], -1), jnp.tile(row([1, 0]), (12, 1)), bias=1.0)
        return jax.nn.sigmoid(advantage[i] - advantage[j]) @ loss

    np.testing.assert_allclose(jax.grad(population)(advantage / alpha), 0, atol=1e-13)
    assert np.abs(jax.grad(population)(advantage)).max() > 1e-3


# --- AFT --------------------------------------------------------------------------------------------------------------


def test_set_contrast_stops_pushing_at_the_boundary():
    """One good and one bad response: the pull and the push are equal at `boundary` below, of opposite sign beside."""
    slope = lambda gap: jax.grad(  # noqa: E731
        lambda m: lists.set_contrast(m, row([1, 0]), boundary=0.7).sum()
    )(row([-0.4, -0.4 - gap]))[0, 1]
    np.testing.assert_allclose(slope(0.7), 0, atol=1e-15)
    assert slope(0.6) > 1e-3 and slope(0.8) < -1e-3  # noqa: PT018


def test_set_contrast_detached_moves_the_good_alone():
    m, labels = normal(25, 2, 4), jnp.asarray([[1, 0, 0, 1], [0, 1, 0, 0]])
    whole, detached = (
        jax.grad(lambda m, flag=flag: lists.set_contrast(m, labels, detach_worse=flag).sum())(m)
        for flag in (False, True)
    )
    np.testing.assert_allclose(detached, jnp.where(labels == 1, whole, 0), atol=1e-14)
    assert (whole[labels == 0] > 0).all()
    with pytest.raises(ValueError, match="boundary"):
        lists.set_contrast(m, labels, boundary=0.1, detach_worse=True)


def test_set_contrast_is_invariant_to_a_shift_and_ranks_in_one_logarithm():
    m, labels = normal(26, 1, 4), row([2, 0, 1, 1])
    for boundary in (None, 0.3):
        f = lambda m, b=boundary: lists.set_contrast(m, labels, boundary=b)  # noqa: E731
        np.testing.assert_allclose(f(m + 3), f(m), rtol=1e-12)
    x = np.asarray(m[0])
    pairs = [(i, j) for i in range(4) for j in range(4) if labels[0, i] > labels[0, j]]
    floors = {j: min(x[i] for i, k in pairs if k == j) - 0.6 for _, j in pairs}
    total = 1 + sum(np.exp(x[j] - x[i]) + np.exp(floors[j] - x[j]) for i, j in pairs)
    np.testing.assert_allclose(lists.set_contrast(m, labels, boundary=0.3), [np.log(total)], rtol=1e-12)


# --- trees ------------------------------------------------------------------------------------------------------------


def test_tree_of_equal_weights_is_lipo_on_means_of_steps():
    logp, ref, values = normal(31, 2, 3, 6), normal(32, 2, 3, 6), row([0.2, 0.9, -0.3]).repeat(2, 0)
    segments = jnp.tile(jnp.array([0, 0, 0, 1, 1, -1]), (2, 3, 1))
    h = logp - ref
    mean = (h[..., :3].mean(-1) + h[..., 3:5].mean(-1)) / 2
    tree = lists.tree_tpo(
        logp, ref, segments, jnp.full((2, 3, 4), 1.7), values, beta=0.4
    )  # two steps that are not there
    np.testing.assert_allclose(tree, lists.lipo(mean, 0 * mean, values, beta=0.4), rtol=1e-12)


def test_step_weights_are_cosines_to_the_best_response():
    steps = jnp.asarray([[[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, -1.0]], [[1.0, 1.0], [0.0, 0.0]]]])
    weight = lists.step_similarity_weight(steps, jnp.array([0]))
    np.testing.assert_allclose(weight, [[[2, 2], [2, 0], [1 + np.sqrt(0.5), 1]]], rtol=1e-12)
    score = lists.step_weighted_score(row([1.0, 3.0, 7.0, 9.0]), jnp.array([[0, 0, 1, -1]]), row([0.5, 1.5, 4.0]))
    np.testing.assert_allclose(score, [(0.5 * 2 + 1.5 * 7) / 2], rtol=1e-12)


# --- groups, transport, heads -----------------------------------------------------------------------------------------


def test_group_means():
    chosen, rejected = normal(33, 4, 3), normal(34, 4, 2)
    single = losses.group_mean_pairwise(chosen[:, :1], rejected[:, :1], beta=0.3, variance_coef=9.0)
    np.testing.assert_allclose(single, softplus(-0.3 * (chosen[:, 0] - rejected[:, 0])), rtol=1e-12)
    shifted = losses.group_mean_pairwise(chosen + 4, rejected + 4, beta=0.3)
    np.testing.assert_allclose(shifted, losses.group_mean_pairwise(chosen, rejected, beta=0.3), rtol=1e-12)
    tied = jnp.broadcast_to(chosen[:, :1], (4, 3))
    expected = softplus(-0.3 * (chosen[:, 0] - rejected.mean(-1)))
    np.testing.assert_allclose(losses.group_mean_pairwise(tied, rejected, beta=0.3), expected, rtol=1e-12)
    slopes = [
        jax.grad(lambda x, c=c: losses.group_mean_pairwise(x, rejected, beta=0.3, variance_coef=c).sum())(chosen)
        for c in (0.0, 1.0)
    ]
    np.testing.assert_allclose((slopes[1] - slopes[0]).sum(-1), 0, atol=1e-14)


def test_sorting_is_the_cheapest_coupling():
    pi_w, pi_l, ref_w, ref_l = normal(35, 4, 5)
    best = {
        lists.aot_paired: (pi_w - pi_l, ref_w - ref_l),
        lists.aot_unpaired: (pi_w - ref_w, pi_l - ref_l),
    }
    for loss, (a, b) in best.items():
        costs = [softplus(-0.7 * (a - b[jnp.asarray(p)])).sum() for p in itertools.permutations(range(5))]
        value = loss(pi_w, pi_l, ref_w, ref_l, beta=0.7)
        np.testing.assert_allclose(value.sum(), min(costs), rtol=1e-12)
        smooth = loss(pi_w, pi_l, ref_w, ref_l, beta=0.7, flip_prob=0.2)
        np.testing.assert_allclose(smooth - value, 0.2 * 0.7 * (np.sort(a) - np.sort(b)), atol=1e-12)


def test_heads_count_alike_however_many_pairs_they_have():
    pair, heads = normal(36, 4, 6), jnp.array([0, 2, 2, 0, 2, -1])
    dpo = softplus(-0.2 * ((pair[0] - pair[2]) - (pair[1] - pair[3])))
    value = lists.mah_dpo(*pair, heads, n_heads=4, beta=0.2)
    expected = (dpo[jnp.array([0, 3])].mean() + dpo[jnp.array([1, 2, 4])].mean()) / 2
    np.testing.assert_allclose(value.mean(), expected, rtol=1e-12)
    one = lists.mah_dpo(*pair, jnp.zeros(6, int), n_heads=1, beta=0.2)
    np.testing.assert_allclose(one, dpo, rtol=1e-12)


# --- invariances ------------------------------------------------------------------------------------------------------


def test_lists_in_another_order_and_with_padding_give_the_same():
    policy, reference, rewards = normal(37, 3, 2, 5)
    labels = jnp.asarray([[1, 0, 2, 1, 0], [0, 0, 3, 1, 2]])
    order = jnp.array([3, 0, 4, 2, 1])
    pad = lambda x, fill: jnp.concatenate([x, jnp.full((2, 1), fill)], -1)  # noqa: E731
    mask = pad(jnp.ones((2, 5)), 0)
    for loss, others in {
        lambda p, x, y, mask=None: lists.infonca(p, x, y, beta=0.3, temperature=0.5, mask=mask): (reference, rewards),
        lambda p, x, y, mask=None: lists.nca_list(p, x, y, beta=0.3, temperature=0.5, mask=mask): (reference, rewards),
        lambda p, x, y, mask=None: lists.exo_list(p, x, y, beta=0.3, temperature=0.5, mask=mask): (reference, rewards),
        lists.lipo: (reference, labels),
        lists.rrhf: (rewards,),
        lists.pro: (rewards,),
        lists.set_contrast: (labels,),
        lists.contrastive_ranking: (labels,),
    }.items():
        value = loss(policy, *others)
        np.testing.assert_allclose(loss(policy[:, order], *(x[:, order] for x in others)), value, rtol=1e-12)
        padded = loss(pad(policy, jnp.nan), *(pad(x, 99) for x in others), mask=mask)
        np.testing.assert_allclose(padded, value, rtol=1e-12)

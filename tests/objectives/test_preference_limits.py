"""Where preference methods coincide, what they cost at `pi = ref`, what their helpers do, and what bad input gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import anchored, links, pair_scores, pair_terms, pairs, reference_free

pytestmark = pytest.mark.usefixtures("x64")

BETA = 0.7
PAIR = tuple(np.random.default_rng(0).normal(size=(4, 8)) * 3 - 12)
POLICIES, (REF_CHOSEN, _) = PAIR[:2], PAIR[2:]
LENGTHS = {"len_chosen": np.arange(3, 11), "len_rejected": np.arange(12, 4, -1)}
EQUAL = {"len_chosen": np.full(8, 7), "len_rejected": np.full(8, 7)}
NLL = {"nll": np.linspace(0.5, 2.0, 8)}
CALIBRATION = {"policy_calibration": PAIR[0], "ref_calibration": PAIR[2]}
KLS = {"kl_chosen": np.linspace(0.3, 3.0, 8), "kl_rejected": np.linspace(2.0, 0.1, 8)}
PREVIOUS = {"previous_chosen": PAIR[1], "previous_rejected": PAIR[0]}


def same(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-13)


# --- limits -----------------------------------------------------------------------------------------------------------

ARE_DPO = {
    "cdpo": (pairs.cdpo, {"flip_prob": 0.0}),
    "rdpo": (pairs.rdpo, {"flip_prob": 0.0}),
    "soft_dpo": (pairs.soft_dpo, {"label_prob": 1.0}),
    "odpo": (pairs.odpo, {"margin": 0.0}),
    "step_apo": (pairs.step_apo, {"value_chosen": 0.4, "value_rejected": 0.4}),
    "r_dpo, alpha": (pairs.r_dpo, {"alpha": 0.0, **LENGTHS}),
    "r_dpo, lengths": (pairs.r_dpo, EQUAL),
    "gpo": (pairs.gpo, {"link": links.logistic_link}),
    "dpo_gamma": (pair_scores.dpo_gamma, {"gamma": 1.0}),
    "dpop": (pair_scores.dpop, {"penalty": 0.0}),
    "tdpo2": (pair_scores.tdpo2, {"alpha": 0.0, **KLS}),
    "tdpo1": (pair_scores.tdpo1, {"kl_chosen": KLS["kl_chosen"], "kl_rejected": KLS["kl_chosen"]}),
    "f_dpo": (pair_scores.f_dpo, {"kind": "reverse_kl"}),
    "wpo": (pair_terms.wpo, {"weight_chosen": 1.0, "weight_rejected": 1.0}),
    "beta_dpo": (pair_terms.beta_dpo, {}),
    "mm_dpo": (pair_terms.mm_dpo, {"nll_weight": 0.0, **NLL}),
    "rpo": (pair_terms.rpo, {"eta": 0.0, **NLL}),
    "iterative_rpo": (pair_terms.iterative_rpo, {"alpha": 0.0, "len_chosen": LENGTHS["len_chosen"]}),
    "vpo": (pair_terms.vpo, {"alpha": 0.0, "attitude": "optimistic", **CALIBRATION}),
    "xpo": (pair_terms.xpo, {"alpha": 0.0, "policy_exploration": PAIR[1]}),
}


@pytest.mark.parametrize(("method", "given"), ARE_DPO.values(), ids=ARE_DPO)
def test_at_its_limit_a_method_is_dpo(method, given):
    same(method(*PAIR, beta=BETA, **given), pairs.dpo(*PAIR, beta=BETA))


def test_other_limits_of_pairs():
    dpo = pairs.dpo(*PAIR, beta=BETA)
    same(pair_scores.length_normalized_dpo(*PAIR, beta=7 * BETA, **EQUAL), dpo)
    same(pair_scores.flex_dpo(*PAIR, beta_chosen=BETA, beta_rejected=BETA), dpo)
    without = pair_scores.dpo_gamma(*PAIR, beta=BETA, gamma=0.0)
    same(reference_free.cpo(*POLICIES, beta=BETA, nll=0.0), without)
    same(pair_scores.f_dpo(*PAIR, kind="chi2_kl", beta=1e-3), pair_scores.chi_po(*PAIR, beta=1e-3))
    ipo = pairs.ipo(*PAIR, beta=BETA, normalize=False)
    same(pair_scores.inpo(*PAIR, **PREVIOUS, eta=BETA, ratio=1.0), ipo)
    against_previous = pairs.ipo(*POLICIES, *PREVIOUS.values(), beta=BETA, normalize=False)
    same(pair_scores.inpo(*PAIR, **PREVIOUS, eta=BETA, ratio=0.0), against_previous)
    same(pairs.gpo(*PAIR, beta=2 * BETA, link=links.squared_link()), (2 * BETA) ** 2 * ipo)
    half = pairs.soft_dpo(*PAIR, beta=BETA, label_prob=0.5)
    same(pairs.dno(*PAIR, beta=BETA, win_rate_chosen=0.3, win_rate_rejected=0.3), half)
    pessimist = pair_terms.vpo(*PAIR, **CALIBRATION, attitude="pessimistic", beta=BETA, alpha=0.2)
    likelihood = pair_terms.rpo(*PAIR, nll=REF_CHOSEN - PAIR[0], beta=BETA, eta=0.2 * BETA)
    same(pessimist, likelihood)


def test_limits_without_a_reference():
    simpo = reference_free.simpo(*POLICIES, **LENGTHS, beta=BETA, gamma=0.2)
    same(reference_free.alphapo(*POLICIES, **LENGTHS, beta=BETA, gamma=0.2, alpha=0.0), simpo)
    same(reference_free.alphapo(*POLICIES, **LENGTHS, beta=BETA, gamma=0.2, alpha=1e-9), simpo, rtol=1e-7)
    p, q = (np.exp(x / n) for x, n in zip(POLICIES, LENGTHS.values(), strict=True))
    linear = reference_free.alphapo(*POLICIES, **LENGTHS, beta=BETA, gamma=0.0, alpha=-1.0)
    same(linear, links.logistic_link(jnp.asarray(BETA * (p - q))))
    same(anchored.redi(*POLICIES, **LENGTHS, alpha=0.0), -np.log(p))
    same(anchored.redi(*POLICIES, **LENGTHS, alpha=0.5, gamma=2.0), -np.log(p) + 0.5 * q**2 * np.log(q))
    odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    same(reference_free.orpo(*POLICIES, **LENGTHS, nll=0.0), 0.1 * np.log1p(np.exp(-odds)))


def test_limits_of_single_responses():
    policy, reference = PAIR[0], PAIR[2]
    labels = np.arange(8) % 2 * 1.0
    anchor = anchored.kto(policy, reference, labels, beta=BETA, kl_baseline=0.0, desirable_weight=1.3)
    same(anchored.apo_zero_unpaired(policy, reference, labels, beta=BETA, desirable_weight=1.3), anchor)
    both = anchored.bco(policy, reference, 1.0, beta=BETA, baseline=0.0)
    both += anchored.bco(PAIR[1], PAIR[3], 0.0, beta=BETA, baseline=0.0)
    same(anchored.bco_pair(*PAIR, beta=BETA), both)
    assert np.all(both > pairs.dpo(*PAIR, beta=BETA))
    same(anchored.cal_dpo(*PAIR, beta=BETA), pairs.dpo(*PAIR, beta=1.0) + anchored.sppo(*PAIR, beta=BETA, factor=1.0))
    slope = jax.grad(lambda policy: anchored.f_sft(policy, reference, phi="identity", beta=BETA).sum())
    same(slope(policy), -BETA)  # of the negative log-likelihood, times beta


@pytest.mark.parametrize("method", [pairs.dpo, pairs.hinge, pairs.exo_pair, pair_scores.dpop, anchored.apo_zero])
def test_what_a_prompt_adds_to_all_cancels_in_differences(method):
    """An addition to policy and reference always does; to the policy alone, in pairs that see only differences."""
    same(method(*(x + 3 for x in PAIR), beta=BETA), method(*PAIR, beta=BETA))
    shifted = method(PAIR[0] + 3, PAIR[1] + 3, *PAIR[2:], beta=BETA)
    pairwise = method in (pairs.dpo, pairs.hinge, pairs.exo_pair)
    assert np.allclose(shifted, method(*PAIR, beta=BETA)) == pairwise


def test_gradients_of_one_pair():
    """-beta sigmoid(-z) on the chosen, the opposite on the rejected; of probabilities, in the ratio pi_w / pi_l."""
    given = [jnp.asarray(x[:1]) for x in PAIR]
    chosen, rejected = jax.grad(lambda *pair: pairs.dpo(*pair, beta=BETA).sum(), argnums=(0, 1))(*given)
    z = BETA * (given[0] - given[1] - given[2] + given[3])
    same(chosen, -BETA * jax.nn.sigmoid(-z))
    same(rejected, -chosen)
    slopes = jax.grad(lambda p, q: pairs.dpo(jnp.log(p), jnp.log(q), *given[2:]).sum(), argnums=(0, 1))(
        jnp.array([0.3]), jnp.array([0.02])
    )
    same(-slopes[1] / slopes[0], 0.3 / 0.02)


# --- tokens -----------------------------------------------------------------------------------------------------------

TOKENS = -np.random.default_rng(1).exponential(size=(4, 3, 6))
COUNTS = np.array([2, 6, 4]), np.array([5, 3, 4])
MASKS = {name: np.arange(6) < n[:, None] for name, n in zip(("chosen_mask", "rejected_mask"), COUNTS, strict=True)}
CHOSEN, REJECTED = MASKS.values()
SUMS = [np.sum(x * mask, -1) for x, mask in zip(TOKENS, (CHOSEN, REJECTED) * 2, strict=True)]


def test_length_desensitised_dpo_lies_between_cut_and_whole_responses():
    same(pair_scores.ld_dpo(*TOKENS, **MASKS, alpha=1.0), pairs.dpo(*SUMS))
    shorter = np.arange(6) < np.minimum(*COUNTS)[:, None]
    cut = pairs.dpo(*np.sum(TOKENS * shorter, -1))
    same(pair_scores.ld_dpo(*TOKENS, **MASKS, alpha=0.0), cut)
    same(pair_scores.ld_dpo(*TOKENS, **MASKS, alpha=0.3)[2], pairs.dpo(*SUMS)[2])  # equal lengths
    logit = lambda loss: -np.log(np.expm1(loss))  # noqa: E731
    z = 0.3 * logit(pairs.dpo(*SUMS)) + 0.7 * logit(cut)
    same(logit(pair_scores.ld_dpo(*TOKENS, **MASKS, alpha=0.3)), z, rtol=1e-10)


def test_contrastive_preference_discounts_and_biases_the_loser():
    given = {"beta": BETA, **MASKS}
    same(pair_scores.contrastive_preference(*TOKENS, **given, bias=1.0), pairs.dpo(*SUMS, beta=BETA))
    scores = [
        BETA * (x * 0.9 ** np.arange(6) * mask).sum(-1) for x, mask in zip(TOKENS[:2], MASKS.values(), strict=True)
    ]
    loss = lambda winner, loser: np.log1p(np.exp(-(winner - 0.5 * loser)))  # noqa: E731
    discounted = pair_scores.contrastive_preference(*TOKENS[:2], **given, discount=0.9)
    same(discounted, loss(*scores))
    soft = pair_scores.contrastive_preference(*TOKENS[:2], **given, discount=0.9, label_prob=0.8)
    same(soft, 0.8 * loss(*scores) + 0.2 * loss(*scores[::-1]))
    swapped = {"chosen_mask": REJECTED, "rejected_mask": CHOSEN, "beta": BETA}
    same(pair_scores.contrastive_preference(TOKENS[1], TOKENS[0], **swapped, discount=0.9, label_prob=0.2), soft)


# --- at pi = ref ------------------------------------------------------------------------------------------------------

LOG_2 = np.log(2)
FIRST = {
    "dpo": (pairs.dpo, {}, LOG_2),
    "cdpo": (pairs.cdpo, {}, LOG_2),
    "rdpo": (pairs.rdpo, {}, LOG_2),
    "soft_dpo": (pairs.soft_dpo, {"label_prob": 0.3}, LOG_2),
    "hinge": (pairs.hinge, {}, 1.0),
    "ipo": (pairs.ipo, {"normalize": False}, 1 / (4 * BETA**2)),
    "discopop": (pairs.discopop, {}, (1 + LOG_2) / 2),
    "exo_pair": (pairs.exo_pair, {"flip_prob": 0.1}, -LOG_2 - (np.log(0.1) + np.log(0.9)) / 2),
    "dpop": (pair_scores.dpop, {}, LOG_2),
    "length_normalized_dpo": (pair_scores.length_normalized_dpo, LENGTHS, LOG_2),
    "forward": (pair_scores.f_dpo, {"kind": "forward_kl"}, LOG_2),
    "chi_po": (pair_scores.chi_po, {}, LOG_2),
    "bco_pair": (anchored.bco_pair, {}, 2 * LOG_2),
    "nca_pair": (anchored.nca_pair, {}, 2 * LOG_2),
    "apo_zero": (anchored.apo_zero, {}, 1.0),
    "apo_down": (anchored.apo_down, {}, 1.0),
    "sppo": (anchored.sppo, {}, 1 / (4 * BETA**2)),
    "cal_dpo": (anchored.cal_dpo, {}, LOG_2 + 1 / (2 * BETA**2)),
}


@pytest.mark.parametrize(("method", "given", "expected"), FIRST.values(), ids=FIRST)
def test_first_loss(method, given, expected):
    same(method(*POLICIES, *POLICIES, beta=BETA, **given), np.full(8, expected))


def test_first_loss_of_single_responses():
    labels = np.arange(8) % 2 * 1.0
    same(anchored.kto(PAIR[0], PAIR[0], labels, kl_baseline=0.0), np.full(8, 0.5))
    same(anchored.bco(PAIR[0], PAIR[0], labels, baseline=0.0), np.full(8, LOG_2))


# --- baselines --------------------------------------------------------------------------------------------------------


def test_kto_baseline_is_the_mean_but_not_below_zero_on_one_device_or_many():
    policy, reference = np.random.default_rng(3).normal(size=(2, 2, 4)) + np.array([1.0, 0.0])[:, None, None]
    mean = (policy - reference).mean()
    assert mean > 0
    same(anchored.kto_baseline(policy.ravel(), reference.ravel()), mean)
    same(anchored.kto_baseline(reference.ravel(), policy.ravel()), 0.0)
    many = jax.vmap(lambda *x: anchored.kto_baseline(*x, axis_name="d"), axis_name="d")
    same(many(policy, reference), np.full(2, mean))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_numbers_outside_of_their_range_give_what_is_documented():
    for method, given in (
        (pairs.soft_dpo, {"label_prob": 1.1}),
        (pairs.soft_dpo, {"label_prob": -0.1}),
        (pairs.cdpo, {"flip_prob": 1.1}),
        (pairs.rdpo, {"flip_prob": 0.5}),
        (pairs.exo_pair, {"flip_prob": -0.1}),
    ):
        assert np.isnan(method(*PAIR, **given)).any(), method.__name__
    assert np.isnan(pair_scores.contrastive_preference(*TOKENS, **MASKS, label_prob=2.0)).all()
    assert np.isinf(pairs.ipo(*PAIR, normalize=False, beta=0.0)).all()
    assert np.isinf(pair_scores.inpo(*PAIR, **PREVIOUS, eta=0.0)).all()
    assert np.isinf(anchored.cal_dpo(*PAIR, beta=0.0)).all()
    assert np.isinf(anchored.sppo(*PAIR, beta=0.0)).all()
    assert np.isnan(anchored.sppo(*PAIR, win_rate_chosen=0.5, beta=0.0)).all()
    assert np.isinf(pairs.exo_pair(*PAIR, flip_prob=0.0)).all()
    assert np.isnan(pairs.discopop(*POLICIES, *POLICIES, tau=0.0)).all()
    zero = jnp.zeros((1, 1))
    assert np.isnan(anchored.advantage_weighted_nll(zero, zero, zero + 1, beta=0.0)).all()


def test_modes_are_refused_by_name():
    with pytest.raises(ValueError, match="normalize=True"):
        pairs.ipo(*PAIR, normalize=True)
    with pytest.raises(TypeError, match="normalize"):
        pairs.ipo(*PAIR)
    with pytest.raises(ValueError, match="together"):
        pairs.log_ratios(*PAIR, len_chosen=LENGTHS["len_chosen"])
    with pytest.raises(ValueError, match="together"):
        pair_scores.contrastive_preference(*TOKENS[:3], **MASKS)
    with pytest.raises(ValueError, match="attitude must be"):
        pair_terms.vpo(*PAIR, **CALIBRATION, attitude="hopeful")
    with pytest.raises(ValueError, match="phi must be"):
        anchored.f_sft(*PAIR[:2], phi="kl")
    with pytest.raises(ValueError, match=r"must have one shape: .*ref_rejected \(7,\)"):
        pairs.dpo(*PAIR[:3], PAIR[3][:7])
    with pytest.raises(ValueError, match="beta must be a scalar"):
        pairs.dpo(*PAIR, beta=jnp.ones(3))

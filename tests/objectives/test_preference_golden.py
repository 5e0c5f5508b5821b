"""Preference methods against numbers that were computed apart from them, to all digits that were written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import anchored, links, losses, pair_scores, pair_terms, pairs, reference_free

pytestmark = pytest.mark.usefixtures("x64")

POLICY = ([-40.0, -45.0, -12.5], [-55.0, -60.0, -9.0])
REFERENCE = ([-42.0, -42.0, -13.0], [-50.0, -50.0, -10.0])
LENGTHS = {"len_chosen": [100, 12, 5], "len_rejected": [50, 20, 4]}
NONE = {"nll": 0.0}
DIVERGENCES = {"kl_chosen": [0.5, 0.4, 0.3], "kl_rejected": [0.6, 0.1, 0.2]}
DPO = [0.4031860489, 0.4031860489, 0.7184596480]

# method -> (keywords, losses); with `beta=0.1` where it is a keyword and not said
REFERENCED = {
    "dpo": (pairs.dpo, {}, DPO),
    "hinge": (pairs.hinge, {}, [0.3, 0.3, 1.05]),
    "gpo, hinge": (pairs.gpo, {"link": links.hinge_link}, [0.3, 0.3, 1.05]),
    "ipo per token": (pairs.ipo, {"normalize": True, **LENGTHS}, [23.8144, 22.5625, 26.5225]),
    "ipo": (pairs.ipo, {"normalize": False}, [4.0, 4.0, 30.25]),
    "exo_pair": (pairs.exo_pair, {"flip_prob": 1e-3}, [1.657291582, 1.657291582, 2.847859564]),
    "nca_pair": (anchored.nca_pair, {}, [1.234246796, 1.288163710, 1.399887802]),
    "rdpo": (pairs.rdpo, {"flip_prob": 0.1}, [0.3156860489, 0.3156860489, 0.724709648]),
    "cdpo": (pairs.cdpo, {"flip_prob": 0.1}, [0.4731860489, 0.4731860489, 0.713459648]),
    "bco_pair": (anchored.bco_pair, {}, [1.072215854, 1.167616932, 1.412856308]),
    "sppo, hard": (anchored.sppo, {"factor": 1.0}, [9.0, 89.0, 56.25]),
    "sppo, soft": (anchored.sppo, {"win_rate_chosen": 0.8, "win_rate_rejected": 0.3}, [5.0, 50.0, 7.625]),
    "apo_zero": (anchored.apo_zero, {}, [0.8277066715, 0.8433839382, 1.012481791]),
    "apo_down": (anchored.apo_down, {}, [0.8816462251, 0.757369711, 1.024994793]),
    "discopop": (pairs.discopop, {"tau": 0.05}, [0.4965852261, 0.4965852261, 0.807966432]),
    "length_normalized_dpo": (
        pair_scores.length_normalized_dpo,
        {"beta": 5.0, **LENGTHS},
        [0.4374879505, 0.2519290813, 1.136871006],
    ),
    "f_dpo, forward": (pair_scores.f_dpo, {"kind": "forward_kl"}, [3.633924113e-07, 0, 0.7051509328]),
    "f_dpo, js": (pair_scores.f_dpo, {"kind": "js"}, [0.478632498, 0.4047993438, 0.701220272]),
    "f_dpo, alpha": (
        pair_scores.f_dpo,
        {"kind": "alpha", "alpha": 0.5},
        [0.0899729118, 3.149715724e-13, 0.7105225705],
    ),
    "chi_po": (pair_scores.chi_po, {}, [0.212969621, 0.4015383008, 0.7747014532]),
    "tdpo1": (pair_scores.tdpo1, DIVERGENCES, [0.4065152692, 0.3933311148, 0.7133471672]),
    "tdpo2": (pair_scores.tdpo2, {**DIVERGENCES, "alpha": 0.5}, [0.404847883, 0.3982337661, 0.7159002842]),
    "dpop": (pair_scores.dpop, {"penalty": 5.0}, [0.4031860489, 1.171100666, 0.718459648]),
    "cal_dpo": (anchored.cal_dpo, {}, [9.000911466, 89.00091147, 57.22407698]),
    "r_dpo": (pairs.r_dpo, {"alpha": 0.01, **LENGTHS}, [0.2632824673, 0.430446744, 0.7133471672]),
    "dpo_gamma": (pair_scores.dpo_gamma, {"gamma": 0.5}, [0.2873353251, 0.2873353251, 0.7981388694]),
    "odpo": (pairs.odpo, {"margin": 0.3}, [0.5130152524, 0.5130152524, 0.8833821554]),
    "step_apo": (
        pairs.step_apo,
        {"value_chosen": 0.7, "value_rejected": 0.4},
        [0.5130152524, 0.5130152524, 0.8833821554],
    ),
}

ALONE = {
    "cpo": (reference_free.cpo, {"beta": 0.1, **NONE}, [0.201413278, 0.201413278, 0.8833821554]),
    "simpo": (
        reference_free.simpo,
        {"beta": 2.5, "gamma": 0.55 * 2.5, **LENGTHS},
        [0.5231232641, 3.288041372, 2.126928011],
    ),
    "alphapo": (
        reference_free.alphapo,
        {"alpha": 0.25, "beta": 2.5, "gamma": 0.1, **LENGTHS},
        [0.1253168141, 4.477323266, 1.487898472],
    ),
    "orpo": (
        reference_free.orpo,
        {"beta": 0.1, **NONE, **LENGTHS},
        [0.02194577071, 0.1155473291, 0.08404840361],
    ),
    "redi": (anchored.redi, {"alpha": 0.8, **LENGTHS}, [-0.48, 1.35, 0.7]),
    "slic": (reference_free.slic, {"delta": 1.0, **NONE}, [0.0, 0.0, 4.5]),
}

ONE = ([2.0, -3.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0])  # h, no reference, labels
UNPAIRED = {
    "kto": (anchored.kto, {"kl_baseline": 0.4}, [0.4600851154, 0.4158094771, 0.4975000208]),
    "apo_zero_unpaired": (anchored.apo_zero_unpaired, {}, [0.4501660027, 0.4255574832, 0.4875026035]),
    "bco": (anchored.bco, {"baseline": 0.05}, [0.6209570478, 0.5333821554, 0.6931471806]),
}


def arrays(values):
    return [jnp.asarray(x) for x in values]


def keywords(given, **more):
    return {**more, **{name: jnp.asarray(x) if isinstance(x, list) else x for name, x in given.items()}}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=6e-10)  # ten digits are written down
    assert actual.dtype == jnp.float64


@pytest.mark.parametrize(("method", "given", "expected"), REFERENCED.values(), ids=REFERENCED)
def test_pairs_with_a_reference(method, given, expected):
    close(method(*arrays(POLICY + REFERENCE), **keywords(given, beta=0.1)), expected)


@pytest.mark.parametrize(("method", "given", "expected"), ALONE.values(), ids=ALONE)
def test_pairs_without_a_reference(method, given, expected):
    close(method(*arrays(POLICY), **keywords(given)), expected)


@pytest.mark.parametrize(("method", "given", "expected"), UNPAIRED.values(), ids=UNPAIRED)
def test_single_responses(method, given, expected):
    close(method(*arrays(ONE), beta=0.1, **given), expected)


def test_flex_dpo():
    actual = pair_scores.flex_dpo(*arrays(POLICY + REFERENCE), beta_chosen=0.2, beta_rejected=0.05)
    close(actual, [0.4200553357, 0.7443966601, 0.668459648])


def test_log_odds_of_orpo():
    """The gap that is behind its loss, which is a tenth of the logistic link of it."""
    loss = reference_free.orpo(*arrays(POLICY), **keywords(LENGTHS), nll=0.0, beta=1.0)
    np.testing.assert_allclose(-jnp.log(jnp.expm1(loss)), [1.404860958, -0.7772704792, -0.2757272374], rtol=1e-9)


def test_transport_sorts_before_the_link():
    h = pairs.log_ratios(*arrays(POLICY + REFERENCE))
    close(losses.pairwise(*losses.sorted_scores(*h), beta=0.1), [0.4031860489, 0.4554924815, 0.6443966601])
    (policy_chosen, policy_rejected), (ref_chosen, ref_rejected) = arrays(POLICY), arrays(REFERENCE)
    margins = losses.sorted_scores(policy_chosen - policy_rejected, ref_chosen - ref_rejected)
    close(losses.pairwise(*margins, beta=0.1), [0.718459648, 0.4031860489, 0.4031860489])


def test_robust_mean_of_dpo():
    """Dr. DPO at temperature 1: minus the log of the mean of the likelihoods."""
    loss = -jnp.log(jnp.mean(jnp.exp(-pairs.dpo(*arrays(POLICY + REFERENCE), beta=0.1))))
    np.testing.assert_allclose(loss, 0.4976472042, rtol=1e-9)


def test_terms_are_added_as_the_formulas_say():
    """By hand from DPO's golden numbers: weights multiply, likelihoods and values are added."""
    given, base = arrays(POLICY + REFERENCE), np.asarray(DPO)
    nll = jnp.array([0.4, 3.75, 2.5])
    close(pair_terms.rpo(*given, nll=nll, beta=0.1, eta=0.005), base + 0.005 * nll)
    close(pair_terms.mm_dpo(*given, nll=nll, beta=0.1), base + 0.25 * nll)
    close(pair_terms.iterative_rpo(*given, len_chosen=jnp.array([100, 12, 5])), base + nll)
    close(pair_terms.wpo(*given, weight_chosen=nll, weight_rejected=2.0, beta=0.1), 2 * nll * base)
    close(pair_terms.beta_dpo(*given, keep=jnp.array([1.0, 0.0, 1.0]), beta=0.1), base * np.array([1.0, 0.0, 1.0]))
    close(pair_terms.xpo(*given, policy_exploration=given[0], alpha=0.01), base + 0.01 * given[0])
    calibration = {"policy_calibration": given[0], "ref_calibration": given[2], "alpha": 0.3}
    h = np.array([2.0, -3.0, 0.5])
    close(pair_terms.vpo(*given, **calibration, attitude="optimistic"), base + 0.3 * 0.1 * h)
    close(pair_terms.vpo(*given, **calibration, attitude="pessimistic"), base - 0.3 * 0.1 * h)
    spans = dict(
        zip(("policy_chosen_span", "policy_edited_span", "ref_chosen_span", "ref_edited_span"), given, strict=True)
    )
    close(pair_terms.rise(*given, **spans, nll=nll, alpha=2.0), 2 * base + 2 * nll)


def test_likelihood_terms_of_reference_free_methods():
    given, nll = arrays(POLICY), jnp.array([0.4, 3.75, 2.5])
    for method in (reference_free.slic, reference_free.cpo):
        close(method(*given, nll=nll, nll_weight=0.7) - method(*given, nll=0.0), 0.7 * nll)
    lengths = keywords(LENGTHS)
    close(reference_free.orpo(*given, nll=nll, **lengths) - reference_free.orpo(*given, nll=0.0, **lengths), nll)


def test_token_losses_of_pretraining_with_preferences():
    p = jnp.array([[0.3, 0.8, 0.5]])
    logp, mask = jnp.log(p), jnp.array([[1, 1, 0]])
    loss = anchored.unlikelihood(logp, jnp.array([[1.0, 0.0, 1.0]]), mask, alpha=0.6)
    close(loss, [[-np.log(0.3), -0.6 * np.log(0.2), 0.0]])
    certain = anchored.unlikelihood(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    close(certain, [[20 * np.log(10.0)]])
    advantages = jnp.array([[2.0, 500.0, 1.0]])
    close(
        anchored.advantage_weighted_nll(logp, advantages, mask), [[-np.exp(0.2) * np.log(0.3), -1e3 * np.log(0.8), 0]]
    )
    unlikely = jax.grad(lambda theta: anchored.unlikelihood(jax.nn.log_softmax(theta)[None, :1], *two).sum())
    two = (jnp.zeros((1, 1)), jnp.ones((1, 1)))
    theta = jnp.array([0.3, -0.4, 1.0])
    np.testing.assert_allclose(unlikely(theta)[0], jax.nn.softmax(theta)[0])  # d(-log(1 - p)) / d logit = p


def test_fine_tuning_as_reward_learning():
    policy, reference, _ = arrays(ONE)
    x = 0.2 * np.array([2.0, -3.0, 0.5])
    close(anchored.f_sft(policy, reference, phi="identity", beta=0.2), -x)
    close(anchored.f_sft(policy, reference, phi="chi2", beta=0.2), -(x - x**2 / 4))
    close(anchored.f_sft(policy, reference, phi="hellinger", beta=0.2), -x / (1 + x))
    slope = jax.grad(lambda policy: anchored.f_sft(policy, reference, phi="chi2", beta=0.2).sum())
    np.testing.assert_allclose(slope(jnp.full(3, 10.0)), 0, atol=1e-15)  # x = 2

r"""Pairs without a reference: what is compared is the policy's own log-probability of a response.

Arguments, results and errors are those of `pairs`, without the references. `nll`, where a method has it, is the
negative log-likelihood of the chosen response (or of another text), a scalar or `[B]`, normalised as you like: by
sequence, token or not at all, on which implementations differ. `a` is the mean log-probability of a token.
"""

from jax import Array

from esscher.core.arrays import check_per_example, per_example
from esscher.objectives.preference.links import hinge_link
from esscher.objectives.preference.losses import pairwise
from esscher.objectives.preference.pairs import policy_scores
from esscher.objectives.preference.scores import box_cox_score, odds_score

__all__ = ["alphapo", "cpo", "orpo", "simpo", "slic"]


def slic(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    nll: float | Array,
    delta: float | Array = 1.0,
    nll_weight: float | Array = 0.1,
) -> Array:
    """`max(0, delta - log pi(chosen) + log pi(rejected)) + nll_weight nll`; there is no `beta`.

    In the paper `nll` is that of the supervised target. The defaults are recalled, not read.

    Reference: SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425.
    """
    scores = policy_scores(policy_chosen, policy_rejected)
    likelihood = nll_weight * per_example(policy_chosen, nll=nll)
    return pairwise(*scores, beta=1.0, margin=delta - 1, link=hinge_link) + likelihood


def cpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    nll: float | Array,
    beta: float | Array = 0.1,
    nll_weight: float | Array = 1.0,
    flip_prob: float | Array = 0.0,
) -> Array:
    """`l(beta (log pi(chosen) - log pi(rejected))) + nll_weight nll`: DPO with a uniform reference, and likelihood.

    `flip_prob` smooths the labels as in `pairs.cdpo`. The defaults are TRL's.

    Reference: Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation,
      arXiv:2401.08417.
    """
    scores = policy_scores(policy_chosen, policy_rejected)
    return pairwise(*scores, beta=beta, flip_prob=flip_prob) + nll_weight * per_example(policy_chosen, nll=nll)


def simpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    beta: float | Array = 2.5,
    gamma: float | Array = 1.375,
) -> Array:
    """`l(beta (a_chosen - a_rejected) - gamma)`, with `a` the mean log-probability of a token, and without likelihood.

    `gamma` is in units of reward; the official code's ratio is `gamma / beta`. At `gamma=0` and equal lengths `L` the
    optimum is the tilt `exp(L r / beta) / Z` of the uniform law. The defaults are the official ones for Llama-3.

    Reference: SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734.
    """
    scores = policy_scores(policy_chosen, policy_rejected, len_chosen=len_chosen, len_rejected=len_rejected)
    return pairwise(*scores, beta=beta, margin=gamma)


def alphapo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    beta: float | Array = 2.5,
    gamma: float | Array = 0.1,
    alpha: float | Array = 0.25,
) -> Array:
    """SimPO of the reward `(1 - e^(-alpha a)) / alpha`, where `a` is the mean log-probability of a token.

    `alpha=0` is SimPO, `alpha=-1` is linear in the probability `e^a`. `gamma` is in units of reward. The defaults are
    the paper's, as recalled; exponents as in `scores.box_cox_score`.

    Reference: AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884.
    """
    scores = policy_scores(policy_chosen, policy_rejected, len_chosen=len_chosen, len_rejected=len_rejected)
    return pairwise(*(box_cox_score(a, alpha) for a in scores), beta=beta, margin=gamma)


def orpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    nll: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """`nll + beta l(odds_chosen - odds_rejected)`, of the log odds `a - log(1 - e^a)` of the mean log-probability `a`.

    `beta` is no temperature here: it weights the odds, and is the paper's lambda. TRL's `nll` is that of prompt and
    response. The default is the paper's.

    Reference: ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691.
    """
    scores = policy_scores(policy_chosen, policy_rejected, len_chosen=len_chosen, len_rejected=len_rejected)
    check_per_example(policy_chosen, beta=beta)
    return per_example(policy_chosen, nll=nll) + beta * pairwise(*(odds_score(a) for a in scores), beta=1.0)

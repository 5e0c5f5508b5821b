r"""Pairs of other scores than the log-ratio: by length, by divergence, by other references, by what tokens weigh.

Arguments, results and errors are those of `pairs`, except that `ld_dpo` and `contrastive_preference` weigh tokens, and
so take log-probabilities of tokens, `[B, T]`, with masks of the same shape, 0 where a token does not count.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape
from esscher.core.tokens.logps import sequence_logp, shared_prefix_sequence_logp
from esscher.objectives.preference.links import squared_link
from esscher.objectives.preference.losses import pairwise
from esscher.objectives.preference.pairs import log_ratios
from esscher.objectives.preference.regularizers import dpop_penalty
from esscher.objectives.preference.scores import divergence_score, log_ratio

__all__ = [
    "chi_po",
    "contrastive_preference",
    "dpo_gamma",
    "dpop",
    "f_dpo",
    "flex_dpo",
    "inpo",
    "ld_dpo",
    "length_normalized_dpo",
    "tdpo1",
    "tdpo2",
]


# --- length -----------------------------------------------------------------------------------------------------------


def length_normalized_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    beta: float | Array = 5.0,
) -> Array:
    """`l(beta (h_chosen / len_chosen - h_rejected / len_rejected))`: DPO on means over tokens.

    LN-DPO: at equal lengths `L` it is DPO with `beta / L`. The default is Tulu 3's.

    Reference: Tulu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv:2411.15124.
    """
    policies, references = (policy_chosen, policy_rejected), (ref_chosen, ref_rejected)
    h = log_ratios(*policies, *references, len_chosen=len_chosen, len_rejected=len_rejected)
    return pairwise(*h, beta=beta)


def ld_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 0.5,
) -> Array:
    """Length-desensitised DPO: tokens beyond the length of the shorter response of the pair count `alpha` times.

    `alpha=1` is DPO, as are equal lengths; `alpha=0` cuts the longer response. The chosen `[B, T]` and the rejected
    `[B, S]` may be of different lengths. `alpha` is by model in the paper, 0.1 to 0.8.

    Reference: Length Desensitization in Direct Preference Optimization, arXiv:2409.06411.
    """
    _check_tokens(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask)
    shared = jnp.minimum(*((mask != 0).sum(-1) for mask in (chosen_mask, rejected_mask)))
    chosen = shared_prefix_sequence_logp(log_ratio(policy_chosen, ref_chosen), chosen_mask, shared, alpha)
    rejected = shared_prefix_sequence_logp(log_ratio(policy_rejected, ref_rejected), rejected_mask, shared, alpha)
    return pairwise(chosen, rejected, beta=beta)


# --- references -------------------------------------------------------------------------------------------------------


def dpo_gamma(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    gamma: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """DPO with the reference's log-probabilities times `gamma`: 1 is DPO, 0 has no reference.

    Reference: Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534.
    """
    log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)  # for its checks
    check_per_example(policy_chosen, gamma=gamma)
    chosen = log_ratio(policy_chosen, ref_chosen, ref_weight=gamma)
    return pairwise(chosen, log_ratio(policy_rejected, ref_rejected, ref_weight=gamma), beta=beta)


def inpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    previous_chosen: Array,
    previous_rejected: Array,
    eta: float | Array = 0.0075,
    ratio: float | Array = 1 / 3,
) -> Array:
    """`(s_chosen - s_rejected - 1 / (2 eta))^2` with `s = log pi - ratio log ref - (1 - ratio) log previous`.

    On labelled pairs of the previous policy the optimum is the step `ref^ratio previous^(1 - ratio) exp(P / eta) / Z`
    of mirror descent, where `P` is the probability of beating the previous policy; iterated, it ends at the Nash policy
    under a KL penalty of `ratio eta` (which is the paper's tau). `ratio=1` is IPO with `beta = eta`.

    Args:
      policy_chosen: as its neighbours in `pairs`.
      policy_rejected: likewise.
      ref_chosen: likewise.
      ref_rejected: likewise.
      previous_chosen: under the previous policy, `[B]`, a constant; of several, `scores.mixed_reference`.
      previous_rejected: likewise.
      eta: the inverse step size, in place of `beta`; 0 gives infinity. Its default was not checked against the paper.
      ratio: the weight of the reference.

    Reference: Iterative Nash Policy Optimization, arXiv:2407.00617.
    """
    log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)  # for its checks
    check_floating(previous_chosen=previous_chosen, previous_rejected=previous_rejected)
    check_same_shape(policy_chosen=policy_chosen, previous_chosen=previous_chosen, previous_rejected=previous_rejected)
    check_per_example(policy_chosen, ratio=ratio, eta=eta)
    chosen = log_ratio(log_ratio(policy_chosen, ref_chosen, ref_weight=ratio), previous_chosen, ref_weight=1 - ratio)
    rejected = log_ratio(
        log_ratio(policy_rejected, ref_rejected, ref_weight=ratio), previous_rejected, ref_weight=1 - ratio
    )
    return pairwise(chosen, rejected, beta=1.0, link=squared_link(jnp.divide(0.5, eta)))


# --- the two responses apart ------------------------------------------------------------------------------------------


def flex_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta_chosen: float | Array,
    beta_rejected: float | Array,
) -> Array:
    """`l(beta_chosen h_chosen - beta_rejected h_rejected)`: a smaller `beta_rejected` pushes down less.

    Equal betas are DPO; otherwise a prompt's constant does not cancel.

    Reference: 3D-Properties: Identifying Challenges in DPO and Charting a Path Forward, arXiv:2406.07327.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, beta_chosen=beta_chosen, beta_rejected=beta_rejected)
    return pairwise(beta_chosen * chosen, beta_rejected * rejected, beta=1.0)


def dpop(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.3,
    penalty: float | Array = 50.0,
) -> Array:
    """DPO-Positive, `l(beta (D - penalty max(0, -h_chosen)))`: the chosen response must not fall below the reference.

    The defaults are Smaug's, as recalled; `penalty=0` is DPO. At the kink, `pi = ref`, the penalty has no gradient.

    Reference: Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, penalty=penalty)
    return pairwise(chosen - penalty * dpop_penalty(policy_chosen, ref_chosen), rejected, beta=beta)


def tdpo1(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    kl_chosen: Array,
    kl_rejected: Array,
    beta: float | Array = 0.1,
) -> Array:
    """Token-level DPO, `l(beta (D - (K_rejected - K_chosen)))`, with `K = sum_t KL(ref_t || pi_t)` over a response.

    `kl_chosen[B]` and `kl_rejected[B]` are these sums (`tokens.linear_token_kl`), and both receive gradients.

    Reference: Token-level Direct Preference Optimization, arXiv:2404.11999.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*_add_divergences(*h, kl_chosen, kl_rejected), beta=beta)


def tdpo2(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    kl_chosen: Array,
    kl_rejected: Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 0.5,
) -> Array:
    """`tdpo1` with `alpha` times the divergences, of which `kl_chosen` is a constant; `alpha=0` is DPO.

    The defaults are the official ones.

    Reference: Token-level Direct Preference Optimization, arXiv:2404.11999.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, alpha=alpha)
    return pairwise(*_add_divergences(*h, jax.lax.stop_gradient(kl_chosen), kl_rejected, alpha), beta=beta)


# --- divergences ------------------------------------------------------------------------------------------------------


def f_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    kind: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi2_kl"],
    beta: float | Array = 0.1,
    alpha: float | Array | None = None,
) -> Array:
    """`l(beta (s_chosen - s_rejected))` with `s = f'(pi / ref)`: DPO whose penalty is the divergence of `f`.

    With labels of rewards `r` the optimum maximises `E[r] - beta D_f(pi || ref)`. "reverse_kl" is DPO; kinds, `alpha`
    and the clip of exponents are those of `scores.divergence_score`.

    Reference: Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints,
      arXiv:2309.16240.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*(divergence_score(x, kind, alpha=alpha) for x in h), beta=beta)


def chi_po(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.05,
    clip: float | Array = jnp.inf,
) -> Array:
    """`l(clip(beta (s_chosen - s_rejected), -clip, clip))` with `s = h + e^h`: a penalty of chi^2 beside the KL.

    The paper clips at twice the largest reward; there the gradient vanishes. Without a clip it is `f_dpo` of "chi2_kl".

    Reference: Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared
      Preference Optimization, arXiv:2407.13399.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, beta=beta, clip=clip)
    chosen, rejected = (divergence_score(x, "chi2_kl") for x in h)
    z = jnp.clip(beta * (chosen - rejected), -jnp.asarray(clip), clip)
    return pairwise(z, jnp.zeros_like(z), beta=1.0)


# --- segments of behaviour --------------------------------------------------------------------------------------------


def contrastive_preference(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float | Array = 0.1,
    bias: float | Array = 0.5,
    discount: float | Array = 1.0,
    label_prob: float | Array = 1.0,
) -> Array:
    r"""Contrastive preference learning, `l(S_chosen - bias S_rejected)`: labels compare regrets, not rewards.

        S = beta sum_n discount^(n - 1) (log pi_n - log ref_n)        n = 1, 2, ... over the tokens that count

    CPL, the regret one. At `bias=1` the optimal policy is `exp(advantage / beta)`; below, the bias is conservative: the
    loss no longer cancels a constant, and so prefers policies under which the data are likely. The bias is on whichever
    response lost.

    Args:
      policy_chosen: log-probabilities of actions, or minus squared distances, `[B, T]`.
      policy_rejected: likewise, `[B, S]`.
      ref_chosen: the same under a reference, a constant; absent in the paper's main variant.
      ref_rejected: likewise.
      chosen_mask: `[B, T]`.
      rejected_mask: `[B, S]`.
      beta: the paper's alpha, 0.1 there, and 0.2 with a reference.
      bias: the paper's lambda, 0.5 there, and 0.75 with a reference.
      discount: 1 in the released code.
      label_prob: probability that chosen is better, a constant; outside of `[0, 1]` it gives NaN.

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL, arXiv:2310.13639.
    """
    if ref_chosen is None and ref_rejected is None:
        ref_chosen, ref_rejected = jnp.zeros_like(policy_chosen), jnp.zeros_like(policy_rejected)
    elif ref_chosen is None or ref_rejected is None:
        raise ValueError("ref_chosen and ref_rejected must be given together")
    _check_tokens(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask)
    check_per_example(policy_chosen, bias=bias, label_prob=label_prob)

    def score(policy: Array, reference: Array, mask: Array) -> Array:
        weights = discount ** jnp.maximum(jnp.cumsum(mask != 0, axis=-1) - 1, 0)
        return sequence_logp(weights * jnp.where(mask != 0, log_ratio(policy, reference), 0), mask)

    chosen = score(policy_chosen, ref_chosen, chosen_mask)
    rejected = score(policy_rejected, ref_rejected, rejected_mask)
    p = jax.lax.stop_gradient(jnp.where((label_prob >= 0) & (label_prob <= 1), label_prob, jnp.nan))
    return p * pairwise(chosen, bias * rejected, beta=beta) + (1 - p) * pairwise(rejected, bias * chosen, beta=beta)


def _add_divergences(
    chosen: Array, rejected: Array, kl_chosen: Array, kl_rejected: Array, weight: float | Array = 1.0
) -> tuple[Array, Array]:
    check_floating(kl_chosen=kl_chosen, kl_rejected=kl_rejected)
    check_same_shape(policy_chosen=chosen, kl_chosen=kl_chosen, kl_rejected=kl_rejected)
    return chosen + weight * at_least_float32(kl_chosen), rejected + weight * at_least_float32(kl_rejected)


def _check_tokens(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    chosen_mask: Array,
    rejected_mask: Array,
) -> None:
    check_floating(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_floating(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_same_shape(policy_chosen=policy_chosen, ref_chosen=ref_chosen, chosen_mask=chosen_mask)
    check_same_shape(policy_rejected=policy_rejected, ref_rejected=ref_rejected, rejected_mask=rejected_mask)
    if policy_chosen.ndim != 2 or policy_rejected.ndim != 2 or len(policy_chosen) != len(policy_rejected):
        raise ValueError(
            "policy_chosen and policy_rejected must have shapes [B, T] and [B, S], "
            f"got {policy_chosen.shape} and {policy_rejected.shape}"
        )

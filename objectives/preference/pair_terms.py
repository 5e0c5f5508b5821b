r"""Pairs with more than their difference: DPO with weights, with a `beta` for each pair, and with further terms.

Arguments, results and errors are those of `pairs`. `nll` is the negative log-likelihood of the chosen response, a
scalar or `[B]`, normalised as you like: implementations differ.
"""

from typing import Literal

import jax
from jax import Array

from esscher.core.arrays import check_floating, check_per_example, check_same_shape, per_example
from esscher.objectives.preference.pairs import dpo
from esscher.objectives.preference.regularizers import value_incentive
from esscher.objectives.preference.scores import per_token

__all__ = ["beta_dpo", "iterative_rpo", "mm_dpo", "rise", "rpo", "vpo", "wpo", "xpo"]


# --- weights and betas, which are constants ---------------------------------------------------------------------------


def wpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    weight_chosen: float | Array,
    weight_rejected: float | Array,
    beta: float | Array = 0.01,
) -> Array:
    """`weight_chosen weight_rejected l(beta D)`: pairs count as far as the policy itself would write them.

    A response's weight is `exp(mean_t(logp_t - log sum_v pi_t(v)^2))`, a constant; 1 for a uniform policy. The default
    is the official one.

    Reference: WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    check_per_example(policy_chosen, weight_chosen=weight_chosen, weight_rejected=weight_rejected)
    return jax.lax.stop_gradient(weight_chosen * weight_rejected) * loss


def beta_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array,
    keep: float | Array = 1.0,
) -> Array:
    """`keep l(beta D)` with a `beta` that was made of the batch's own differences, and pairs dropped: both constants.

    In the paper `beta = beta_0 (1 + 0.6 (mean D - M))` with a running mean `M`, and `keep` is 0 or 1, 1 for 80% of the
    pairs, those near `M` rather. A `beta` without influence of the batch and `keep=1` are DPO.

    Reference: beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv:2407.08639.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=jax.lax.stop_gradient(beta))
    check_per_example(policy_chosen, keep=keep)
    return jax.lax.stop_gradient(keep) * loss


def mm_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    nll: float | Array,
    beta: float | Array,
    nll_weight: float | Array = 0.25,
) -> Array:
    """`l(beta D) + nll_weight nll`, with a `beta` that grows with the gap of the pair's rewards, and is a constant.

    In the paper `beta = beta_0 (1 + w (1 - e^(-k gap)))`, its dynamic scaling: `regularizers.margin_scaled_beta`. A
    `beta` that differs by pair moves the optimum away from the tilt. The default is the released script's.

    Reference: MM-RLHF: The Next Step Forward in Multimodal LLM Alignment, arXiv:2502.10391.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=jax.lax.stop_gradient(beta))
    return loss + nll_weight * per_example(policy_chosen, nll=nll)


# --- further terms ----------------------------------------------------------------------------------------------------


def rpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    nll: float | Array,
    beta: float | Array = 0.01,
    eta: float | Array = 0.005,
) -> Array:
    """Regularised preference optimisation, `l(beta D) + eta nll`: the likelihood is an adversary's price for `r`.

    The defaults are the official ones, for an `nll` that is the batch's mean over tokens; `eta=0` is DPO.

    Reference: Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer,
      arXiv:2405.16436.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    return loss + eta * per_example(policy_chosen, nll=nll)


def iterative_rpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    len_chosen: Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 1.0,
) -> Array:
    """Iterative reasoning preference optimisation, `l(beta D) - alpha log pi(chosen) / len_chosen`.

    `beta` and `alpha` are the paper's; `alpha=0` is DPO. RPO for medical reasoning (arXiv:2504.18080) is the same loss
    on explanations that end right and wrong.

    Reference: Iterative Reasoning Preference Optimization, arXiv:2404.19733.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    check_same_shape(policy_chosen=policy_chosen, len_chosen=len_chosen)
    return loss - alpha * per_token(policy_chosen, len_chosen)


def vpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    policy_calibration: Array,
    ref_calibration: Array,
    attitude: Literal["optimistic", "pessimistic"],
    beta: float | Array = 0.1,
    alpha: float | Array = 0.01,
) -> Array:
    """`l(beta D) +- alpha beta h_calibration`: the value that the implicit reward promises, as an incentive.

    Where rewards are centred under the calibration law, `-beta E[h_calibration]` is the optimal value. "optimistic"
    (plus, to learn online; unbounded below) pushes calibration samples down, "pessimistic" (minus, offline) pulls them
    up, as the likelihood of `rpo` does.

    Args:
      policy_chosen: as its neighbours and `beta` in `pairs`.
      policy_rejected: likewise.
      ref_chosen: likewise.
      ref_rejected: likewise.
      policy_calibration: log-probabilities of samples of the calibration law, `[B]`: samples of the reference online,
        the chosen responses offline.
      ref_calibration: of the same under the reference.
      attitude: the sign.
      beta: likewise.
      alpha: of the incentive; 0 is DPO; the default is ours.

    Reference: Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF,
      arXiv:2405.19320.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    check_same_shape(policy_chosen=policy_chosen, policy_calibration=policy_calibration)
    return loss + value_incentive(policy_calibration, ref_calibration, coef=alpha * beta, attitude=attitude)


def xpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    policy_exploration: Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 1e-5,
) -> Array:
    """Exploratory preference optimisation, `l(beta D) + alpha log pi(y)` with `y` a sample of the reference.

    Pairs are one sample of the policy and one of the reference, the latter being `y`: `policy_exploration[B]` is one
    of the two policy log-probabilities. `alpha=0` is online DPO. The defaults are TRL's.

    Reference: Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF,
      arXiv:2405.21046.
    """
    loss = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    check_same_shape(policy_chosen=policy_chosen, policy_exploration=policy_exploration)
    return loss + alpha * per_example(policy_chosen, policy_exploration=policy_exploration)


def rise(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    policy_chosen_span: Array,
    policy_edited_span: Array,
    ref_chosen_span: Array,
    ref_edited_span: Array,
    nll: float | Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 1.0,
) -> Array:
    """`l(beta D) + l(beta D_span) + alpha nll`: a second pair is the chosen response and a copy with a subtle error.

    `D_span` is over the tokens that the edit changed, in either version; those before cancel. How the paper masks those
    after, and its constants, were not read: these are ours.

    Args:
      policy_chosen: as its neighbours and `beta` in `pairs`.
      policy_rejected: likewise.
      ref_chosen: likewise.
      ref_rejected: likewise.
      policy_chosen_span: log-probabilities of the tokens as they were, `[B]`.
      policy_edited_span: of those in their place.
      ref_chosen_span: as the first, under the reference.
      ref_edited_span: as the second, under the reference.
      nll: see above.
      beta: likewise.
      alpha: of the likelihood.

    Reference: Subtle Errors Matter: Preference Learning via Error-injected Self-editing, arXiv:2410.06638.
    """
    full = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    spans = {"policy_chosen_span": policy_chosen_span, "policy_edited_span": policy_edited_span}
    spans |= {"ref_chosen_span": ref_chosen_span, "ref_edited_span": ref_edited_span}
    check_floating(**spans)
    check_same_shape(policy_chosen=policy_chosen, **spans)
    return full + dpo(*spans.values(), beta=beta) + alpha * per_example(policy_chosen, nll=nll)

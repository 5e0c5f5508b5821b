r"""Single responses against a baseline: losses that fix the level of a log-ratio, not only differences.

Arguments, results and errors of methods on pairs are those of `pairs`. Those on single responses take log-probabilities
`policy[B]` and `reference[B]`, and `desirable`, 1 for good ones and 0 for bad, or in between. Baselines, win rates,
advantages and labels are constants. `h = log pi - log ref`, `l(z) = -log sigmoid(z)`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape
from esscher.objectives.preference.links import linear_link, sigmoid_link, squared_link
from esscher.objectives.preference.losses import pairwise, pointwise
from esscher.objectives.preference.pairs import log_ratios, policy_scores
from esscher.objectives.preference.scores import log1mexp, log_ratio

__all__ = [
    "advantage_weighted_nll",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "cal_dpo",
    "f_sft",
    "kto",
    "kto_baseline",
    "nca_pair",
    "redi",
    "sppo",
    "unlikelihood",
]


# --- logistic ---------------------------------------------------------------------------------------------------------


def bco_pair(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.1
) -> Array:
    """`l(beta h_chosen) + l(-beta h_rejected)`: a classifier of good and bad; never below DPO.

    Reference: Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pointwise(chosen, 1.0, beta=beta) + pointwise(rejected, 0.0, beta=beta)


def bco(
    policy: Array,
    reference: Array,
    desirable: float | Array,
    *,
    baseline: float | Array,
    beta: float | Array = 0.1,
    undesirable_weight: float | Array = 1.0,
) -> Array:
    """`l(z)` of a good response and `undesirable_weight l(-z)` of a bad one, with `z = beta h - baseline`.

    Only with the baseline `-beta log Z` is the optimum a tilt, `pi = ref (d / (1 - d))^(1 / beta) / Z`, where `d` is
    the probability of being good. In practice it is the mean of `beta h` over all responses so far, good and bad, those
    of this batch included: `regularizers.running_mean_update` with `momentum = n / (n + B)`. The paper's weight is the
    odds, clipped, of a classifier of the two kinds of prompts. The default `beta` is TRL's.

    Reference: Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.
    """
    h = _single_log_ratio(policy, reference, desirable)
    check_per_example(policy, undesirable_weight=undesirable_weight)
    return pointwise(h, desirable, beta=beta, baseline=baseline, negative_weight=undesirable_weight)


def nca_pair(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.01
) -> Array:
    """`l(beta h_chosen) + l(-beta h_chosen) / 2 + l(-beta h_rejected) / 2`: noise contrast against the reference.

    Without the constraint of normalisation `beta h` ends at the log of the winners' over the mean law of responses, so
    the chosen one's likelihood does not fall. The default is the official one.

    Reference: Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    noise = pointwise(chosen, 0.0, beta=beta) + pointwise(rejected, 0.0, beta=beta)
    return pointwise(chosen, 1.0, beta=beta) + 0.5 * noise


# --- sigmoid: bounded, and a majority vote rather than a tilt ---------------------------------------------------------


def kto(
    policy: Array,
    reference: Array,
    desirable: float | Array,
    *,
    kl_baseline: float | Array,
    beta: float | Array = 0.1,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Array:
    """`w (1 - sigmoid(z))` of a good response and `w sigmoid(z)` of a bad one, with `z = beta (h - kl_baseline)`.

    Its optimum is no tilt: mass goes to where good labels have the majority, and leaves the rest. The paper wants the
    ratio of total weights, good over bad, between 1 and 3/2. The defaults are the paper's.

    Args:
      policy: see above, as `reference` and `desirable`.
      reference: likewise.
      desirable: likewise.
      kl_baseline: in units of `h`, not of reward: `kto_baseline`.
      beta: temperature.
      desirable_weight: of good responses.
      undesirable_weight: of bad ones.

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """
    h = _single_log_ratio(policy, reference, desirable)
    check_per_example(policy, kl_baseline=kl_baseline)
    check_per_example(policy, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    weights = {"positive_weight": desirable_weight, "negative_weight": undesirable_weight}
    return pointwise(h - jax.lax.stop_gradient(kl_baseline), desirable, beta=beta, link=sigmoid_link, **weights)


def kto_baseline(policy_mismatched: Array, ref_mismatched: Array, *, axis_name: str | None = None) -> Array:
    """`max(0, mean h)` of responses to other prompts of the batch, `[B], [B] -> []`: KTO's estimate of the KL.

    A constant. Mismatch by shifting responses by one against their prompts, which needs two at least. With `axis_name`
    the mean is over all devices along that axis.

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """
    check_floating(policy_mismatched=policy_mismatched, ref_mismatched=ref_mismatched)
    check_same_shape(policy_mismatched=policy_mismatched, ref_mismatched=ref_mismatched)
    mean = jax.lax.stop_gradient(log_ratio(policy_mismatched, ref_mismatched)).mean()
    return jnp.maximum(mean if axis_name is None else jax.lax.pmean(mean, axis_name), 0)


def apo_zero(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.1
) -> Array:
    """`1 - sigmoid(beta h_chosen) + sigmoid(beta h_rejected)`: chosen up, rejected down, for policies worse than both.

    Reference: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment,
      arXiv:2408.06266.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pointwise(chosen, 1.0, beta=beta, link=sigmoid_link) + pointwise(rejected, 0.0, beta=beta, link=sigmoid_link)


def apo_zero_unpaired(
    policy: Array,
    reference: Array,
    desirable: float | Array,
    *,
    beta: float | Array = 0.1,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Array:
    """KTO with a baseline of 0, as in TRL.

    Reference: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment,
      arXiv:2408.06266.
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(policy, reference, desirable, kl_baseline=0.0, beta=beta, **weights)


def apo_down(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.1
) -> Array:
    """`sigmoid(beta h_chosen) + 1 - sigmoid(beta D)`: chosen down, rejected more so, for policies better than both.

    Reference: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment,
      arXiv:2408.06266.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    down = pointwise(chosen, 0.0, beta=beta, link=sigmoid_link)
    return down + pairwise(chosen, rejected, beta=beta, link=sigmoid_link)


# --- regression to a target -------------------------------------------------------------------------------------------


def sppo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    win_rate_chosen: float | Array = 1.0,
    win_rate_rejected: float | Array = 0.0,
    beta: float | Array = 1e-3,
    factor: float | Array = 0.5,
) -> Array:
    """`factor ((h_chosen - (P_chosen - 1/2) / beta)^2 + (h_rejected - (P_rejected - 1/2) / beta)^2)`.

    `P` is the probability of beating the last policy, which is the reference. The half stands for a normaliser, so the
    optimum is only near `ref exp(P / beta) / Z`. `beta` (the paper's 1 / eta) and `factor` are the official code's; TRL
    has `factor=1`, and 1 and 0 for `P` (its `sppo_hard`). `beta=0` gives infinity or NaN.

    Reference: Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(
        policy_chosen, win_rate_chosen=win_rate_chosen, win_rate_rejected=win_rate_rejected, beta=beta, factor=factor
    )
    targets = (jnp.divide(jax.lax.stop_gradient(p) - 0.5, beta) for p in (win_rate_chosen, win_rate_rejected))
    return factor * sum(squared_link(target)(h) for target, h in zip(targets, (chosen, rejected), strict=True))


def cal_dpo(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 1e-3
) -> Array:
    """`l(D) + (h_chosen - 1 / (2 beta))^2 + (h_rejected + 1 / (2 beta))^2`: DPO and SPPO, so that `beta h` has a scale.

    `beta` is only in the targets; 0 gives infinity. The default is the paper's, as recalled.

    Reference: Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment, arXiv:2412.14516.
    """
    arguments = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*log_ratios(*arguments), beta=1.0) + sppo(*arguments, beta=beta, factor=1.0)


def f_sft(
    policy: Array,
    reference: Array,
    *,
    phi: Literal["identity", "chi2", "hellinger"],
    beta: float | Array = 0.1,
) -> Array:
    r"""Fine-tuning on good responses as learning of an implicit reward, `-phi(x)` with `x = beta h`.

        identity   x: beta times the likelihood, without a pull to the reference
        chi2       x - x^2 / 4: the best `x` is 2
        hellinger  x / (1 + x): `x` is clipped below at -0.9, since the pole is at -1

    Derived from matching data and policy adversarially, with the reward's normaliser left out: the published loss and
    its constants were not read.

    Reference: Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, arXiv:2507.00018.
    """
    x = beta * _single_log_ratio(policy, reference, 1.0)
    match phi:
        case "identity":
            return linear_link(x)
        case "chi2":
            return squared_link(2.0)(x) / 4 - 1
        case "hellinger":
            x = jnp.maximum(x, -0.9)
            return -x / (1 + x)
    raise ValueError(f"phi must be identity, chi2 or hellinger, got {phi!r}")


# --- without a reference ----------------------------------------------------------------------------------------------


def redi(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    alpha: float | Array = 0.8,
    gamma: float | Array = 0.0,
) -> Array:
    """`-a_chosen + alpha e^(gamma a_rejected) a_rejected`, of mean log-probabilities `a` of a token; unbounded below.

    `alpha=0` is fine-tuning on the chosen responses; the default is the paper's. With `gamma`, a variant of the code,
    responses that are unlikely already count less; the factor is at most 1, and has a gradient.

    Reference: Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning,
      arXiv:2505.24850.
    """
    chosen, rejected = policy_scores(policy_chosen, policy_rejected, len_chosen=len_chosen, len_rejected=len_rejected)
    weight = alpha * jnp.exp(jnp.minimum(gamma * rejected, 0))
    negative = pointwise(rejected, 0.0, beta=1.0, link=linear_link, negative_weight=weight)
    return pointwise(chosen, 1.0, beta=1.0, link=linear_link) + negative


def unlikelihood(logp: Array, desirable: Array, mask: Array, *, alpha: float | Array = 1.0) -> Array:
    """`-g log p - alpha (1 - g) log(1 - p)` of each token, `[B, T]`: good ones become likely, bad ones unlikely.

    One of PHF's objectives. `g = desirable[B, T]` is 1 for good tokens, 0 for bad; `1 - p` is at least 1e-20. Results
    are 0 where the mask is, and `alpha` is the paper's.

    Reference: Pretraining Language Models with Human Preferences, arXiv:2302.08582.
    """
    check_floating(logp=logp)
    check_same_shape(logp=logp, desirable=desirable, mask=mask)
    logp = jnp.where(mask != 0, at_least_float32(logp), -1.0)
    good = jnp.where(mask != 0, jax.lax.stop_gradient(desirable), 1)
    loss = -good * logp - alpha * (1 - good) * log1mexp(jnp.minimum(logp, -1e-20))
    return jnp.where(mask != 0, loss, 0)


def advantage_weighted_nll(
    logp: Array, advantage: Array, mask: Array, *, beta: float | Array = 10.0, weight_max: float | Array = 1000.0
) -> Array:
    """`-min(e^(advantage / beta), weight_max) log p` of each token, `[B, T]`: likelihood, weighted by a constant.

    PHF's AWR; with rewards in place of `advantage[B, T]` its RWR, reward-weighted regression. Results are 0 where the
    mask is. The defaults are the paper's; `beta=0` gives NaN where the advantage is 0.

    Reference: Pretraining Language Models with Human Preferences, arXiv:2302.08582.
    """
    check_floating(logp=logp, advantage=advantage)
    check_same_shape(logp=logp, advantage=advantage, mask=mask)
    advantage = jnp.where(mask != 0, jax.lax.stop_gradient(at_least_float32(advantage)), 0)
    weight = jnp.exp(jnp.minimum(advantage / beta, jnp.log(weight_max)))
    return -weight * jnp.where(mask != 0, at_least_float32(logp), 0)


def _single_log_ratio(policy: Array, reference: Array, desirable: float | Array) -> Array:
    check_floating(policy=policy, reference=reference)
    check_same_shape(policy=policy, reference=reference)
    check_per_example(policy, desirable=desirable)
    return log_ratio(policy, reference)

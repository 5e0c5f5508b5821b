r"""Pairs of log-ratios: DPO with other links, labels and margins.

Every method maps log-probabilities of a chosen and a rejected response under a policy and a reference,
`policy_chosen[B]`, `policy_rejected[B]`, `ref_chosen[B]`, `ref_rejected[B]`, to losses `[B]`, in float32 at least.
Log-probabilities are sums over the tokens of a response (`tokens.sequence_logp`); lengths `len_chosen[B]`,
`len_rejected[B]` count these tokens, and are at least 1 where they divide. References are constants, and so are
margins, values, labels from elsewhere: they receive no gradient. Other numbers, `beta` first, are scalars or `[B]` and
may be traced. All this, and what follows, holds in `pair_scores`, `pair_terms`, `reference_free` and `anchored` too.

    h = log pi - log ref        D = h_chosen - h_rejected        l(z) = -log sigmoid(z)

Shapes that do not fit and log-probabilities that are not floating raise a ValueError.
"""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape
from esscher.objectives.preference.links import Link, discopop_link, hinge_link, squared_link
from esscher.objectives.preference.losses import listwise_softmax, pairwise
from esscher.objectives.preference.scores import log_ratio, per_token

__all__ = [
    "cdpo",
    "discopop",
    "dno",
    "dpo",
    "exo_pair",
    "gpo",
    "hinge",
    "ipo",
    "log_ratios",
    "odpo",
    "policy_scores",
    "r_dpo",
    "rdpo",
    "soft_dpo",
    "step_apo",
]


# --- scores of a pair -------------------------------------------------------------------------------------------------


def policy_scores(
    policy_chosen: Array, policy_rejected: Array, *, len_chosen: Array | None = None, len_rejected: Array | None = None
) -> tuple[Array, Array]:
    """The policy's log-probabilities of a pair, in float32 at least; means over tokens if the lengths are given.

    Reference: SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734.
    """
    check_floating(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    return _averaged(at_least_float32(policy_chosen), at_least_float32(policy_rejected), len_chosen, len_rejected)


def log_ratios(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    len_chosen: Array | None = None,
    len_rejected: Array | None = None,
) -> tuple[Array, Array]:
    """`h` of the chosen and of the rejected response, `[B]` each; divided by the lengths if they are given.

    `beta h` is the implicit reward, up to a prompt's constant.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    check_floating(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_floating(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    chosen, rejected = log_ratio(policy_chosen, ref_chosen), log_ratio(policy_rejected, ref_rejected)
    return _averaged(chosen, rejected, len_chosen, len_rejected)


def _averaged(
    chosen: Array, rejected: Array, len_chosen: Array | None, len_rejected: Array | None
) -> tuple[Array, Array]:
    if len_chosen is None and len_rejected is None:
        return chosen, rejected
    if len_chosen is None or len_rejected is None:
        raise ValueError("len_chosen and len_rejected must be given together")
    check_same_shape(policy_chosen=chosen, len_chosen=len_chosen, len_rejected=len_rejected)
    return per_token(chosen, len_chosen), per_token(rejected, len_rejected)


# --- the logistic link ------------------------------------------------------------------------------------------------


def dpo(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.1
) -> Array:
    """`l(beta D)`: with Bradley-Terry labels of rewards `r` the optimum is `pi = ref exp(r / beta) / Z`.

    The same loss on other pairs is: online and iterative DPO (pairs from the policy; TR-DPO also averages the
    reference's parameters), SPIN (chosen: data, rejected: the last policy, which is the reference), Step-DPO and
    intervened preference optimisation (log-probabilities from the token on where the two responses part), practical
    DNO (a teacher's response against the policy's). `beta=0.1` is common to the released implementations.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    return pairwise(*log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected), beta=beta)


def cdpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
    flip_prob: float | Array = 0.1,
) -> Array:
    """Conservative DPO, `(1 - e) l(z) + e l(-z)` with `z = beta D`, for labels flipped with probability `e`.

    A label that is always the same has its optimum at `z = log((1 - e) / e)`, finite. `flip_prob` outside of `[0, 1]`
    gives NaN; 0 is DPO; the default is ours.

    Reference: A note on DPO with noisy preferences and relationship to IPO, Eric Mitchell (2023).
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*h, beta=beta, flip_prob=flip_prob)


def rdpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
    flip_prob: float | Array = 0.1,
) -> Array:
    """Robust DPO, `((1 - e) l(z) - e l(-z)) / (1 - 2e)`: under labels flipped with probability `e` its mean is DPO.

    Unbounded below: its slope tends to `-e / (1 - 2e)`. `flip_prob` outside of `[0, 1/2)` gives NaN; 0 is DPO. The
    defaults are the paper's.

    Reference: Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv:2403.00409.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*h, beta=beta, flip_prob=flip_prob, mode="unbiased")


def soft_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    label_prob: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """`p l(z) + (1 - p) l(-z)` with `z = beta D`, where `p = label_prob` is the probability that chosen is better.

    The optimum of a pair is `z = logit p`. A `label_prob` outside of `[0, 1]` gives NaN; 1 is DPO.

    Reference: Geometric-Averaged Preference Optimization for Soft Preference Labels, arXiv:2409.06691.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, label_prob=label_prob)
    return pairwise(*h, beta=beta, label_prob=jax.lax.stop_gradient(label_prob))


def dno(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    win_rate_chosen: float | Array,
    win_rate_rejected: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """Direct Nash optimisation: `soft_dpo` with `p = sigmoid(win_rate_chosen - win_rate_rejected)`.

    A win rate is the probability of being preferred to a response of the last policy, which is the reference; it is a
    constant. The optimum is `pi = ref exp(win_rate / beta) / Z`, where `beta` is the paper's eta; its default is ours.

    Reference: Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences,
      arXiv:2404.03715.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, win_rate_chosen=win_rate_chosen, win_rate_rejected=win_rate_rejected)
    p = jax.nn.sigmoid(win_rate_chosen - win_rate_rejected)
    return pairwise(*h, beta=beta, label_prob=jax.lax.stop_gradient(p))


# --- margins ----------------------------------------------------------------------------------------------------------


def odpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    margin: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """DPO with an offset, `l(beta D - margin)`: the better the chosen response, the larger the difference asked for.

    The margin is in units of reward, in the paper a multiple of the log gap of the two responses' scores; 0 is DPO.

    Reference: Direct Preference Optimization with an Offset, arXiv:2402.10571.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return pairwise(*h, beta=beta, margin=jax.lax.stop_gradient(margin))


def step_apo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    value_chosen: float | Array,
    value_rejected: float | Array,
    beta: float | Array = 0.1,
) -> Array:
    """Step-level advantage preference, `l(beta D - (value_chosen - value_rejected))`, of two steps from one state.

    Values are those of the states that the steps lead to, by tree search; log-probabilities are those of the steps.
    Equal values are Step-DPO. The default `beta` is DPO's.

    Reference: CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks, arXiv:2409.08642.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, value_chosen=value_chosen, value_rejected=value_rejected)
    return pairwise(*h, beta=beta, margin=jax.lax.stop_gradient(value_chosen - value_rejected))


def r_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    len_chosen: Array,
    len_rejected: Array,
    beta: float | Array = 0.1,
    alpha: float | Array = 0.01,
) -> Array:
    """Length-regularised DPO, `l(beta D + alpha (len_chosen - len_rejected))`: length explains part of the labels.

    R-DPO. With labels of rewards `r` the optimum is `ref exp((r - alpha len) / beta) / Z`. `alpha=0` is DPO and equal
    lengths are; the paper tries values about its default.

    Reference: Disentangling Length from Quality in Direct Preference Optimization, arXiv:2403.19159.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_same_shape(policy_chosen=policy_chosen, len_chosen=len_chosen, len_rejected=len_rejected)
    return pairwise(*h, beta=beta, margin=alpha * (len_rejected - len_chosen))


# --- other links ------------------------------------------------------------------------------------------------------


def gpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    link: Link,
    beta: float | Array = 0.1,
) -> Array:
    """`link(beta D)`, for any of `links`: logistic is DPO, hinge SLiC's, squared IPO's up to its scale.

    Reference: Generalized Preference Optimization: A Unified Approach to Offline Alignment, arXiv:2402.05749.
    """
    return pairwise(*log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected), beta=beta, link=link)


def hinge(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float | Array = 0.1
) -> Array:
    """`max(0, 1 - beta D)`: RSO's hinge-norm loss; the paper has `beta=0.05`, TRL the default.

    It is SLiC's hinge on log-ratios; `reference_free.slic` has it on log-probabilities.

    Reference: Statistical Rejection Sampling Improves Preference Optimization, arXiv:2309.06657.
    """
    return gpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, link=hinge_link, beta=beta)


def ipo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    normalize: bool,
    beta: float | Array = 0.1,
    len_chosen: Array | None = None,
    len_rejected: Array | None = None,
) -> Array:
    """Identity preference optimisation, `(D - 1 / (2 beta))^2`; `beta` is the paper's tau.

    With `normalize` `D` is the difference of log-ratios per token, as in TRL, which needs the lengths; without it that
    of the sums, as in the paper and OpenRLHF, whatever the lengths. There is no default: good values of `beta` differ
    by the length. `beta=0` gives infinity.

    Reference: A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv:2310.12036.
    """
    if normalize and (len_chosen is None or len_rejected is None):
        raise ValueError("len_chosen and len_rejected must be given with normalize=True")
    check_per_example(policy_chosen, beta=beta)
    lengths = {"len_chosen": len_chosen, "len_rejected": len_rejected} if normalize else {}
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, **lengths)
    return pairwise(*h, beta=1.0, link=squared_link(jnp.divide(0.5, beta)))


def discopop(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.05,
    tau: float | Array = 0.05,
) -> Array:
    """`(1 - m) l(z) + m e^-z` with `z = beta D` and `m = sigmoid(z / tau)`: found by a language model; not convex.

    The defaults are the paper's; exponents as in `links.discopop_link`; `tau` is positive, 0 gives NaN at `z = 0`.

    Reference: Discovering Preference Optimization Algorithms with and for Large Language Models, arXiv:2406.08414.
    """
    return gpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, link=discopop_link(tau), beta=beta)


def exo_pair(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
    flip_prob: float | Array = 1e-3,
) -> Array:
    """`KL(sigmoid(z) || 1 - e)` with `z = beta D`: the reverse divergence of what `cdpo` has the forward one of.

    Its minimum, 0, is at `z = log((1 - e) / e)`, and it is bounded. `flip_prob` is a constant in `(0, 1)`: 0 and 1 give
    infinity, beyond is NaN. The defaults are those TRL's documentation gives.

    Reference: Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856.
    """
    chosen, rejected = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_per_example(policy_chosen, beta=beta, flip_prob=flip_prob)
    z, e = beta * (chosen - rejected), jnp.broadcast_to(flip_prob, chosen.shape)
    target = jnp.stack([jnp.log1p(-e), jnp.log(e)], axis=-1)
    return listwise_softmax(jnp.stack([z, jnp.zeros_like(z)], axis=-1), target, direction="reverse")

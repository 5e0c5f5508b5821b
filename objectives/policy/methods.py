r"""Named policy losses on advantages that are given: PPO and its successors, each a link, a level and their numbers.

Every method maps `logp[B, T]`, `logp_old[B, T]`, `advantages` of each token `[B, T]` or sequence `[B]` and `mask[B, T]`
to losses `[B, T]`, to be minimised, in nats, in float32 at least, 0 where the mask is; `tokens.aggregate` reduces them,
and each docstring says how the method does. Old and reference log-probabilities and advantages are constants. What
stands under the mask, NaN included, has no influence. Numbers may be traced. A correction for the sampler,
`ratios.importance_weight`, multiplies any of these losses.

Shapes that do not fit and arrays that are not floating raise a ValueError.
"""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_same_shape
from esscher.objectives.policy.kl import Kind, kl_estimate
from esscher.objectives.policy.links import (
    Link,
    clipped_weight_link,
    importance_link,
    ppo_link,
    score_link,
    signed_weight_link,
    soft_gate_link,
)
from esscher.objectives.policy.losses import policy_gradient
from esscher.objectives.policy.ratios import Level, log_ratio

__all__ = [
    "cispo",
    "clip_cov",
    "gmpo",
    "gspo",
    "kl_cov",
    "kl_penalty",
    "length_adaptive_lambda",
    "positive_nll",
    "ppo",
    "reinforce",
    "sapo",
    "signed_advantage",
    "topr",
    "vespo",
]

Float = float | Array


# --- without a trust region, or with one for each token ---------------------------------------------------------------


def reinforce(logp: Array, advantages: Array, mask: Array) -> Array:
    """`-A log pi`: on samples of the policy itself its gradient is that of the expected reward, `-A grad log pi`.

    Any baseline in `A` that does not depend on the token keeps that. A2C is this with `advantages.gae`, next to
    `value_loss(clip=inf)` and an entropy bonus; IMPALA takes its advantages from `advantages.vtrace`.

    Reference: Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, Ronald
      Williams (1992).
    Reference: Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783.
    """
    return policy_gradient(logp, logp, advantages, mask, link=score_link, form="score")


def ppo(
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    low: Float = 0.2,
    high: Float = 0.2,
    dual: Float | None = None,
) -> Array:
    """`-min(R A, clip(R, 1 - low, 1 + high) A)`, and with `dual` at most `-dual A` where `A < 0`.

    0.2 is the paper's; DAPO raises `high` to 0.28. verl always has `dual=3`; TRL's `delta` is `dual` and off by
    default, INTELLECT-2's is 4. Both must exceed `1 + high`. Reduced by "token-mean" in verl.

    Reference: Proximal Policy Optimization Algorithms, arXiv:1707.06347.
    Reference: Mastering Complex Control in MOBA Games with Deep Reinforcement Learning, arXiv:1912.09729.
    """
    return policy_gradient(logp, logp_old, advantages, mask, link=ppo_link(low, high, dual))


def sapo(
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    positive: Float = 1.0,
    negative: Float = 1.05,
) -> Array:
    """`-4 A sigmoid(tau (R - 1)) / tau`: a gate instead of a clip, `tau = positive` where `A > 0`, else `negative`.

    The coefficient of `grad log pi` is `4 s (1 - s) R A`, with `s` the sigmoid: `A` at `R = 1`. The defaults are the
    paper's; reduced by "seq-mean-token-mean".

    Reference: Soft Adaptive Policy Optimization, arXiv:2511.20347.
    """
    return policy_gradient(logp, logp_old, advantages, mask, link=soft_gate_link(positive, negative))


# --- a bounded weight in front of grad log pi -------------------------------------------------------------------------


def cispo(
    logp: Array, logp_old: Array, advantages: Array, mask: Array, *, low: Float = 0.8, high: Float = 1.28
) -> Array:
    """`-sg(clip(R, low, high)) A log pi`: the weight is bounded, and no token loses its gradient.

    `low` and `high` bound the ratio itself. The libraries do not agree on what their numbers mean:

        verl, `clip_ratio_low=0.2`, `clip_ratio_high=0.28`    low=0.8, high=1.28: the default here
        TRL, `epsilon_high=5`                                 low=0, high=5
        truncated importance sampling (ROLL)                  low=0, high=1

    Reduced by "token-mean".

    Reference: MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, arXiv:2506.13585.
    """
    link = clipped_weight_link(low, high)
    return policy_gradient(logp, logp_old, advantages, mask, link=link, form="score")


def topr(logp: Array, logp_old: Array, advantages: Array, mask: Array, *, level: Level = "sequence") -> Array:
    """`-w A log pi` with `w = 1` where `A >= 0` and `sg(min(R, 1))` where `A < 0`: for data of any policy.

    Good samples are learned as by supervision; bad ones count only as far as they are still likely, so that their
    probability does not run away to 0. The paper has rewards of +1 and -1, less a baseline, as advantages, and the
    ratio of the whole sequence; ROLL that of each token; others have its geometric mean. Reduced by
    "seq-mean-token-sum".

    Reference: Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs, arXiv:2503.14286.
    """
    link = signed_weight_link((1.0, 1.0), (0.0, 1.0))
    return policy_gradient(logp, logp_old, advantages, mask, level=level, link=link, form="score")


def vespo(
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    positive: tuple[Float, Float] = (2.0, 3.0),
    negative: tuple[Float, Float] = (3.0, 2.0),
) -> Array:
    """`-sg(W^k exp(lam (1 - W))) A log pi`, where `W` is the ratio of the whole sequence: 1 at `W = 1`.

    The weight is largest at `W = k / lam` and falls off on both sides. `(k, lam)` are `positive` where `A >= 0` and
    `negative` elsewhere; the defaults are TRL's. It reduces by "token-mean". TRL bounds `log W` below by `log 1e-8`,
    here it is -20; both weights are less than 1e-14 there.

    Reference: VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training,
      arXiv:2602.10693.
    """

    def phi(log_ratio: Array, advantages: Array) -> Array:
        k, lam = (jnp.where(advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
        weight = jnp.exp(k * log_ratio - lam * jnp.expm1(log_ratio))
        return jax.lax.stop_gradient(weight) * advantages * log_ratio

    return policy_gradient(logp, logp_old, advantages, mask, level="sequence", link=phi, form="score")


# --- the ratio of a sequence ------------------------------------------------------------------------------------------


def gspo(
    logp: Array, logp_old: Array, advantages: Array, mask: Array, *, low: Float = 3e-4, high: Float = 4e-4
) -> Array:
    """PPO's loss with `R = exp(mean_t l_t)`, the geometric mean over the sequence, clipped as one.

    Written with the gradient of each token in its place (GSPO-token), so that advantages may differ between tokens;
    where a sequence has one advantage, values and gradients are those of the sequence's form. The defaults are the
    paper's; reduced by "seq-mean-token-mean". LUSPO is the same, reduced by "seq-mean-token-sum": each sequence's loss
    times its length.

    Reference: Group Sequence Policy Optimization, arXiv:2507.18071.
    Reference: Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in
      RLVR, arXiv:2602.05261.
    """
    link = ppo_link(low, high)
    return policy_gradient(logp, logp_old, advantages, mask, level="geometric_token", link=link)


def gmpo(logp: Array, logp_old: Array, advantages: Array, mask: Array, *, low: Float = 0.4, high: Float = 0.4) -> Array:
    """`-A exp(mean_t c_t)`, with `c = min(l, high)` where `A >= 0` and `max(l, -low)` where `A < 0`.

    Unlike in GSPO each token is clipped before the mean, in the logarithm, and on the side only where it has moved too
    far; such tokens get no gradient. The defaults are the paper's; reduced by "seq-mean-token-mean".

    Reference: Geometric-Mean Policy Optimization, arXiv:2507.20673.
    """

    def clipped(l: Array, a: Array) -> Array:  # noqa: E741
        return jnp.where(a >= 0, jnp.minimum(l, high), jnp.maximum(l, -low))

    kept = _phi(logp, logp_old, advantages, mask, clipped)
    return policy_gradient(kept, jnp.zeros_like(kept), advantages, mask, level="geometric", link=importance_link)


# --- tokens whose log-probability and advantage vary together ---------------------------------------------------------


def clip_cov(
    key: Array,
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    low: Float = 0.2,
    high: Float = 0.2,
    fraction: Float = 2e-4,
    bounds: tuple[Float, Float] = (1.0, 5.0),
) -> Array:
    """PPO's loss, zeroed on a few random tokens of large covariance `(A - mean A) (log pi - mean log pi)`.

    Those tokens make the entropy fall. The means are over all tokens of the batch, and so is the number: `fraction` of
    them, at least one; they are drawn, without replacement, from the tokens with a covariance strictly inside of
    `bounds` that PPO does not clip. The defaults are those of the paper's code and of verl; reduced by "token-mean".

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv:2505.22617.
    """
    loss = ppo(logp, logp_old, advantages, mask, low=low, high=high)
    free = _phi(logp, logp_old, advantages, mask, importance_link)
    covariance, kept = _covariance(logp, advantages, mask)
    candidates = kept & (loss == -free) & (covariance > bounds[0]) & (covariance < bounds[1])
    order = tokens.masked_rank(jax.random.uniform(key, (mask.size,)), candidates.ravel()).reshape(mask.shape)
    return jnp.where(candidates & (order < _share(kept, fraction)), 0, loss)


def kl_cov(
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    fraction: Float = 2e-4,
    coefficient: Float = 1.0,
) -> Array:
    """`-R A`, unclipped, plus `coefficient |l|` on the tokens of the largest covariance, as in `clip_cov`.

    These are `fraction` of the batch's tokens, at least one. `|l|` has no gradient at `l = 0`. The defaults are
    verl's; reduced by "token-mean".

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv:2505.22617.
    """
    loss = policy_gradient(logp, logp_old, advantages, mask, link=importance_link)
    covariance, kept = _covariance(logp, advantages, mask)
    order = tokens.masked_rank(covariance.ravel(), kept.ravel()).reshape(mask.shape)
    penalty = coefficient * jnp.abs(log_ratio(logp, logp_old, mask))
    return loss + jnp.where(kept & (order < _share(kept, fraction)), penalty, 0)


def _phi(logp: Array, logp_old: Array, advantages: Array, mask: Array, link: Link) -> Array:
    """What a link gives for each token, 0 where the mask is."""
    return -policy_gradient(logp, logp_old, advantages, mask, link=link)


def _covariance(logp: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    """Each token's part in the covariance of advantages and log-probabilities, a constant, and which tokens count."""
    kept = mask != 0
    a = _phi(logp, logp, advantages, mask, lambda l, a: a)  # noqa: E741
    x = jax.lax.stop_gradient(jnp.where(kept, at_least_float32(logp), 0))
    return (a - tokens.masked_mean(a, kept)) * (x - tokens.masked_mean(x, kept)), kept


def _share(kept: Array, fraction: Float) -> Array:
    return jnp.maximum(jnp.floor(fraction * kept.sum()), 1)


# --- terms that are added ---------------------------------------------------------------------------------------------


def kl_penalty(
    logp: Array, logp_ref: Array, mask: Array, *, beta: Float, kind: Kind = "k3", ratio: Array | None = None
) -> Array:
    """`beta R kl` of each token, `[B, T]`: to be added to any of these losses before it is reduced.

    Which gradient each kind has, see `kl`. `logp_ref` is a constant.

    Args:
      logp: `[B, T]`.
      logp_ref: `[B, T]`.
      mask: `[B, T]`.
      beta: in units of advantages per nat: 0.04 in the GRPO paper, 0.001 in verl, 0 in TRL.
      kind: as in `kl_estimate`; k3 in the GRPO paper, TRL and verl.
      ratio: `R = exp(log_ratio(logp, logp_old, mask))`, which is differentiated too, for samples of another policy. TRL
        has it by default (`use_bias_correction_kl`), the GRPO paper and verl do not; 1 if absent.

    Reference: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv:2402.03300.
    Reference: DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, arXiv:2512.02556.
    """
    check_same_shape(logp=logp, logp_ref=logp_ref, mask=mask)
    check_floating(logp=logp, logp_ref=logp_ref)
    kept = mask != 0
    kl = kl_estimate(jnp.where(kept, logp, 0), jnp.where(kept, logp_ref, 0), kind)
    if ratio is not None:
        check_same_shape(logp=logp, ratio=ratio)
        kl = kl * jnp.where(kept, ratio, 0)
    return jnp.where(kept, beta * kl, 0)


def positive_nll(logp: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    """`-log pi` of the tokens with `A > 0`, summed, and their number: the imitation term of VAPO and THOR.

    A numerator and a denominator of its own, `[]` each: the sum is added after the division, times 0.1 in VAPO and 0.01
    in THOR. Without such a token both are 0. VAPO's policy loss is `ppo(low=0.2, high=0.28)` with advantages from
    `gae(lam=length_adaptive_lambda(mask))`, reduced by "token-mean", its critic's returns have `lam=1`.

    Args:
      logp: `[B, T]`.
      advantages: `[B, T]` or `[B]`, constants; also any other number that is positive for what is to be imitated.
      mask: `[B, T]`.

    Reference: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks, arXiv:2504.05118.
    Reference: THOR: Tool-Integrated Hierarchical Optimization via RL for Mathematical Reasoning, arXiv:2509.13761.
    """
    positive = _phi(logp, logp, advantages, mask, lambda l, a: a) > 0  # noqa: E741
    return tokens.aggregate(-at_least_float32(logp), positive, "token-mean")


# --- advantages and their parameters ----------------------------------------------------------------------------------


def signed_advantage(correct: Array, *, positive: Float = 1.0, negative: Float = 1.0) -> Array:
    """`positive` where an answer is correct and `-negative` where it is not: no baseline, no scale; of any shape.

        positive, negative      method
        1, 1                    REINFORCE with rewards of +1 and -1
        1, 0                    PSR
        0, 1                    NSR
        0.1, 1                  W-REINFORCE

    On samples of the policy, summed over tokens, the expected gradients of all of them have one direction, that of the
    pass rate: PSR and NSR are each its gradient, W-REINFORCE is 1.1 times it. `correct` is bool or a number that is
    not 0; the loss around it is `ppo`, reduced by "token-mean".

    Reference: The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning, arXiv:2506.01347.
    """
    return jnp.where(correct != 0, jnp.asarray(positive, float), -jnp.asarray(negative, float))


def length_adaptive_lambda(mask: Array, *, alpha: Float = 0.05) -> Array:
    """`1 - 1 / (alpha len)`, at least 0, `[B, T] -> [B]`: `lam` of the policy's `gae` in VAPO.

    The errors of `gae` then reach back over about `alpha len` tokens. The default is the paper's, whose critic has
    `lam=1`. For answers of up to `1 / alpha` tokens it is 0.

    Reference: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks, arXiv:2504.05118.
    """
    return jnp.maximum(1 - 1 / (alpha * jnp.maximum((mask != 0).sum(-1), 1)), 0)

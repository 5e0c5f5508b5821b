r"""Policies by weighted likelihood and by regression: a better law is written down first, then fitted.

    method    law                                              fitted by
    RWR       sampler exp(r / beta)                            likelihood, weighted by exp(r / beta)
    AWR       sampler exp(A / beta)                            likelihood, with the weight bounded
    MPO       per state, over its samples; beta by its dual    likelihood, weighted by a softmax
    V-MPO     over the best half of a batch; likewise          likelihood, weighted by a softmax
    A*-PO     reference exp(r / beta) / Z, Z from samples      squared error of the log-ratio
    NFT       sampler given that the answer is right           likelihood of right and of wrong answers

Everything is in float32 at least. Weights, rewards, values, old and reference log-probabilities are constants.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape
from esscher.objectives.policy.ratios import Level, log_ratio

__all__ = [
    "VMPO",
    "TiltedSamples",
    "a2po_loss",
    "advantage_weights",
    "kl_constraint_loss",
    "mpo_loss",
    "nft_loss",
    "optimal_value",
    "tilted_samples",
    "top_fraction_mask",
    "vmpo",
]


# --- right and wrong answers ------------------------------------------------------------------------------------------


def nft_loss(
    logp: Array,
    logp_old: Array,
    correct: Array,
    pass_rate: Array,
    mask: Array,
    *,
    level: Level = "token",
    weight: Literal["one_minus_rate", "sqrt_odds", "none"] = "one_minus_rate",
    floor: float | Array = 1.0,
    negative_weight: float | Array = 1.0,
    rate_limits: tuple[float | Array, float | Array] = (0.02, 0.98),
) -> Array:
    r"""`-w log R` of a right answer's token, `-w log max(Q, floor)` of a wrong one's, `Q = (1 - q R) / (1 - q)`.

    Negative-aware fine-tuning. With `q` the rate of right answers, `q pi + (1 - q) pi_neg = pi_old` names the law of
    wrong answers that belongs to a policy `pi` of right ones, and `Q = pi_neg / pi_old`. At whole sequences the optimum
    is `pi_old` given that the answer is right. The maximum is taken of the value alone: the gradient is that of `Q`
    over the value, `w q R / ((1 - q) max(Q, floor))` on a wrong log-probability, and `-w` on a right one. So the value
    is no likelihood.

        weight             w                    gradient at R = 1, on right and wrong
        "one_minus_rate"   1 - q                -(1 - q), q: Dr. GRPO
        "sqrt_odds"        sqrt((1 - q) / q)    -sqrt((1 - q) / q), sqrt(q / (1 - q)): GRPO with `ddof=0`
        "none"             1                    -1, q / (1 - q)

    Prompts with none or all right are left out by the mask. The paper reduces by "constant". The defaults are the
    authors', but for the largest of `log R`: theirs is 10, here it is the 20 of `ratios.log_ratio`.

    Args:
      logp: of each token, `[B, T]`, in nats.
      logp_old: under the policy that sampled, `[B, T]`.
      correct: `[B]`, not 0 for a right answer.
      pass_rate: the share of right answers to the same prompt, this one included, `[B]`.
      mask: `[B, T]`.
      level: of `R`. With "sequence" each token holds the sequence's loss, as in `policy_gradient`: reduce by
        "seq-mean-token-mean".
      weight: see above.
      floor: smallest denominator of the gradient; 1, or 1/2 for the authors' largest model.
      negative_weight: of wrong answers; 0 is rejection fine-tuning.
      rate_limits: `pass_rate` is clipped to these.

    Returns:
      `[B, T]`.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating, an unknown level or weight.

    Reference: Bridging Supervised Learning and Reinforcement Learning in Math Reasoning, arXiv:2505.18116.
    """
    l = log_ratio(logp, logp_old, mask, level=level)  # noqa: E741
    check_floating(pass_rate=pass_rate)
    for name, array in {"correct": correct, "pass_rate": pass_rate}.items():
        if array.shape != logp.shape[:1]:
            raise ValueError(f"{name} must have shape {logp.shape[:1]}, got {array.shape}")
    q = jnp.clip(jax.lax.stop_gradient(at_least_float32(pass_rate)), *rate_limits)[:, None]
    # 1 - q R = (1 - q) + q (1 - R), without cancellation at R = 1.
    quotient = 1 - q / (1 - q) * jnp.expm1(l)
    # The last difference is 0; one with the bounded value in it would be lost in rounding where the ratio is large.
    bounded = jax.lax.stop_gradient(jnp.maximum(quotient, floor))
    wrong = -jnp.log(bounded) - (quotient - jax.lax.stop_gradient(quotient)) / bounded
    loss = jnp.where(correct[:, None] != 0, -l, negative_weight * wrong)
    match weight:
        case "one_minus_rate":
            loss = (1 - q) * loss
        case "sqrt_odds":
            loss = jnp.sqrt((1 - q) / q) * loss
        case "none":
            pass
        case _:
            raise ValueError(f'weight must be "one_minus_rate", "sqrt_odds" or "none", got {weight!r}')
    return jnp.where(mask != 0, loss, 0)


# --- weights of a tilt ------------------------------------------------------------------------------------------------


def advantage_weights(
    advantages: Array, *, beta: float | Array = 1.0, weight_max: float | Array | None = 20.0
) -> Array:
    r"""`w = min(exp(A / beta), weight_max)`, of any shape, constants: weights of a likelihood whose optimum is a tilt.

    Over samples of `pi_old` the law that minimises `E[-w log pi]` is `pi_old w / Z`; unbounded it is the exact tilt
    `pi_old exp(A / beta) / Z`. As `weight` of `policy_gradient` with the score link and advantages of 1 this is AWR;
    with rewards in place of advantages and `weight_max=None` it is RWR. `beta` is positive. The defaults are those of
    the code of AWR, as recalled, for advantages that have been standardised.

    Raises:
      ValueError: advantages that are not floating.

    Reference: Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning, arXiv:1910.00177.
    Reference: Reinforcement Learning by Reward-weighted Regression for Operational Space Control, Peters and Schaal
      (2007).
    """
    check_floating(advantages=advantages)
    exponent = jax.lax.stop_gradient(at_least_float32(advantages)) / beta
    if weight_max is not None:
        exponent = jnp.minimum(exponent, jnp.log(weight_max))
    return jax.lax.stop_gradient(jnp.exp(exponent))


def optimal_value(values: Array, beta: float | Array, *, valid: Array | None = None) -> Array:
    """`beta log mean_i exp(r_i / beta)` along the last axis, `[..., N] -> [...]`: `V* = beta log E_ref exp(r / beta)`.

    It is at least the mean, which it tends to for large `beta`, and at most the largest reward. The estimate from
    finitely many samples is too low on average. Differentiable in `beta`; values are constants.

    Args:
      values: rewards `r` of samples of the reference, `[..., N]`.
      beta: temperature, positive, a scalar; TRL has 1/2.
      valid: `[..., N]`, 0 for a sample that does not count; if absent, samples whose value is NaN are such. With none
        left the result is 0.

    Raises:
      ValueError: shapes that differ, values that are not floating.

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686.
    """
    scaled, kept, count = _scaled(values, beta, valid)
    value = beta * (jax.nn.logsumexp(jnp.where(kept, scaled, -jnp.inf), axis=-1) - jnp.log(jnp.maximum(count, 1)))
    return jnp.where(count > 0, value, 0)


def _scaled(values: Array, beta: float | Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Values over beta, finite; which of them to keep, all in a row where none is valid; how many are valid."""
    check_floating(values=values)
    valid = ~jnp.isnan(values) if valid is None else valid != 0
    check_same_shape(values=values, valid=valid)
    count = valid.sum(-1)
    values = jax.lax.stop_gradient(jnp.where(valid, at_least_float32(values), 0))
    return values / beta, valid | (count == 0)[..., None], count


class TiltedSamples(NamedTuple):
    """The E-step of MPO: what samples weigh, and what the temperature minimises."""

    weights: Array  # [..., N], constants that sum to 1
    temperature_loss: Array  # [...]


def tilted_samples(
    values: Array, temperature: float | Array, *, epsilon: float | Array, valid: Array | None = None
) -> TiltedSamples:
    r"""`w = softmax(q / T)` along the last axis, and the dual `T epsilon + T log mean_i exp(q_i / T)`.

    At the minimum of the dual in `T` the weights diverge from uniform by `epsilon` nats: the steepest tilt that is as
    near as that to the law of the samples. Weights and values are constants, the temperature learns by its loss.

    Args:
      values: of `N` samples, `[..., N]`: of actions in one state in MPO, advantages of a whole batch in V-MPO.
      temperature: `T`, positive, a scalar.
      epsilon: bound of the divergence, in nats.
      valid: as in `optimal_value`. Where no sample is valid, weights are 0 and the loss is `T epsilon`.

    Raises:
      ValueError: shapes that differ, values that are not floating.

    Reference: Maximum a Posteriori Policy Optimisation, arXiv:1806.06920.
    """
    scaled, kept, count = _scaled(values, temperature, valid)
    weights = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    weights = jax.lax.stop_gradient(jnp.where((count > 0)[..., None], weights, 0))
    return TiltedSamples(weights, temperature * epsilon + optimal_value(values, temperature, valid=valid))


def mpo_loss(logp: Array, values: Array, temperature: float | Array, *, epsilon: float | Array = 0.1) -> Array:
    """`-sum_i w_i log pi_i` plus the dual of the temperature, of each state, `[B, N], [B, N] -> [B]`.

    To this come `kl_constraint_loss`es of the policy against the last one. The default is the paper's.

    Args:
      logp: of the `N` actions sampled from the last policy in each state, `[B, N]`, under the policy.
      values: `Q` of these actions, `[B, N]`; actions whose value is NaN are left out.
      temperature: positive, a scalar; it learns by this loss.
      epsilon: as in `tilted_samples`.

    Raises:
      ValueError: shapes that differ, arrays that are not floating.

    Reference: Maximum a Posteriori Policy Optimisation, arXiv:1806.06920.
    """
    check_floating(logp=logp)
    check_same_shape(logp=logp, values=values)
    weights, dual = tilted_samples(values, temperature, epsilon=epsilon)
    return dual - jnp.where(weights > 0, weights * at_least_float32(logp), 0).sum(-1)


def top_fraction_mask(
    values: Array, mask: Array, fraction: float | Array, *, over: Literal["batch", "sequence"] = "batch"
) -> Array:
    """Which of the entries kept are among the largest `floor(fraction n)` of the `n` kept, booleans `[B, T]`.

    With advantages and 1/2 the samples of V-MPO; with entropies the tokens of the 20% rule, and of Prefix-RFT among
    those of a prefix. Of equal entries the first are taken. `fraction=0` keeps none, 1 all.

    Args:
      values: `[B, T]`, constants.
      mask: `[B, T]`.
      fraction: in `[0, 1]`, a scalar; may be traced.
      over: whether `n` counts the entries of the batch or of each row.

    Raises:
      ValueError: shapes that differ or are not `[B, T]`, values that are not floating, an unknown `over`.

    Reference: Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
      Reasoning, arXiv:2506.01939.
    """
    if values.ndim != 2:
        raise ValueError(f"values must have shape [B, T], got {values.shape}")
    if over not in ("batch", "sequence"):
        raise ValueError(f'over must be "batch" or "sequence", got {over!r}')
    check_same_shape(values=values, mask=mask)
    shape = (1, -1) if over == "batch" else values.shape
    kept = (mask != 0).reshape(shape)
    rank = tokens.masked_rank(jax.lax.stop_gradient(values).reshape(shape), kept)
    # The margin is for products such as 0.2 * 5 that rounding puts just below a whole number.
    largest = jnp.floor(fraction * kept.sum(-1, keepdims=True) * (1 + 1e-6))
    return (kept & (rank < largest)).reshape(values.shape)


class VMPO(NamedTuple):
    """What V-MPO minimises."""

    policy_loss: Array  # [B, T], whose mean over the tokens of the mask is the loss
    temperature_loss: Array  # []


def vmpo(
    logp: Array,
    advantages: Array,
    mask: Array,
    temperature: float | Array,
    *,
    epsilon: float | Array = 0.1,
    fraction: float | Array = 0.5,
) -> VMPO:
    """`-n w log pi` of each token and the dual of the temperature, `w` a softmax over the best half of the batch.

    `n` is the number of tokens kept, so that "token-mean" of the first, plus the second, is the loss. Weights are
    statistics of the whole batch: over several devices or micro-batches they are not those of its parts. In the place
    of tokens there may be whole sequences, `[B, 1]`. Dual and constraint as in `mpo_loss`; the defaults: half the batch
    is the paper's, `epsilon` ours.

    Args:
      logp: of each token, `[B, T]`, in nats.
      advantages: `[B, T]`, constants.
      mask: `[B, T]`.
      temperature: as in `tilted_samples`.
      epsilon: likewise.
      fraction: as in `top_fraction_mask`.

    Raises:
      ValueError: shapes that differ or are not `[B, T]`, arrays that are not floating.

    Reference: V-MPO: On-Policy Maximum a Posteriori Policy Optimization for Discrete and Continuous Control,
      arXiv:1909.12238.
    """
    check_floating(logp=logp, advantages=advantages)
    check_same_shape(logp=logp, advantages=advantages, mask=mask)
    best = top_fraction_mask(advantages, mask, fraction)
    weights, dual = tilted_samples(advantages.reshape(-1), temperature, epsilon=epsilon, valid=best.reshape(-1))
    likelihood = jnp.where(mask != 0, at_least_float32(logp), 0)
    return VMPO(-(mask != 0).sum() * weights.reshape(mask.shape) * likelihood, dual)


def kl_constraint_loss(kl: Array, alpha: float | Array, *, epsilon: float | Array) -> Array:
    """`alpha (epsilon - sg(kl)) + sg(alpha) kl`, elementwise: one loss, in which `kl` falls and `alpha` ascends.

    Its value is `alpha epsilon`. The multiplier grows while `kl` is above the bound, and shrinks below it.

    Args:
      kl: divergence of the policy from the last one, of any shape, in nats.
      alpha: not negative, a scalar.
      epsilon: the bound.

    Raises:
      ValueError: a divergence that is not floating.

    Reference: Maximum a Posteriori Policy Optimisation, arXiv:1806.06920.
    """
    check_floating(kl=kl)
    kl, alpha = at_least_float32(kl), jnp.asarray(alpha)
    return alpha * (epsilon - jax.lax.stop_gradient(kl)) + jax.lax.stop_gradient(alpha) * kl


def a2po_loss(policy: Array, reference: Array, rewards: Array, value: Array, *, beta: float | Array = 1e-3) -> Array:
    """`(beta (log pi - log ref) - (r - V*))^2` of each sequence, `[B]`: zero exactly at `pi = ref exp(r / beta) / Z`.

    On samples of any law; in the paper those of the policy, one for each prompt. With `V*` at another temperature, as
    in TRL (1/2 there, the default here), the optimum on samples of the policy is no such tilt.

    Args:
      policy: log-probability of each sequence, `[B]`, in nats: `tokens.sequence_logp`.
      reference: `[B]`.
      rewards: `[B]`.
      value: `[B]`, of its prompt, see `optimal_value`.
      beta: temperature, a scalar or `[B]`; the default is TRL's.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686.
    """
    arrays = {"policy": policy, "reference": reference, "rewards": rewards, "value": value}
    check_floating(**arrays)
    check_same_shape(**arrays)
    check_per_example(policy, beta=beta)
    policy, reference, rewards, value = map(at_least_float32, arrays.values())
    reference, target = jax.lax.stop_gradient((reference, rewards - value))
    return jnp.square(beta * (policy - reference) - target)

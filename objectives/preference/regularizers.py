r"""What goes beside a preference loss or multiplies it: penalties, weights, temperatures, and means over a batch.

Log-probabilities are in nats. Weights and temperatures that come from data are constants of the loss they enter.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape

__all__ = [
    "adaptive_beta",
    "dpop_penalty",
    "keep_typical_margins",
    "margin_scaled_beta",
    "nll",
    "running_mean_update",
    "tilted_mean",
    "token_kl",
    "value_incentive",
    "wpo_weight",
]

_LARGEST = 20.0  # exponents are clipped there

# --- penalties --------------------------------------------------------------------------------------------------------


def nll(logp: Array, mask: Array, *, normalize: bool) -> Array:
    """Negative log-likelihood of each sequence, `-sum_t m_t logp_t`; with `normalize` over its number of tokens.

    The third convention, the mean over all tokens of a batch, is `tokens.aggregate(-logp, mask, "token-mean")`.

    Args:
      logp: of each token, `[B, T]`, in nats.
      mask: `[B, T]`, 0 where a token does not count.
      normalize: false for CPO and SLiC, true for ORPO and iterative RPO; a row without tokens stays 0.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating.

    Reference: Iterative Reasoning Preference Optimization, arXiv:2404.19733.
    """
    return -tokens.sequence_logp(logp, mask, normalize=normalize)


def dpop_penalty(policy_chosen: Array, ref_chosen: Array) -> Array:
    """`max(0, log ref - log pi)` of the chosen responses: positive once the policy falls below its reference there.

    DPOP subtracts a multiple of it from the chosen score, inside the link. Its gradient at the kink is 0.

    Args:
      policy_chosen: `[B]`, in nats.
      ref_chosen: `[B]`, a constant.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that differ, arrays that are not floating.

    Reference: Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228.
    """
    check_floating(policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    check_same_shape(policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    fall = jax.lax.stop_gradient(at_least_float32(ref_chosen)) - at_least_float32(policy_chosen)
    return jnp.where(fall <= 0, 0, fall)


def value_incentive(
    policy_calibration: Array,
    ref_calibration: Array,
    *,
    coef: float | Array,
    attitude: Literal["optimistic", "pessimistic"],
) -> Array:
    r"""`+-coef (log pi - log ref)` of calibration responses: optimism pushes the policy away from them.

    With `coef = alpha beta` it is `-+alpha` times the optimal value `beta log E_ref e^{r/beta}` of the reward that the
    policy stands for, if that reward has mean 0 over the calibration responses: then the value is
    `-beta E (log pi - log ref)`. "optimistic" is minus, for exploration online, and has no lower bound: keep `coef`
    small. "pessimistic", for offline data, is an imitation of the calibration responses.

    Args:
      policy_calibration: `log pi` of the responses, `[B]`.
      ref_calibration: `log ref` of them, `[B]`, a constant.
      coef: not negative; a scalar or `[B]`.
      attitude: "optimistic" adds `coef (log pi - log ref)`, "pessimistic" subtracts it.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating, an unknown attitude.

    Reference: Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF,
      arXiv:2405.19320.
    """
    if attitude not in ("optimistic", "pessimistic"):
        raise ValueError(f'attitude must be "optimistic" or "pessimistic", got {attitude!r}')
    check_floating(policy_calibration=policy_calibration, ref_calibration=ref_calibration)
    check_same_shape(policy_calibration=policy_calibration, ref_calibration=ref_calibration)
    check_per_example(policy_calibration, coef=coef)
    ratio = at_least_float32(policy_calibration) - jax.lax.stop_gradient(at_least_float32(ref_calibration))
    return (coef if attitude == "optimistic" else -coef) * ratio


def token_kl(policy: Array, other: Array, mask: Array) -> Array:
    """Mean over a sequence's tokens of `e^d - 1 - d`, `d = log other - log pi`: estimates `KL(pi || other)`.

    Unbiased for tokens that the policy took; never negative. `d` is clipped at 20, in value and gradient. This is the
    estimator called k3; its gradient is that of the estimate, not of the divergence.

    Args:
      policy: log-probabilities of the tokens, `[B, T]`, in nats.
      other: under the reference or the policy that sampled, `[B, T]`, a constant.
      mask: `[B, T]`, 0 where a token does not count.

    Returns:
      `[B]`, float32 at least; 0 for a row without tokens.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating.

    Reference: Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM
      reasoning, arXiv:2504.04524.
    """
    check_floating(policy=policy, other=other)
    check_same_shape(policy=policy, other=other, mask=mask)
    d = jax.lax.stop_gradient(at_least_float32(other)) - at_least_float32(policy)
    d = jnp.minimum(jnp.where(mask != 0, d, 0), _LARGEST)
    return tokens.masked_mean(jnp.expm1(d) - d, mask, axis=-1)


# --- weights and temperatures -----------------------------------------------------------------------------------------


def wpo_weight(logp: Array, log_collision: Array, mask: Array) -> Array:
    """Weight of a response by how likely the policy is to write it, `exp mean_t (logp_t - log sum_v p_t(v)^2)`.

    A pair's loss is multiplied by the product of its two weights (older TRL clips that product at 1). A uniform policy
    gives every response the weight 1, and so does a certain one its own. The exponent is clipped at 20.

    Args:
      logp: of each token, `[B, T]`, in nats; a constant.
      log_collision: `log sum_v p_t(v)^2`, `[B, T]`, from `tokens.linear_token_statistics`; a constant.
      mask: `[B, T]`, 0 where a token does not count.

    Returns:
      Weights `[B]`, float32 at least; 1 for a row without tokens.

    Raises:
      ValueError: shapes that differ, arrays that are not floating.

    Reference: WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.
    """
    check_floating(logp=logp, log_collision=log_collision)
    check_same_shape(logp=logp, log_collision=log_collision, mask=mask)
    logp, log_collision = (at_least_float32(jax.lax.stop_gradient(x)) for x in (logp, log_collision))
    return jnp.exp(jnp.minimum(tokens.masked_mean(logp - log_collision, mask, axis=-1), _LARGEST))


def margin_scaled_beta(reward_gap: Array, *, beta: float | Array, w: float | Array, k: float | Array) -> Array:
    """`beta (1 + w (1 - e^{-k gap}))` of each pair: from `beta` at no gap up to `beta (1 + w)` for clear pairs.

    MM-RLHF's dynamic beta, which `pair_terms.mm_dpo` takes. Different temperatures move the population optimum away
    from the tilt.

    Args:
      reward_gap: reward of the chosen response minus that of the rejected one, `[B]`, a constant; below 0 counts as 0.
      beta: temperature without a gap; a scalar or `[B]`.
      w: relative size of the increase, likewise.
      k: how fast it is reached, not negative, likewise.

    Returns:
      Temperatures `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, a gap that is not floating.

    Reference: MM-RLHF: The Next Step Forward in Multimodal LLM Alignment, arXiv:2502.10391.
    """
    check_floating(reward_gap=reward_gap)
    check_per_example(reward_gap, beta=beta, w=w, k=k)
    gap = jnp.maximum(at_least_float32(jax.lax.stop_gradient(reward_gap)), 0)
    return beta * (1 - w * jnp.expm1(-k * gap))


def adaptive_beta(
    margins: Array,
    running_mean: float | Array,
    *,
    beta: float | Array,
    alpha: float | Array,
    weights: Array | None = None,
    minimum: float | Array = 1e-3,
) -> Array:
    """One temperature for a batch, `max(minimum, beta (1 + alpha (mean margin - running mean)))`.

    Over several devices take the margins of the whole batch.

    Args:
      margins: implicit reward gaps `D` of the pairs, not scaled by beta, `[B]`, a constant.
      running_mean: of the margins of earlier batches, a scalar, a constant; see `running_mean_update`.
      beta: temperature of an average batch.
      alpha: its sensitivity; 0 is DPO.
      weights: of the pairs in the mean, `[B]`, not negative, a constant, as `keep_typical_margins` draws them; 1 if
        absent. A margin of weight 0 has no influence, whatever stands there; if all are 0 the result is `beta`.
      minimum: of the result.

    Returns:
      The temperature, a scalar, float32 at least.

    Raises:
      ValueError: shapes that do not fit, margins that are not floating.

    Reference: beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv:2407.08639.
    """
    check_floating(margins=margins)
    _check_scalars(running_mean=running_mean, beta=beta, alpha=alpha, minimum=minimum)
    weights = jnp.ones_like(margins) if weights is None else weights
    check_same_shape(margins=margins, weights=weights)
    margins, weights, running_mean = (
        at_least_float32(jax.lax.stop_gradient(x)) for x in (margins, weights, running_mean)
    )
    total = weights.sum()
    # The sum of deviations, so that a batch without weight deviates by 0.
    deviation = jnp.sum(jnp.where(weights != 0, weights * (margins - running_mean), 0))
    return jnp.maximum(beta * (1 + alpha * deviation / jnp.where(total == 0, 1, total)), minimum)


def keep_typical_margins(
    key: Array,
    margins: Array,
    running_mean: float | Array,
    running_std: float | Array,
    *,
    keep: float | Array = 0.8,
) -> Array:
    """Draws a share of the pairs without replacement, with weights `exp(-((margin - mean) / std)^2 / 2)`.

    Args:
      key: typed random key.
      margins: implicit reward gaps of the pairs, `[B]`.
      running_mean: of the margins of earlier batches, a scalar.
      running_std: likewise, at least 1e-7.
      keep: the share; of `B` pairs the nearest whole number is kept.

    Returns:
      A mask, booleans `[B]`.

    Raises:
      ValueError: shapes that do not fit, margins that are not floating.

    Reference: beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv:2407.08639.
    """
    check_floating(margins=margins)
    if margins.ndim != 1:
        raise ValueError(f"margins must have shape [B], got {margins.shape}")
    _check_scalars(running_mean=running_mean, running_std=running_std, keep=keep)
    margins = at_least_float32(margins)
    log_weight = -0.5 * jnp.square((margins - running_mean) / jnp.maximum(running_std, 1e-7))
    # The largest entries of weights times Gumbel noise are a sample without replacement.
    order = tokens.masked_rank(log_weight + jax.random.gumbel(key, margins.shape, margins.dtype), ~jnp.isnan(margins))
    return order < jnp.round(keep * margins.size)


def running_mean_update(
    running_mean: float | Array, values: Array, *, momentum: float | Array = 0.9, mask: Array | None = None
) -> Array:
    """`momentum running_mean + (1 - momentum) mean(values)`, of a statistic that a loss treats as constant.

    With `momentum = n / (n + B)` after `n` values it is the mean of all of them.

    Args:
      running_mean: a scalar, a constant.
      values: `[B]`, constants; over several devices those of the whole batch.
      momentum: in `[0, 1]`.
      mask: `[B]`, 0 where a value does not count; if none does the running mean stays.

    Returns:
      A scalar, float32 at least.

    Raises:
      ValueError: shapes that do not fit, values that are not floating.

    Reference: beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv:2407.08639.
    """
    check_floating(values=values)
    _check_scalars(running_mean=running_mean, momentum=momentum)
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    check_same_shape(values=values, mask=mask)
    values, running_mean = jax.lax.stop_gradient(values), jax.lax.stop_gradient(at_least_float32(running_mean))
    updated = momentum * running_mean + (1 - momentum) * tokens.masked_mean(values, mask)
    return jnp.where(jnp.any(mask != 0), updated, running_mean)


# --- means over a batch -----------------------------------------------------------------------------------------------


def tilted_mean(losses: Array, t: float | Array, *, mask: Array | None = None) -> Array:
    r"""`(1/t) log mean_i e^{t loss_i}`: the mean at `t = 0`, towards the largest loss above, the smallest below.

    Its gradient weighs the losses by `softmax(t losses)`. `t = -1/b` is Dr. DPO with its `beta' = b`, which leaves
    out pairs that look mislabelled; `t > 0` is robust to a shift of the data instead. It is exact in both limits: near
    `t = 0` the logarithm is taken of one plus the mean excess.

    Args:
      losses: `[B]`; over several devices those of the whole batch.
      t: inverse temperature, a scalar.
      mask: `[B]`, 0 where a loss does not count.

    Returns:
      A scalar, float32 at least; 0 if no loss counts.

    Raises:
      ValueError: shapes that do not fit, losses that are not floating.

    Reference: Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference
      Optimization, arXiv:2407.07880.
    """
    _check_scalars(t=t)
    check_floating(losses=losses)
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    check_same_shape(losses=losses, mask=mask)
    mean = tokens.masked_mean(losses, mask)
    deviation = jnp.where(mask != 0, at_least_float32(losses) - mean, 0)
    zero = jnp.asarray(t == 0)
    u = jnp.where(zero, 1.0, t) * deviation
    near = jnp.max(jnp.abs(u), initial=0.0) < 1  # and so it is if no loss counts
    # Each branch of the outer `where` sees zeros where the other is taken, so that gradients stay finite.
    excess = jnp.log1p(tokens.masked_mean(jnp.expm1(jnp.where(near, u, 0)), mask))
    far = jax.nn.logsumexp(jnp.where(near, 0, jnp.where(mask != 0, u, -jnp.inf)))
    far = far - jnp.log(jnp.maximum(jnp.sum(mask != 0), 1))
    tilted = jnp.where(near, excess, far) / jnp.where(zero, 1.0, t)
    # At t = 0 the first order too, so that the derivative in t is right there.
    return mean + jnp.where(zero, 0.5 * t * tokens.masked_mean(jnp.square(deviation), mask), tilted)


def _check_scalars(**values: float | Array) -> None:
    for name, value in values.items():
        if jnp.ndim(value):
            raise ValueError(f"{name} must be a scalar, got {jnp.shape(value)}")

r"""Estimates of `KL(pi || ref)` from tokens of `pi`, and which gradient each gives in which place.

With `l = log pi - log ref` of a sampled token. In the loss an estimate is differentiated as it stands; in the reward it
is a constant that multiplies `grad log pi`.

    kind    value                            expected gradient in the loss       in the reward
    k1      l             unbiased           0                                   that of KL(pi || ref)
    abs     |l|           biased             E[sign(l) grad log pi]              no meaning
    k2      l^2 / 2       biased             that of KL(pi || ref)               biased
    k3      e^-l - 1 + l  unbiased, >= 0     that of KL(ref || pi)               KL(pi || ref) less KL(ref || pi)

All of this is for single decisions, or with `l` the sum over a sequence. Summed token by token, k2 in the loss lacks
what a token does to the later ones; in the reward, `kl_in_reward` has it. Samples of another policy need its
importance ratio in front: `R k1`, `R k3` or `sg(R) k2`, which all give the exact gradient.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_same_shape
from esscher.objectives.policy.ratios import LARGEST

__all__ = ["Kind", "kl_estimate", "kl_in_reward", "straight_through_kl"]

Kind = Literal["k1", "abs", "k2", "k3"]


def kl_estimate(logp: Array, logp_ref: Array, kind: Kind) -> Array:
    """The estimate of each token, of the shape of `logp`, float32 at least; see above for its gradient.

    `logp_ref` is a constant. k3 is cut off where `l < -20`, and gets no gradient there.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating, an unknown kind.

    Reference: Approximating KL Divergence, John Schulman (2020).
    """
    check_floating(logp=logp, logp_ref=logp_ref)
    check_same_shape(logp=logp, logp_ref=logp_ref)
    l = at_least_float32(logp) - jax.lax.stop_gradient(at_least_float32(logp_ref))  # noqa: E741
    if kind == "k1":
        return l
    if kind == "abs":
        return jnp.abs(l)
    if kind == "k2":
        return jnp.square(l) / 2
    if kind == "k3":
        l = jnp.maximum(l, -LARGEST)  # noqa: E741
        return jnp.expm1(-l) + l
    raise ValueError(f'kind must be "k1", "abs", "k2" or "k3", got {kind!r}')


def straight_through_kl(logp: Array, logp_ref: Array, *, value: Kind = "k3", gradient: Kind = "k2") -> Array:
    """The value of one estimate with the gradient of another: by default unbiased in value, and exact in gradient.

    verl's "k3+". Arguments and errors as in `kl_estimate`.

    Reference: Approximating KL Divergence, John Schulman (2020).
    """
    slope = kl_estimate(logp, logp_ref, gradient)
    return jax.lax.stop_gradient(kl_estimate(logp, logp_ref, value)) + slope - jax.lax.stop_gradient(slope)


def kl_in_reward(rewards: Array, logp: Array, logp_ref: Array, *, beta: float | Array, kind: Kind = "k1") -> Array:
    """`r_t - beta kl_t` of each token, `[B, T]`, a constant: a penalty that reaches earlier tokens through returns.

    With k1 and returns-to-go the expected gradient is that of `-beta KL(pi || ref)` of whole sequences. `logp` is that
    of the policy which sampled.

    Raises:
      ValueError: as in `kl_estimate`, or rewards of another shape.

    Reference: Fine-Tuning Language Models from Human Preferences, arXiv:1909.08593.
    """
    check_same_shape(logp=logp, rewards=rewards)
    return jax.lax.stop_gradient(at_least_float32(rewards) - beta * kl_estimate(logp, logp_ref, kind))

r"""The losses underneath the named methods: of policies, of values, and of right and wrong answers apart.

All are to be minimised and per token, `[B, T]`, in float32 at least, 0 where the mask is; `tokens.aggregate` reduces
them. What stands under the mask, NaN included, has no influence. Advantages, weights, old log-probabilities and returns
are constants.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_same_shape
from esscher.objectives.policy.links import Link, link_slope, ppo_link
from esscher.objectives.policy.ratios import Level, log_ratio

__all__ = ["policy_gradient", "value_loss"]

CLIPPED = ppo_link()


def policy_gradient(
    logp: Array,
    logp_old: Array,
    advantages: Array,
    mask: Array,
    *,
    level: Level = "token",
    link: Link = CLIPPED,
    weight: Array | None = None,
    form: Literal["ratio", "score"] = "ratio",
) -> Array:
    r"""`-w phi(l, A)` of each token, with `l` the log-ratio at the level asked for: every method of this family.

    The gradient is `-w phi'(l, A) grad log pi`. The score form, `-w sg(phi'(l, A)) log pi`, has the same gradient at
    the level of tokens and another value; for CISPO, TOPR and truncated importance sampling it is the one published.

    Args:
      logp: of each token under the policy, `[B, T]`, in nats.
      logp_old: under the policy in the denominator, `[B, T]`, see `ratios`.
      advantages: of each token `[B, T]`, or of each sequence `[B]`.
      mask: `[B, T]`, 0 on tokens that are not part of a response.
      level: as in `ratios.log_ratio`.
      link: see `links`; by default PPO's, clipped at 0.2 on both sides.
      weight: of each token or sequence, such as `ratios.importance_weight`; 1 if absent.
      form: see above.

    Returns:
      `[B, T]`.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating, an unknown level or form.

    Reference: Proximal Policy Optimization Algorithms, arXiv:1707.06347.
    """
    ratio = log_ratio(logp, logp_old, mask, level=level)
    a = _per_token(advantages=advantages, mask=mask)
    if form == "ratio":
        phi = link(ratio, a)
    elif form == "score":
        slope = link_slope(link, jax.lax.stop_gradient(ratio), a)
        phi = slope * jnp.where(mask != 0, at_least_float32(logp), 0)
    else:
        raise ValueError(f'form must be "ratio" or "score", got {form!r}')
    if weight is not None:
        phi = phi * _per_token(weight=weight, mask=mask)
    return jnp.where(mask != 0, -phi, 0)


def _per_token(mask: Array, **named: Array) -> Array:
    """The array as constants `[B, T]`, 0 where the mask is."""
    ((name, array),) = named.items()
    check_floating(**named)
    if array.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"{name} must have shape {mask.shape} or {mask.shape[:1]}, got {array.shape}")
    array = jax.lax.stop_gradient(at_least_float32(array))
    return jnp.where(mask != 0, array if array.ndim == 2 else array[:, None], 0)


def value_loss(values: Array, values_old: Array, returns: Array, mask: Array, *, clip: float | Array = 0.2) -> Array:
    """`max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2`, `[B, T]`: PPO's, for the critic.

    `clip=inf` is the plain squared error. `values_old` and `returns` are constants. The range is in units of value:
    0.2 is customary, and verl has 0.5.

    Raises:
      ValueError: shapes that differ, arrays that are not floating.

    Reference: Proximal Policy Optimization Algorithms, arXiv:1707.06347.
    """
    check_floating(values=values, values_old=values_old, returns=returns)
    check_same_shape(values=values, values_old=values_old, returns=returns, mask=mask)
    kept = mask != 0
    v, old, target = (jnp.where(kept, at_least_float32(x), 0) for x in (values, values_old, returns))
    old, target = jax.lax.stop_gradient((old, target))
    clipped = jnp.clip(v, old - clip, old + clip)
    return jnp.where(kept, jnp.maximum(jnp.square(v - target), jnp.square(clipped - target)) / 2, 0)

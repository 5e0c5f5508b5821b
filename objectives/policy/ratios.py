r"""Importance ratios: by which token, sequence or mean, and against which policy a sample is weighted.

The denominator is an argument, `logp_old`, and decides the method:

    the policy that sampled, or that of the last rollout     PPO and its kin
    lax.stop_gradient(logp)                                   ratio 1: REINFORCE in the form of a ratio
    zeros                                                     ratio p: DFT and other probability weights

Log-probabilities are of single tokens, `[B, T]`, in nats; everything is in float32 at least. `logp_old` is a constant.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_same_shape

__all__ = ["Cut", "Level", "importance_weight", "log_ratio"]

Level = Literal["token", "sequence", "geometric", "geometric_token"]
Cut = Literal["truncate", "mask", "none"]

LARGEST = 20.0  # of a log-ratio: e^20 still squares in float32; verl and Tunix clamp there too


def log_ratio(logp: Array, logp_old: Array, mask: Array, *, level: Level = "token") -> Array:
    r"""`log pi - log pi_old` of each token, or of the sequence that it belongs to, `[B, T]`, 0 where the mask is.

        level               value at token t                        gradient
        "token"             l_t                                     of its own token
        "sequence"          sum_t l_t                               of all tokens of the sequence
        "geometric"         mean_t l_t                              of all tokens, each by 1 / length
        "geometric_token"   mean_t l_t                              of its own token: GSPO-token

    Where a whole sequence has one advantage, the last two have one gradient under any reduction that weighs the tokens
    of a sequence alike. Values beyond 20 in size are cut off, and get no gradient.

    Args:
      logp: `[B, T]`.
      logp_old: `[B, T]`.
      mask: `[B, T]`, 0 on tokens that are not part of a response.
      level: see above.

    Raises:
      ValueError: shapes that differ or are not `[B, T]`, log-probabilities that are not floating, an unknown level.

    Reference: Group Sequence Policy Optimization, arXiv:2507.18071.
    """
    check_floating(logp=logp, logp_old=logp_old)
    check_same_shape(logp=logp, logp_old=logp_old, mask=mask)
    if logp.ndim != 2:
        raise ValueError(f"logp must have shape [B, T], got {logp.shape}")
    kept = mask != 0
    old = jax.lax.stop_gradient(jnp.where(kept, at_least_float32(logp_old), 0))
    ratio = jnp.where(kept, at_least_float32(logp), 0) - old
    if level == "sequence":
        ratio = jnp.where(kept, ratio.sum(-1, keepdims=True), 0)
    elif level in ("geometric", "geometric_token"):
        mean = tokens.masked_mean(ratio, kept, axis=-1)[:, None]
        if level == "geometric_token":
            mean = jax.lax.stop_gradient(mean) + ratio - jax.lax.stop_gradient(ratio)
        ratio = jnp.where(kept, mean, 0)
    elif level != "token":
        raise ValueError(f'level must be "token", "sequence", "geometric" or "geometric_token", got {level!r}')
    return jnp.clip(ratio, -LARGEST, LARGEST)


def importance_weight(
    logp: Array,
    logp_sampler: Array,
    mask: Array,
    *,
    level: Level = "token",
    cut: Cut = "truncate",
    limit: float | Array = 2.0,
) -> Array:
    """`w = pi / sampler` of each token, a constant `[B, T]`: corrects losses for a sampler that is not the trainer.

    Inference engines round differently, so the policy that samples is not quite the one that is trained, of which
    `logp` is the copy before the update. At the level of sequences and uncut, the weight makes any estimator unbiased;
    at the level of tokens it does not. It multiplies the loss of a token, never the advantages that statistics are
    taken of; and not at all where `logp_sampler` is already the denominator of the ratio.

    Args:
      logp: of the policy that is trained, `[B, T]`.
      logp_sampler: of the one that sampled, `[B, T]`.
      mask: `[B, T]`; the weight is 0 where it is.
      level: as in `log_ratio`.
      cut: "truncate" weights above `limit` to it, "mask" them to 0, or "none".
      limit: 2 in verl and Tunix, 3 in TRL, which masks sequences.

    Raises:
      ValueError: as in `log_ratio`, or an unknown `cut`.

    Reference: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, Feng Yao et al. (2025).
    """
    weight = jnp.where(mask != 0, jnp.exp(log_ratio(logp, logp_sampler, mask, level=level)), 0)
    if cut == "truncate":
        weight = jnp.minimum(weight, limit)
    elif cut == "mask":
        weight = jnp.where(weight <= limit, weight, 0)
    elif cut != "none":
        raise ValueError(f'cut must be "truncate", "mask" or "none", got {cut!r}')
    return jax.lax.stop_gradient(weight)

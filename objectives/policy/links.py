r"""Links: what a policy gradient maximises of a log-ratio and an advantage, `phi(l, A)`, elementwise, with `R = e^l`.

Their slopes in `l` are the coefficients of `grad log pi`:

    link                         phi                                       slope in l
    score_link                   A l                                       A
    importance_link              A R                                       A R
    ppo_link(low, high)          min(R A, clip(R, 1 - low, 1 + high) A)    A R, or 0 beyond the clip
    clipped_weight_link          sg(clip(R)) A l                           A clip(R)
    soft_gate_link               4 A sigmoid(tau (R - 1)) / tau            4 s (1 - s) R A
    tapered_link(gamma)          A R / (R + gamma)                         A gamma R / (R + gamma)^2

At `l = 0` all but the last have the slope `A`: on samples of the policy itself they are one method. Advantages are
constants. Numbers may be traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "Link",
    "clipped_weight_link",
    "importance_link",
    "link_slope",
    "ppo_link",
    "score_link",
    "signed_weight_link",
    "soft_gate_link",
    "tapered_link",
]

Link = Callable[[Array, Array], Array]
"""`(log_ratio, advantages) -> phi`, elementwise, to be maximised."""

Float = float | Array


def score_link(log_ratio: Array, advantages: Array) -> Array:
    """`A l`: REINFORCE, whatever the denominator."""
    return advantages * log_ratio


def importance_link(log_ratio: Array, advantages: Array) -> Array:
    """`A R`: importance sampling without any clip."""
    return advantages * jnp.exp(log_ratio)


def ppo_link(low: Float = 0.2, high: Float = 0.2, dual: Float | None = None) -> Link:
    r"""`min(R A, clip(R, 1 - low, 1 + high) A)`, and with `dual` at least `dual A` where `A < 0`.

    The slope is 0 where the ratio has already moved as far as allowed in the direction of the advantage, and nowhere
    else. `dual` (above `1 + high`, 3 in the paper) also ends the slope of bad samples that have become far more likely;
    TRL's `delta` is the same number.

    Reference: Proximal Policy Optimization Algorithms, arXiv:1707.06347.
    Reference: Mastering Complex Control in MOBA Games with Deep Reinforcement Learning, arXiv:1912.09729.
    """

    def phi(log_ratio: Array, advantages: Array) -> Array:
        ratio = jnp.exp(log_ratio)
        value = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
        return value if dual is None else jnp.where(advantages < 0, jnp.maximum(value, dual * advantages), value)

    return phi


def clipped_weight_link(low: Float = 0.0, high: Float = 1.0) -> Link:
    """`sg(clip(R, low, high)) A l`: the weight is bounded and every token keeps its gradient.

    With the defaults truncated importance sampling; CISPO has `1 - 0.2` and `1 + 0.28` in verl, 0 and 5 in TRL.

    Reference: MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, arXiv:2506.13585.
    """
    return signed_weight_link((low, high), (low, high))


def signed_weight_link(positive: tuple[Float, Float], negative: tuple[Float, Float]) -> Link:
    """`sg(clip(R, low, high)) A l`, with limits of its own for `A >= 0` and for `A < 0`.

    TOPR has `(1, 1)` and `(0, 1)`: good samples are learned as by supervision, bad ones only as far as they are still
    likely.

    Reference: Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs, arXiv:2503.14286.
    """

    def phi(log_ratio: Array, advantages: Array) -> Array:
        low, high = (jnp.where(advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
        return jax.lax.stop_gradient(jnp.clip(jnp.exp(log_ratio), low, high)) * advantages * log_ratio

    return phi


def soft_gate_link(positive: Float = 1.0, negative: Float = 1.05) -> Link:
    """`4 A sigmoid(tau (R - 1)) / tau`: the further the ratio is from 1, on either side, the less it counts.

    `tau` is `positive` where `A > 0` and `negative` elsewhere. The defaults are the paper's.

    Reference: Soft Adaptive Policy Optimization, arXiv:2511.20347.
    """

    def phi(log_ratio: Array, advantages: Array) -> Array:
        tau = jnp.where(advantages > 0, positive, negative)
        return 4 * advantages * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1)) / tau

    return phi


def tapered_link(gamma: Float = 0.1) -> Link:
    """`A R / (R + gamma)`: with zeros as denominator `R` is the probability, and unlikely tokens count the most.

    The slope, `A gamma R / (R + gamma)^2`, is largest at `R = gamma`. The default is LUFFY's.

    Reference: Learning to Reason under Off-Policy Guidance, arXiv:2504.14945.
    """

    def phi(log_ratio: Array, advantages: Array) -> Array:
        return advantages * jax.nn.sigmoid(log_ratio - jnp.log(gamma))

    return phi


def link_slope(link: Link, log_ratio: Array, advantages: Array) -> Array:
    """`d phi / d l`, elementwise: the coefficient of `grad log pi`.

    >>> import jax.numpy as jnp
    >>> link_slope(ppo_link(0.2, 0.2), jnp.log(jnp.array([0.5, 1.1, 1.5])), jnp.array([1.0, 1.0, 1.0]))
    Array([0.5, 1.1, 0. ], dtype=float32)
    """
    return jax.jvp(lambda x: link(x, advantages), (log_ratio,), (jnp.ones_like(log_ratio),))[1]

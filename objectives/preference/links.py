r"""Links: what a preference loss makes of a margin `z`, `[...] -> [...]`; they fall at `z = 0`: larger is better.

    logistic     softplus(-z) = -log sigmoid(z)        exponential          e^-z
    hinge        max(0, 1 - z)                         truncated quadratic  max(0, 1 - z)^2
    squared      (z - target)^2                        savage               sigmoid(-z)^2
    sigmoid      sigmoid(-z)                           linear               -z

`squared_link`, `discopop_link` and `label_model` make a link; the others are links. To bring your own, pass any such
function to `losses.pairwise` or `losses.pointwise`.

Reference: Generalized Preference Optimization: A Unified Approach to Offline Alignment, arXiv:2402.05749.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating

__all__ = [
    "Link",
    "discopop_link",
    "exponential_link",
    "hinge_link",
    "label_model",
    "linear_link",
    "logistic_link",
    "savage_link",
    "sigmoid_link",
    "squared_link",
    "truncated_quadratic_link",
]

Link = Callable[[Array], Array]

_LARGEST = 20.0  # exponents are clipped there, in value and gradient


def logistic_link(z: Array) -> Array:
    """`-log sigmoid(z)`: the likelihood of a Bradley-Terry label; the population optimum of a pair is its log odds.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    return jax.nn.softplus(-_float(z))


def hinge_link(z: Array) -> Array:
    """`max(0, 1 - z)`; the gradient at the kink is 0.

    Reference: SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425.
    """
    z = _float(z)
    return jnp.where(z >= 1, 0, 1 - z)  # in this order, so that NaN stays NaN


def squared_link(target: float | Array = 1.0) -> Link:
    """`(z - target)^2`.

    Reference: A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv:2310.12036.
    """
    return lambda z: jnp.square(_float(z) - target)


def sigmoid_link(z: Array) -> Array:
    """`sigmoid(-z) = 1 - sigmoid(z)`: bounded and symmetric; flipped labels do not move its optimum, a majority vote.

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """
    return jax.nn.sigmoid(-_float(z))


def exponential_link(z: Array) -> Array:
    """`exp(-z)`, with `-z` clipped at 20.

    Reference: Generalized Preference Optimization: A Unified Approach to Offline Alignment, arXiv:2402.05749.
    """
    return jnp.exp(jnp.minimum(-_float(z), _LARGEST))


def truncated_quadratic_link(z: Array) -> Array:
    """`max(0, 1 - z)^2`.

    Reference: Generalized Preference Optimization: A Unified Approach to Offline Alignment, arXiv:2402.05749.
    """
    return jnp.square(hinge_link(z))


def savage_link(z: Array) -> Array:
    """`sigmoid(-z)^2`.

    Reference: Generalized Preference Optimization: A Unified Approach to Offline Alignment, arXiv:2402.05749.
    """
    return jnp.square(sigmoid_link(z))


def linear_link(z: Array) -> Array:
    """`-z`: unbounded below.

    Reference: Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning,
      arXiv:2505.24850.
    """
    return -_float(z)


def discopop_link(tau: float | Array = 0.05) -> Link:
    """`(1 - m) softplus(-z) + m exp(-z)` with `m = sigmoid(z / tau)`; not convex near 0, where it rises if `tau < 0.1`.

    The second term is computed as one exponential, whose exponent is clipped at 20.

    Reference: Discovering Preference Optimization Algorithms with and for Large Language Models, arXiv:2406.08414.
    """

    def link(z: Array) -> Array:
        z = _float(z)
        modulated = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(z / tau) - z, _LARGEST))
        return jax.nn.sigmoid(-z / tau) * jax.nn.softplus(-z) + modulated

    return link


def label_model(
    link: Link,
    *,
    label_prob: float | Array | None = None,
    flip_prob: float | Array = 0.0,
    mode: Literal["smooth", "unbiased"] = "smooth",
) -> Link:
    r"""A link for labels that may be wrong.

        soft       p f(z) + (1 - p) f(-z)                   p = label_prob, the probability of the label as given
        smooth     (1 - e) f(z) + e f(-z)                   e = flip_prob
        unbiased   ((1 - e) f(z) - e f(-z)) / (1 - 2 e)     its mean under labels flipped with probability e is f(z)

    Args:
      link: `f`.
      label_prob: in `[0, 1]`, a scalar or one for each example; then `flip_prob` must be 0.
      flip_prob: in `[0, 1/2)`; "unbiased" divides by zero at 1/2.
      mode: what `flip_prob` does.

    Returns:
      A link. A probability outside of its range, or 1/2 for "unbiased", gives NaN.

    Raises:
      ValueError: an unknown mode, or a `label_prob` beside a `flip_prob`.

    Reference: Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv:2403.00409.
    """
    if mode not in ("smooth", "unbiased"):
        raise ValueError(f'mode must be "smooth" or "unbiased", got {mode!r}')
    if label_prob is not None:
        if not isinstance(flip_prob, int | float) or flip_prob != 0:
            raise ValueError("label_prob and flip_prob exclude each other: fold the flips into label_prob")
        p = jnp.where((label_prob >= 0) & (label_prob <= 1), label_prob, jnp.nan)
        return lambda z: p * link(z) + (1 - p) * link(-z)
    if isinstance(flip_prob, int | float) and flip_prob == 0:
        return link
    e = jnp.where((flip_prob >= 0) & (flip_prob <= 1), flip_prob, jnp.nan)
    if mode == "smooth":
        return lambda z: (1 - e) * link(z) + e * link(-z)
    e = jnp.where(e < 0.5, e, jnp.nan)
    return lambda z: ((1 - e) * link(z) - e * link(-z)) / (1 - 2 * e)


def _float(z: Array) -> Array:
    z = jnp.asarray(z)
    check_floating(z=z)
    return at_least_float32(z)

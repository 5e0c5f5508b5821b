r"""Scores: what a policy's log-probability of a response, and a reference's, say of its reward; `[B] -> [B]`.

Log-probabilities are sums over the tokens of a response (`tokens.sequence_logp`), or means over them where a function
says so. All references are constants: they receive no gradient.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape

__all__ = ["box_cox_score", "divergence_score", "log1mexp", "log_ratio", "mixed_reference", "odds_score", "per_token"]


def log_ratio(policy: Array, reference: Array, *, ref_weight: float | Array = 1.0) -> Array:
    """`log pi - ref_weight log ref`: with weight 1 the implicit reward of DPO over beta, up to a prompt's constant.

    Args:
      policy: `log pi(y)`, `[B]`.
      reference: `log ref(y)`, `[B]`, a constant.
      ref_weight: 0 leaves the policy alone; a scalar or `[B]`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    check_floating(policy=policy, reference=reference)
    check_same_shape(policy=policy, reference=reference)
    check_per_example(policy, ref_weight=ref_weight)
    return at_least_float32(policy) - ref_weight * jax.lax.stop_gradient(at_least_float32(reference))


def mixed_reference(references: Array, weights: Array) -> Array:
    """Log-probability, up to a constant, under a geometric mixture of references: `sum_m w_m log ref_m`.

    Args:
      references: `[M, B]`, constants.
      weights: `[M]`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: not one weight for each reference, arrays that are not floating.

    Reference: Iterative Nash Policy Optimization, arXiv:2407.00617.
    """
    check_floating(references=references, weights=weights)
    if weights.shape != references.shape[:1]:
        raise ValueError(f"weights must have shape {references.shape[:1]}, got {weights.shape}")
    references = jax.lax.stop_gradient(at_least_float32(references))
    return jnp.sum(weights.reshape(-1, *(1,) * (references.ndim - 1)) * references, axis=0)


def per_token(score: Array, length: Array) -> Array:
    """A score divided by the number of tokens, at least 1: `[B], [B] -> [B]`.

    Raises:
      ValueError: shapes that differ, scores that are not floating.

    Reference: Tulu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv:2411.15124.
    """
    check_floating(score=score)
    check_same_shape(score=score, length=length)
    return at_least_float32(score) / jnp.maximum(length, 1)


def divergence_score(
    h: Array, kind: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi2_kl"], *, alpha: float | Array | None = None
) -> Array:
    r"""`f'(pi / ref)` of the log-ratio `h = log(pi / ref)`, up to a constant: DPO under another divergence.

        reverse_kl   h                    alpha     e^{(alpha - 1) h} / (alpha - 1)
        forward_kl   -e^{-h}              chi2_kl   h + e^h
        js           log sigmoid(h)

    Exponents are clipped at 80, in value and gradient. `alpha` here is TRL's; its limit 1 is the reverse KL, 0 the
    forward one, and the papers' is one minus it.

    Args:
      h: any shape.
      kind: of divergence, which the optimal policy pays for leaving the reference.
      alpha: of "alpha", and of nothing else; not 1.

    Returns:
      The scores, of the shape of `h`, float32 at least.

    Raises:
      ValueError: an unknown kind, `alpha` missing or not its own, `h` not floating.

    Reference: Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints,
      arXiv:2309.16240.
    """
    check_floating(h=h)
    if (alpha is None) == (kind == "alpha"):
        raise ValueError(f'alpha must be given for kind="alpha" and nothing else, got alpha={alpha}, kind={kind!r}')
    h = at_least_float32(h)
    exp = lambda x: jnp.exp(jnp.minimum(x, 80.0))  # noqa: E731
    match kind:
        case "reverse_kl":
            return h
        case "forward_kl":
            return -exp(-h)
        case "js":
            return jax.nn.log_sigmoid(h)
        case "alpha":
            return exp((alpha - 1) * h) / (alpha - 1)
        case "chi2_kl":
            return h + exp(h)
    raise ValueError(f"kind must be reverse_kl, forward_kl, js, alpha or chi2_kl, got {kind!r}")


def odds_score(mean_logp: Array) -> Array:
    """Log odds `a - log(1 - e^a)` of the mean log-probability of a token, `[B] -> [B]`.

    Means above `-1e-6` are clipped there: a certain response has infinite odds.

    Raises:
      ValueError: not floating.

    Reference: ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691.
    """
    check_floating(mean_logp=mean_logp)
    a = jnp.minimum(at_least_float32(mean_logp), -1e-6)
    return a - log1mexp(a)


def box_cox_score(x: Array, alpha: float | Array) -> Array:
    """`(1 - e^{-alpha x}) / alpha`, and `x` at `alpha = 0`; the exponent is clipped at 80.

    Raises:
      ValueError: not floating.

    Reference: AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884.
    """
    check_floating(x=x)
    x = at_least_float32(x)
    nonzero = jnp.where(alpha == 0, 1.0, alpha)
    return jnp.where(alpha == 0, x, -jnp.expm1(jnp.minimum(-nonzero * x, 80.0)) / nonzero)


def log1mexp(x: Array) -> Array:
    """`log(1 - e^x)` for `x < 0`, without cancellation at either end; any shape.

    Raises:
      ValueError: not floating.

    Reference: Accurately Computing log(1 - exp(-|a|)), Maechler, Rmpfr vignette (2012).
    """
    check_floating(x=x)
    x = at_least_float32(x)
    near = x > -jnp.log(2.0)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))

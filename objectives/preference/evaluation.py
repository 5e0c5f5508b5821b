r"""Whether preference learning works: ranking accuracies, what a step does to the chosen response, fair win rates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import (
    at_least_float32,
    check_floating,
    check_per_example,
    check_same_shape,
    safe_sqrt,
)
from esscher.objectives.preference.links import logistic_link
from esscher.objectives.preference.pairs import policy_scores

__all__ = [
    "WinRate",
    "ches_score",
    "displacement_rate",
    "flip_loss_threshold",
    "idealized_ranking_accuracy",
    "implicit_reward_accuracy",
    "length_controlled_winrate",
    "ranking_accuracy",
]


class WinRate(NamedTuple):
    """Win rates in `[0, 1]`, and the fit that controls the first for length."""

    controlled: Array  # []: with the length term set to 0
    raw: Array  # []: mean preference
    coefficients: Array  # [3]: intercept, length, difficulty; the last is 0 without difficulties


# --- rankings ---------------------------------------------------------------------------------------------------------


def ranking_accuracy(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    len_chosen: Array | None = None,
    len_rejected: Array | None = None,
) -> Array:
    """Whether the policy gives the chosen response at least the log-probability of the other, `[log pi_w >= log pi_l]`.

    Args:
      policy_chosen: `[B]`, in nats.
      policy_rejected: `[B]`.
      len_chosen: numbers of tokens, `[B]`; with both, averages over tokens are compared.
      len_rejected: `[B]`.

    Returns:
      0 or 1 for each pair, `[B]`, float32 at least; NaN where an input is.

    Raises:
      ValueError: shapes that differ, arrays that are not floating, one length without the other.

    Reference: Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534.
    """
    if (len_chosen is None) != (len_rejected is None):
        raise ValueError("len_chosen and len_rejected go together, got one of them")
    chosen, rejected = policy_scores(policy_chosen, policy_rejected, len_chosen=len_chosen, len_rejected=len_rejected)
    gap = chosen - rejected
    return jnp.where(jnp.isnan(gap), gap, gap >= 0)


def implicit_reward_accuracy(chosen: Array, rejected: Array) -> Array:
    """Whether the implicit reward prefers the chosen response, `[h_w > h_l]`: what trainers log as accuracy.

    Args:
      chosen: log-ratios to the reference, `[B]`.
      rejected: `[B]`.

    Returns:
      0 or 1 for each pair, `[B]`, float32 at least; NaN where an input is.

    Raises:
      ValueError: shapes that differ, log-ratios that are not floating.

    Reference: Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534.
    """
    check_floating(chosen=chosen, rejected=rejected)
    check_same_shape(chosen=chosen, rejected=rejected)
    gap = at_least_float32(chosen) - at_least_float32(rejected)
    return jnp.where(jnp.isnan(gap), gap, gap > 0)


def idealized_ranking_accuracy(
    ref_chosen: Array, ref_rejected: Array, preference_prob: Array, *, beta: float | Array
) -> Array:
    """Ranking accuracy of the exact optimum of DPO, `[log ref_w - log ref_l + logit(p) / beta > 0]`.

    Args:
      ref_chosen: `[B]`, in nats.
      ref_rejected: `[B]`.
      preference_prob: `p`, the probability that the chosen response is preferred, `[B]`; if it is 1 the result is 1.
      beta: temperature of DPO, a scalar or `[B]`.

    Returns:
      0 or 1 for each pair, `[B]`, float32 at least; NaN where an input is, or `p` is no probability.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534.
    """
    check_floating(ref_chosen=ref_chosen, ref_rejected=ref_rejected, preference_prob=preference_prob)
    check_same_shape(ref_chosen=ref_chosen, ref_rejected=ref_rejected, preference_prob=preference_prob)
    check_per_example(ref_chosen, beta=beta)
    p = at_least_float32(preference_prob)
    gap = at_least_float32(ref_chosen) - at_least_float32(ref_rejected) + (jnp.log(p) - jnp.log1p(-p)) / beta
    return jnp.where(jnp.isnan(gap), gap, gap > 0)


def flip_loss_threshold(ref_chosen: Array, ref_rejected: Array, *, beta: float | Array) -> Array:
    """The DPO loss at which a policy ranks a pair right, `-log sigmoid(beta (log ref_l - log ref_w))`.

    `log pi_w >= log pi_l` exactly where the loss is at most that. It is below `log 2`, the loss before training, for
    pairs that the reference ranks wrong.

    Args:
      ref_chosen: `[B]`, in nats, a constant.
      ref_rejected: `[B]`, a constant.
      beta: temperature of DPO, a scalar or `[B]`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534.
    """
    check_floating(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_same_shape(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_per_example(ref_chosen, beta=beta)
    chosen, rejected = (at_least_float32(jax.lax.stop_gradient(x)) for x in (ref_chosen, ref_rejected))
    return logistic_link(beta * (rejected - chosen))


# --- likelihood displacement ------------------------------------------------------------------------------------------


def ches_score(
    hidden_chosen: Array,
    mask_chosen: Array,
    hidden_rejected: Array,
    mask_rejected: Array,
    *,
    length_normalize: bool = False,
) -> Array:
    """Centred similarity of a pair's hidden states, `<S_w, S_l> - |S_w|^2` with `S` their sums over tokens.

    The larger, the more a step on the pair lowers the likelihood of the chosen response too. It scales with the hidden
    states: compare it within a model only.

    Args:
      hidden_chosen: last hidden states after the final norm, `[B, T, D]`.
      mask_chosen: `[B, T]`, 1 on those that predict a token of the response: from the prompt's last token up to the one
        before the response's last.
      hidden_rejected: `[B, T', D]`.
      mask_rejected: `[B, T']`.
      length_normalize: means over the unmasked tokens in place of sums.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, hidden states that are not floating.

    Reference: Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization, arXiv:2410.08847.
    """
    check_floating(hidden_chosen=hidden_chosen, hidden_rejected=hidden_rejected)
    for name, hidden, mask in (
        ("chosen", hidden_chosen, mask_chosen),
        ("rejected", hidden_rejected, mask_rejected),
    ):
        if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
            got = f"{hidden.shape} and {mask.shape}"
            raise ValueError(f"hidden_{name} must be [B, T, D] and mask_{name} [B, T], got {got}")
    if hidden_chosen.shape[::2] != hidden_rejected.shape[::2]:
        got = f"hidden_chosen {hidden_chosen.shape}, hidden_rejected {hidden_rejected.shape}"
        raise ValueError(f"must agree in their first and last axes: {got}")

    def over_tokens(hidden: Array, mask: Array) -> Array:
        total = jnp.sum(jnp.where((mask != 0)[..., None], at_least_float32(hidden), 0), axis=1)
        return total / jnp.maximum(jnp.sum(mask != 0, axis=-1, keepdims=True), 1) if length_normalize else total

    chosen, rejected = over_tokens(hidden_chosen, mask_chosen), over_tokens(hidden_rejected, mask_rejected)
    return jnp.sum(chosen * (rejected - chosen), axis=-1)


def displacement_rate(grad_chosen: Any, grad_rejected: Any) -> Array:
    """`|g_w|^2 - <g_w, g_l>`, `g = grad log pi` in the parameters: below 0 a step lowers the chosen response too.

    Times `beta sigmoid(-z)` it is the speed of `log pi_w` under gradient flow on the pair's DPO loss.

    Args:
      grad_chosen: gradient of `log pi(chosen)`, a pytree of arrays; `vmap` over pairs.
      grad_rejected: of `log pi(rejected)`, likewise.

    Returns:
      A scalar, float32 at least.

    Raises:
      ValueError: trees that differ, leaves that are not floating.

    Reference: Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization, arXiv:2410.08847.
    """

    def term(chosen: Array, rejected: Array) -> Array:
        check_floating(grad_chosen=chosen, grad_rejected=rejected)
        check_same_shape(grad_chosen=chosen, grad_rejected=rejected)
        chosen = at_least_float32(chosen)
        return jnp.sum(chosen * (chosen - at_least_float32(rejected)))

    return sum(jax.tree.leaves(jax.tree.map(term, grad_chosen, grad_rejected)))


# --- win rates --------------------------------------------------------------------------------------------------------


def length_controlled_winrate(
    preference: Array,
    len_model: Array,
    len_base: Array,
    difficulty: Array | None = None,
    *,
    l2: float | Array = 0.0,
    sample_weight: Array | None = None,
    iterations: int = 50,
) -> WinRate:
    r"""Win rate of a model over a baseline if their responses were equally long.

        P(model preferred) = sigmoid(theta + phi tanh(d / std d) + psi difficulty)        d = len_base - len_model

    is fitted to soft labels by damped Newton steps; the controlled rate is the mean of
    `sigmoid(theta + psi difficulty)`. AlpacaEval's own fit adds an L1 penalty, chosen by cross-validation, and two data
    sets of gamed answers. The gradient is that of the converged fit, by implicit differentiation; first order only.

    Args:
      preference: probability that the judge prefers the model, in `[0, 1]`, ties 1/2, `[N]`.
      len_model: lengths of its answers, `[N]`.
      len_base: of the baseline's, `[N]`.
      difficulty: of the instruction, `[N]`; without it there is no such term.
      l2: `l2 (phi^2 + psi^2) / 2` is added to the mean cross-entropy. Labels that can be separated need it; the
        intercept is free, so that the mean prediction is the raw win rate.
      sample_weight: `[N]`, not negative, 1 if absent; what stands at weight 0 has no influence.
      iterations: Newton steps, static.

    Returns:
      Win rates and coefficients; without any spread in length that term is 0.

    Raises:
      ValueError: shapes that differ, preferences that are not floating.

    Reference: Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators, arXiv:2404.04475.
    """
    weight = jnp.ones_like(preference) if sample_weight is None else sample_weight
    given = {} if difficulty is None else {"difficulty": difficulty}
    check_floating(preference=preference, **given)
    check_same_shape(preference=preference, len_model=len_model, len_base=len_base, sample_weight=weight, **given)
    valid = weight != 0
    clean = lambda x: jnp.where(valid, at_least_float32(x), 0)  # noqa: E731
    gap = clean(len_base) - clean(len_model)
    std = safe_sqrt(tokens.masked_var(gap, valid, ddof=1))
    length = jnp.tanh(gap / jnp.where(std == 0, 1, std))
    hard = jnp.zeros_like(gap) if difficulty is None else clean(difficulty)
    features = jnp.stack([jnp.where(valid, 1.0, 0), length, hard], axis=-1)
    total = jnp.sum(clean(weight))
    total = jnp.where(total == 0, 1, total)
    penalty = jnp.array([0, 1, 1], features.dtype) * l2
    coefficients = _fit_logistic(features, clean(preference), clean(weight) / total, penalty, iterations)
    controlled = jax.nn.sigmoid(coefficients[0] + coefficients[2] * hard)
    mean = lambda x: jnp.sum(clean(weight) * x) / total  # noqa: E731
    return WinRate(mean(controlled), mean(clean(preference)), coefficients)


def _fit_logistic(features: Array, labels: Array, share: Array, l2: Array, iterations: int) -> Array:
    """Minimises `sum_i share_i CE(labels_i, sigmoid(features_i c)) + sum_k l2_k c_k^2 / 2`."""

    def newton_step(c: Array, features: Array, labels: Array, share: Array, l2: Array) -> Array:
        p = jax.nn.sigmoid(jnp.sum(features * c, axis=-1))
        slope = jnp.sum((share * (p - labels))[:, None] * features, axis=0) + l2 * c
        curvature = (share * p * (1 - p))[:, None, None] * features[:, :, None] * features[:, None, :]
        # A term without spread has neither slope nor curvature.
        floor = 10 * jnp.finfo(slope.dtype).eps + l2
        curvature = jax.lax.stop_gradient(curvature.sum(0)) + floor * jnp.eye(slope.size)
        return -jnp.linalg.solve(curvature, slope)

    def damped(_: int, c: Array) -> Array:
        step = newton_step(c, *fixed)
        # Logistic losses are self-concordant: this length descends, and tends to 1 at the optimum.
        r = jnp.max(jnp.abs(jnp.sum(features * step, axis=-1)))
        return c + step * jnp.where(r > 0, jnp.log1p(r) / jnp.where(r > 0, r, 1), 1)

    dtype = jnp.result_type(features, labels, share, l2)
    features, labels, share, l2 = (x.astype(dtype) for x in (features, labels, share, l2))
    fixed = jax.lax.stop_gradient((features, labels, share, l2))
    c = jax.lax.stop_gradient(jax.lax.fori_loop(0, iterations, damped, jnp.zeros(features.shape[-1], dtype)))
    # One more step, whose derivative at the optimum is that of the optimum.
    return c + newton_step(c, features, labels, share, l2)

r"""How scores meet: pairs, single responses, lists, groups, sorted batches. Every named method is one of these.

    pairwise    label_model(link)(beta (chosen - rejected) - margin)

`beta` multiplies the score, the margin is subtracted after it. A prompt's constant cancels in pairs, lists and groups;
single responses need a baseline for it. Nothing is reduced over the batch.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape
from esscher.objectives.preference.links import Link, label_model, logistic_link

__all__ = [
    "group_mean_pairwise",
    "listwise_softmax",
    "pairwise",
    "pairwise_list",
    "plackett_luce",
    "pointwise",
    "sorted_scores",
]


def pairwise(
    chosen: Array,
    rejected: Array,
    *,
    beta: float | Array,
    margin: float | Array = 0.0,
    link: Link = logistic_link,
    label_prob: float | Array | None = None,
    flip_prob: float | Array = 0.0,
    mode: Literal["smooth", "unbiased"] = "smooth",
) -> Array:
    """`link(beta (chosen - rejected) - margin)` of each pair.

    Args:
      chosen: scores, `[B]`.
      rejected: scores, `[B]`.
      beta: temperature; a scalar or `[B]`.
      margin: in units of reward, likewise.
      link: see `links`.
      label_prob: see `links.label_model`, as `flip_prob` and `mode`.
      flip_prob: likewise.
      mode: likewise.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, scores that are not floating.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    check_floating(chosen=chosen, rejected=rejected)
    check_same_shape(chosen=chosen, rejected=rejected)
    _check_rank(chosen=chosen)
    check_per_example(chosen, beta=beta, margin=margin, flip_prob=flip_prob)
    check_per_example(chosen, **{} if label_prob is None else {"label_prob": label_prob})
    z = beta * (at_least_float32(chosen) - at_least_float32(rejected)) - margin
    return label_model(link, label_prob=label_prob, flip_prob=flip_prob, mode=mode)(z)


def pointwise(
    score: Array,
    label: float | Array,
    *,
    beta: float | Array,
    baseline: float | Array = 0.0,
    link: Link = logistic_link,
    positive_weight: float | Array = 1.0,
    negative_weight: float | Array = 1.0,
) -> Array:
    """`w+ y link(z) + w- (1 - y) link(-z)` of each response, with `z = beta score - baseline`.

    The baseline is constant. Unlike a pair's, the loss fixes the level of the score, not only differences.

    Args:
      score: `[B]`.
      label: `y` in `[0, 1]`, whether the response is good; a scalar or `[B]`.
      beta: temperature, likewise.
      baseline: in units of reward, likewise.
      link: see `links`.
      positive_weight: `w+`.
      negative_weight: `w-`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, scores that are not floating.

    Reference: KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """
    check_floating(score=score)
    _check_rank(score=score)
    if jnp.ndim(label):
        check_same_shape(score=score, label=label)
    check_per_example(score, beta=beta, baseline=baseline)
    check_per_example(score, positive_weight=positive_weight, negative_weight=negative_weight)
    z = beta * at_least_float32(score) - jax.lax.stop_gradient(baseline)
    return positive_weight * label * link(z) + negative_weight * (1 - label) * link(-z)


def listwise_softmax(
    logits: Array,
    target_logits: Array,
    *,
    mask: Array | None = None,
    direction: Literal["forward", "reverse"] = "forward",
) -> Array:
    r"""Matches the softmax of a list of scores to a target's, which is constant.

        forward    -sum_i a_i log b_i           a = softmax(target_logits), b = softmax(logits)
        reverse    sum_i b_i (log b_i - log a_i)

    Args:
      logits: beta times the scores, `[P, G]`.
      target_logits: `[P, G]`, for instance rewards over their temperature.
      mask: `[P, G]`, 0 where there is no response.
      direction: "forward" is a cross-entropy, "reverse" a divergence; both have the same minimiser.

    Returns:
      `[P]`, float32 at least; 0 for a list without responses.

    Raises:
      ValueError: shapes that differ, arrays that are not floating, an unknown direction.

    Reference: Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction must be "forward" or "reverse", got {direction!r}')
    check_floating(target_logits=target_logits)
    logits, valid = _list(mask, logits=logits, target_logits=target_logits)
    target, _ = _list(mask, target_logits=jax.lax.stop_gradient(target_logits))
    log_b, log_a = (jnp.where(valid, jax.nn.log_softmax(x, axis=-1, where=valid), 0) for x in (logits, target))
    if direction == "forward":
        return -jnp.sum(jnp.where(valid, jnp.exp(log_a), 0) * log_b, axis=-1)
    return jnp.sum(jnp.where(valid, jnp.exp(log_b), 0) * (log_b - log_a), axis=-1)


def plackett_luce(score: Array, *, mask: Array | None = None) -> Array:
    r"""`-sum_k (s_k - logsumexp_{j >= k} s_j)` of a list that is sorted from best to worst; two responses are a pair.

    The list may be a response and copies of it that are ever more degraded, as SPO makes them.

    Args:
      score: beta times the scores, `[P, G]`, best first.
      mask: `[P, G]`, 0 where there is no response.

    Returns:
      `[P]`, float32 at least.

    Raises:
      ValueError: shapes that differ, scores that are not floating.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    score, valid = _list(mask, score=score)
    # A finite stand-in, far below any score that is there.
    low = jax.lax.stop_gradient(jnp.where(valid, score, jnp.inf).min(-1, keepdims=True)) - 1e4
    filled = jnp.where(valid, score, jnp.where(jnp.isfinite(low), low, 0))
    below = jax.lax.cumlogsumexp(filled, axis=filled.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(valid, below - filled, 0), axis=-1)


def pairwise_list(
    score: Array,
    label: Array,
    *,
    link: Link = logistic_link,
    pair_weight: Array | None = None,
    mask: Array | None = None,
    normalize: bool = False,
) -> Array:
    """`sum_{i, j: label_i > label_j} w_ij link(s_i - s_j)` over the pairs of each list; ties make no pair.

    Args:
      score: beta times the scores, `[P, G]`.
      label: `[P, G]`, larger is better.
      link: see `links`.
      pair_weight: `w[P, G, G]`, a constant; 1 if absent.
      mask: `[P, G]`, 0 where there is no response.
      normalize: divide by the number of pairs, at least 1.

    Returns:
      `[P]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, scores that are not floating.

    Reference: LiPO: Listwise Preference Optimization through Learning-to-Rank, arXiv:2402.01878.
    """
    score, valid = _list(mask, score=score, label=label)
    shape = (*score.shape, score.shape[-1])
    if pair_weight is not None and pair_weight.shape != shape:
        raise ValueError(f"pair_weight must have shape {shape}, got {pair_weight.shape}")
    ordered = (label[:, :, None] > label[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    terms = link(jnp.where(ordered, score[:, :, None] - score[:, None, :], 0))
    weight = 1.0 if pair_weight is None else jax.lax.stop_gradient(pair_weight)
    total = jnp.sum(jnp.where(ordered, weight * terms, 0), axis=(1, 2))
    return total / jnp.maximum(ordered.sum((1, 2)), 1) if normalize else total


def group_mean_pairwise(
    chosen: Array,
    rejected: Array,
    *,
    beta: float | Array,
    variance_coef: float | Array = 1.0,
    chosen_mask: Array | None = None,
    rejected_mask: Array | None = None,
) -> Array:
    """`-log sigmoid(beta (mean chosen - mean rejected)) + variance_coef var(chosen)` of each group.

    GEPO, of groups that are each equally good inside: the variance (over `n`, not `n - 1`) holds the good one together.
    Where a side has no response the first term is 0.

    Args:
      chosen: log-ratios, `[P, N]`.
      rejected: log-ratios, `[P, M]`.
      beta: temperature.
      variance_coef: of the variance.
      chosen_mask: `[P, N]`, 0 where there is no response.
      rejected_mask: `[P, M]`, likewise.

    Returns:
      `[P]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, scores that are not floating.

    Reference: On-Policy Optimization with Group Equivalent Preference for Multi-Programming Language Understanding,
      arXiv:2505.12723.
    """
    chosen, chosen_valid = _list(chosen_mask, "chosen_mask", chosen=chosen)
    rejected, rejected_valid = _list(rejected_mask, "rejected_mask", rejected=rejected)
    if chosen.shape[0] != rejected.shape[0]:
        raise ValueError(f"rejected must have {chosen.shape[0]} rows like chosen, got {rejected.shape[0]}")
    check_per_example(chosen, variance_coef=variance_coef)
    mean, variance = _moments(chosen, chosen_valid)
    contrast = pairwise(mean, _moments(rejected, rejected_valid)[0], beta=beta)
    return jnp.where(chosen_valid.any(-1) & rejected_valid.any(-1), contrast, 0) + variance_coef * variance


def sorted_scores(first: Array, second: Array) -> tuple[Array, Array]:
    """Both batches sorted, `[B], [B] -> [B], [B]`: the coupling of optimal transport in one dimension.

    Which response a result belongs to is lost. Over several devices sort the whole batch.

    Raises:
      ValueError: shapes that differ, scores that are not floating.

    Reference: Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.
    """
    check_floating(first=first, second=second)
    check_same_shape(first=first, second=second)
    return jnp.sort(at_least_float32(first), axis=0), jnp.sort(at_least_float32(second), axis=0)


def _check_rank(**scores: Array) -> None:
    """Of scores with more axes than the batch's, a `beta[B]` would meet the last."""
    for name, array in scores.items():
        if array.ndim > 1:
            raise ValueError(f"{name} must have shape [B], got {array.shape}")


def _list(mask: Array | None, mask_name: str = "mask", **arrays: Array) -> tuple[Array, Array]:
    """The first, scores `[P, G]`, 0 where the mask is, in float32 at least; and where they count."""
    name, score = next(iter(arrays.items()))
    check_floating(**{name: score})
    check_same_shape(**arrays, **{} if mask is None else {mask_name: mask})
    if score.ndim != 2:
        raise ValueError(f"{name} must have shape [P, G], got {score.shape}")
    valid = jnp.ones(score.shape, bool) if mask is None else mask != 0
    return jnp.where(valid, at_least_float32(score), 0), valid


def _moments(values: Array, valid: Array) -> tuple[Array, Array]:
    count = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    mean = values.sum(-1, keepdims=True) / count
    variance = jnp.square(jnp.where(valid, values - mean, 0)).sum(-1) / count[:, 0]
    return mean[:, 0], variance

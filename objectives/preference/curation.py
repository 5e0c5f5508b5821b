r"""From samples and their scores to what a preference loss trains on: rewards, pairs, conditions; pure array functions.

Nothing here is a loss. What selects or relabels returns indices and masks of static shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_same_shape, normal, safe_sqrt
from esscher.objectives.preference.scores import log_ratio

__all__ = [
    "GoalPairs",
    "IndexPairs",
    "answer_confidence",
    "apc_score",
    "condition_dropout",
    "density_ratio_reward",
    "gaussian_mechanism",
    "goal_relabel",
    "linear_scalarize",
    "quantile_bucket",
    "quantile_edges",
    "reward_gap_split",
    "statistical_rejection_sample",
    "top_gap_pairs",
]


class IndexPairs(NamedTuple):
    """Pairs of responses to one prompt, by their index in its group; `[P, k]` each."""

    chosen: Array  # integers
    rejected: Array  # integers
    valid: Array  # booleans; False where a prompt has fewer pairs


class GoalPairs(NamedTuple):
    """Pairs under a goal, `[2 B]`: first all as they were with the chosen reward as goal, then all swapped."""

    prompt: Array  # index of the pair it comes from, integers
    chosen: Array  # `[2 B, ...]`
    rejected: Array  # `[2 B, ...]`
    goal: Array  # the reward to aim at


# --- rewards of a response --------------------------------------------------------------------------------------------


def answer_confidence(logp: Array, answer_mask: Array) -> Array:
    """Mean probability of the tokens of the answer, `mean_{t in answer} e^{logp_t}`: a reward without training.

    CRew's reward. Not the exponential of the mean, the inverse perplexity, which is never larger. Log-probabilities
    above 0 count as 0.

    Args:
      logp: of each token, `[B, T]`, in nats.
      answer_mask: `[B, T]`, 1 on the tokens of the final answer, its formatting left out.

    Returns:
      `[B]` in `[0, 1]`, float32 at least; 0 for a row without an answer.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating.

    Reference: Confidence as a Reward: Transforming LLMs into Reward Models, arXiv:2510.13501.
    """
    check_floating(logp=logp)
    check_same_shape(logp=logp, answer_mask=answer_mask)
    logp = jnp.where(answer_mask != 0, at_least_float32(logp), 0)
    return tokens.masked_mean(jnp.exp(jnp.where(logp > 0, 0, logp)), answer_mask, axis=-1)


def density_ratio_reward(logp_strong: Array, logp_weak: Array, mask: Array, *, normalize: bool = False) -> Array:
    """`sum_t m_t (log strong_t - log weak_t)`: the reward over beta that tuning the weak model to the strong one used.

    CDR's reward, known up to a constant of the prompt. Without the sum each term is a reward of its token. Criteria go
    into the prompts of both models.

    Args:
      logp_strong: of each token under the tuned model, `[B, T]`, in nats.
      logp_weak: under the model that it was tuned from, `[B, T]`, a constant.
      mask: `[B, T]`, 0 where a token does not count.
      normalize: divide by the number of tokens: then long responses are not rewarded for length.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that differ, log-probabilities that are not floating.

    Reference: Customizable Density Ratios of Strong-over-weak LLMs, arXiv:2411.02481.
    """
    check_floating(logp_strong=logp_strong, logp_weak=logp_weak)
    check_same_shape(logp_strong=logp_strong, logp_weak=logp_weak, mask=mask)
    return log_ratio(*(tokens.sequence_logp(logp, mask, normalize=normalize) for logp in (logp_strong, logp_weak)))


def apc_score(relevance: Array, entailment: Array, mask: Array | None = None) -> Array:
    """How many statements of a persona a response respects, `sum_s rel P(entailed) + (1 - rel) (1 - P(contradicted))`.

    A sum: divide it by the number of statements to compare personas.

    Args:
      relevance: of each statement to the query, in `[0, 1]`, `[B, S]`.
      entailment: probabilities that the response (contradicts, ignores, entails) it, `[B, S, 3]`.
      mask: `[B, S]`, 0 where there is no statement.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: Quantifying and Optimizing Global Faithfulness in Persona-driven Role-playing, arXiv:2405.07726.
    """
    check_floating(relevance=relevance, entailment=entailment)
    if entailment.shape != (*relevance.shape, 3):
        wanted = f"those of relevance and three classes, {(*relevance.shape, 3)}"
        raise ValueError(f"entailment must have the axes {wanted}, got {entailment.shape}")
    mask = jnp.ones(relevance.shape, bool) if mask is None else mask
    check_same_shape(relevance=relevance, mask=mask)
    relevance = jnp.where(mask != 0, at_least_float32(relevance), 0)
    entailment = jnp.where((mask != 0)[..., None], at_least_float32(entailment), 0)
    terms = relevance * entailment[..., 2] + (1 - relevance) * (1 - entailment[..., 0])
    return jnp.sum(jnp.where(mask != 0, terms, 0), axis=-1)


def linear_scalarize(rewards: Array, weights: Array) -> Array:
    """`sum_k w_k r_k` of several objectives, `[..., K], [K] -> [...]`.

    Bring the rewards to one scale first. As a direction of preference, in DPA, the weights have length 1: their length
    is an inverse temperature.

    Raises:
      ValueError: not one weight for each objective, arrays that are not floating.

    Reference: Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with
      Multi-Objective Rewards, arXiv:2402.18571.
    """
    check_floating(rewards=rewards, weights=weights)
    if rewards.ndim == 0 or weights.shape != rewards.shape[-1:]:
        raise ValueError(f"weights must have one entry per objective, rewards {rewards.shape}, got {weights.shape}")
    # Not a product of matrices: accelerators round the operands of one.
    return jnp.sum(at_least_float32(rewards) * at_least_float32(weights), axis=-1)


# --- pairs ------------------------------------------------------------------------------------------------------------


def top_gap_pairs(score: Array, correct: Array, k: int, *, mask: Array | None = None) -> IndexPairs:
    """The `k` pairs (correct, incorrect) of each prompt whose scores differ most in favour of the correct one.

    CRew's pairs, with `answer_confidence` as score. CDR's, the best against the worst by `density_ratio_reward`, are
    those of `k=1` where all but the worst count as correct. A pair may be kept although its gap is negative. Of equal
    gaps the pair with the first correct response is first.

    Args:
      score: of each response, `[P, G]`.
      correct: `[P, G]`, 0 where a response is incorrect.
      k: number of pairs, static, at most `G^2`.
      mask: `[P, G]`, 0 where there is no response.

    Returns:
      Indices and their validity, `[P, k]`.

    Raises:
      ValueError: shapes that differ or are not `[P, G]`, scores that are not floating, `k` out of its range.

    Reference: Confidence as a Reward: Transforming LLMs into Reward Models, arXiv:2510.13501.
    """
    mask = jnp.ones(score.shape, bool) if mask is None else mask
    _check_groups(score=score, correct=correct, mask=mask)
    group = score.shape[-1]
    if not 0 < k <= group**2:
        raise ValueError(f"k must be in 1..{group**2}, got {k}")
    score = at_least_float32(score)
    possible = ((correct != 0) & (mask != 0))[:, :, None] & ((correct == 0) & (mask != 0))[:, None, :]
    gap = jnp.where(possible, score[:, :, None] - score[:, None, :], -jnp.inf)
    gap, index = jax.lax.top_k(gap.reshape(-1, group**2), k)
    valid = jnp.take_along_axis(possible.reshape(-1, group**2), index, axis=-1)
    return IndexPairs(index // group, index % group, valid)


def reward_gap_split(reward_chosen: Array, reward_rejected: Array, threshold: float | Array) -> tuple[Array, Array]:
    """Which pairs are easy and which are hard: `gap >= threshold` and `gap < threshold`, booleans `[B]` each.

    MPO trains on the easy ones by DPO, then on the prompts of the hard ones by reinforcement learning with the result
    as reference; temperatures of such stages add up as inverses. A gap that is NaN is neither.

    Raises:
      ValueError: shapes that differ, rewards that are not floating.

    Reference: Mixed Preference Optimization: Reinforcement Learning with Data Selection and Better Reference Model,
      arXiv:2403.19443.
    """
    check_floating(reward_chosen=reward_chosen, reward_rejected=reward_rejected)
    check_same_shape(reward_chosen=reward_chosen, reward_rejected=reward_rejected)
    gap = at_least_float32(reward_chosen) - at_least_float32(reward_rejected)
    return gap >= threshold, gap < threshold


def goal_relabel(chosen: Array, rejected: Array, reward_chosen: Array, reward_rejected: Array) -> GoalPairs:
    """Two pairs of each: with the chosen reward as goal, and the other way round with the rejected reward as goal.

    For the reward `-(goal - r)^2` both orders are right. Put the goal into the prompt, for the reference too. A policy
    that ignores it sees each pair with both labels, and learns nothing at equal scores.

    Args:
      chosen: responses, or their indices, `[B, ...]`.
      rejected: of the same shape.
      reward_chosen: `[B]`.
      reward_rejected: `[B]`.

    Returns:
      Pairs, `[2 B]`.

    Raises:
      ValueError: shapes that do not fit, rewards that are not floating.

    Reference: Reward-Augmented Data Enhances Direct Preference Alignment of LLMs, arXiv:2410.08067.
    """
    check_floating(reward_chosen=reward_chosen, reward_rejected=reward_rejected)
    check_same_shape(reward_chosen=reward_chosen, reward_rejected=reward_rejected)
    check_same_shape(chosen=chosen, rejected=rejected)
    if reward_chosen.shape != chosen.shape[:1]:
        wanted = f"one entry per pair of chosen and rejected {chosen.shape}"
        raise ValueError(f"reward_chosen and reward_rejected must have {wanted}, got {reward_chosen.shape}")
    prompt = jnp.tile(jnp.arange(chosen.shape[0]), 2)
    goal = jnp.concatenate([reward_chosen, reward_rejected])
    return GoalPairs(prompt, jnp.concatenate([chosen, rejected]), jnp.concatenate([rejected, chosen]), goal)


def statistical_rejection_sample(
    key: Array, rewards: Array, mask: Array, *, beta: float | Array, n: int | Array
) -> Array:
    """Accepts `n` responses of each group with probability `e^{(r - r_max) / beta}`, without replacement.

    This is RSO's sampling. Passes over those that are left are repeated, with `r_max` their largest reward, until `n`
    are accepted; in a pass the first ones win. Responses of the reference become samples of its tilt by `e^{r / beta}`
    as the group grows; small groups stay closer to the reference. `beta = 0` takes the best, an infinite one the first.

    Args:
      key: typed random key.
      rewards: `[P, G]`; one that is NaN counts as minus infinity.
      mask: `[P, G]`, 0 where there is no response.
      beta: temperature, a scalar or `[P]`.
      n: how many to accept, a scalar or `[P]`; may be traced. Groups with fewer are accepted as a whole.

    Returns:
      A mask of those accepted, booleans `[P, G]`.

    Raises:
      ValueError: shapes that do not fit, rewards that are not floating.

    Reference: Statistical Rejection Sampling Improves Preference Optimization, arXiv:2309.06657.
    """
    _check_groups(rewards=rewards, mask=mask)
    for name, value in (("beta", beta), ("n", n)):
        if jnp.shape(value) not in ((), rewards.shape[:1]):
            raise ValueError(f"{name} must be a scalar or have shape {rewards.shape[:1]}, got {jnp.shape(value)}")
    beta, n = (jnp.broadcast_to(jax.lax.stop_gradient(x), rewards.shape[:1])[:, None] for x in (beta, n))
    rewards = at_least_float32(jax.lax.stop_gradient(rewards))
    rewards, valid = jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), mask != 0

    def unfinished(state: tuple[Array, Array]) -> Array:
        taken = state[1]
        return jnp.any((taken.sum(-1, keepdims=True) < n) & (valid & ~taken))

    def one_pass(state: tuple[Array, Array]) -> tuple[Array, Array]:
        key, taken = state
        key, draw = jax.random.split(key)
        left = valid & ~taken
        best = jnp.max(rewards, axis=-1, where=left, initial=-jnp.inf, keepdims=True)
        # The best is always accepted, even where its exponent is 0/0: so every pass ends with one more.
        chance = jnp.where(rewards == best, 1, jnp.exp((rewards - best) / beta))
        drawn = left & (jax.random.uniform(draw, rewards.shape, rewards.dtype) < chance)
        rank = jnp.cumsum(drawn, axis=-1) + taken.sum(-1, keepdims=True)
        return key, taken | (drawn & (rank <= n))

    return jax.lax.while_loop(unfinished, one_pass, (key, jnp.zeros_like(valid)))[1]


# --- conditions -------------------------------------------------------------------------------------------------------


def quantile_edges(score: Array, k: int) -> Array:
    """The `k - 1` inner edges of `k` buckets with as many scores each, `[N] -> [k - 1]`; take them from training data.

    Raises:
      ValueError: scores that are not `[N]` or not floating, `k < 1`.

    Reference: Noise-aware Learning from Web-crawled Image-Text Data for Image Captioning, arXiv:2212.13563.
    """
    check_floating(score=score)
    if score.ndim != 1 or k < 1:
        raise ValueError(f"score must have shape [N] and k be at least 1, got score {score.shape}, k={k}")
    return jnp.quantile(at_least_float32(score), jnp.arange(1, k) / k)


def quantile_bucket(score: Array, edges: Array) -> Array:
    """Number of edges below each score, `[...], [k - 1] -> [...]`, integers in `0..k-1`: the code to condition on.

    Conditional training is `nll` after a token for the code. With one edge, PHF's threshold on badness, 0 is good:
    `score <= edge`. A score that is NaN gets `k - 1`.

    Args:
      score: any shape.
      edges: ascending, for instance `quantile_edges` of the training data.

    Returns:
      Codes of the shape of `score`.

    Raises:
      ValueError: edges that are no vector, arrays that are not floating.

    Reference: Pretraining Language Models with Human Preferences, arXiv:2302.08582.
    """
    check_floating(score=score, edges=edges)
    if edges.ndim != 1:
        raise ValueError(f"edges must have shape [k - 1], got {edges.shape}")
    return jnp.searchsorted(at_least_float32(edges), at_least_float32(score), side="left")


def condition_dropout(
    key: Array,
    codes: Array,
    *,
    drop_prob: float | Array,
    null: int | Array,
    drop_all_prob: float | Array = 0.0,
) -> Array:
    """Replaces codes by `null`: each by itself with `drop_prob`, and all of an example with `drop_all_prob`.

    Args:
      key: typed random key.
      codes: of the conditions of each example, `[B, ...]`; with `[B]` there is one.
      drop_prob: a scalar, or one for each position of an example.
      null: the code that stands for no condition, likewise.
      drop_all_prob: a scalar.

    Returns:
      Codes of the shape and type of `codes`.

    Raises:
      ValueError: `drop_prob` or `null` that do not fit.

    Reference: Treasure Hunt: Real-time Targeting of the Long Tail using Training-Time Markers, arXiv:2506.14702.
    """
    for name, value in (("drop_prob", drop_prob), ("null", null)):
        if jnp.shape(value) not in ((), codes.shape[1:]):
            raise ValueError(f"{name} must be a scalar or have shape {codes.shape[1:]}, got {jnp.shape(value)}")
    each, all_of = jax.random.split(key)
    whole = (codes.shape[0], *(1,) * (codes.ndim - 1))
    dropped = (jax.random.uniform(each, codes.shape) < drop_prob) | (jax.random.uniform(all_of, whole) < drop_all_prob)
    return jnp.where(dropped, jnp.asarray(null, codes.dtype), codes)


def gaussian_mechanism(key: Array, x: Array, *, clip_norm: float | Array, sigma: float | Array) -> Array:
    r"""Private release of a vector, `x min(1, clip_norm / |x|) + sigma clip_norm noise`, each row by itself.

    The mean of `L` clients with `sigma = s / sqrt(L)` has the noise `s clip_norm / L`. Two entries that are `gap` apart
    then change order with probability `Phi(-gap / (sqrt(2) std))`, the `flip_prob` of a preference loss.

    Args:
      key: typed random key.
      x: one vector per client, `[B, D]`, clipped as a whole; one whose squared norm is not finite counts as 0.
      clip_norm: largest Euclidean norm, positive; a scalar.
      sigma: standard deviation of the noise over `clip_norm`, a scalar.

    Returns:
      `[B, D]`, float32 at least.

    Raises:
      ValueError: vectors that are not `[B, D]` or not floating.

    Reference: POPri: Private Federated Learning using Preference-Optimized Synthetic Data, arXiv:2504.16438.
    """
    check_floating(x=x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {x.shape}")
    x = at_least_float32(x)
    norm = safe_sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    x, norm = (jnp.where(jnp.isfinite(norm), y, 0) for y in (x, norm))
    return x * (clip_norm / jnp.maximum(norm, clip_norm)) + sigma * clip_norm * normal(key, x.shape, x.dtype)


def _check_groups(**arrays: Array) -> None:
    """The first, the scores, floating and `[P, G]`; the others of its shape."""
    name, scores = next(iter(arrays.items()))
    check_floating(**{name: scores})
    check_same_shape(**arrays)
    if scores.ndim != 2:
        raise ValueError(f"{name} must have shape [P, G], got {scores.shape}")

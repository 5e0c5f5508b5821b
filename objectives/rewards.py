r"""Verifiable rewards, shaped: what is made of correctness, format, length, confidence and several of them at once.

Rewards are of whole answers and of any shape, unless said otherwise; flags are arrays that count where they are not 0.
Results are float32 at least. What judges an answer is outside: these are functions of its verdicts.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_same_shape
from esscher.objectives.advantages import group_advantage

__all__ = [
    "answer_set_f1",
    "calibrated_correctness_reward",
    "combine_rewards",
    "format_length_reward",
    "gated_process_reward",
    "gdpo_advantage",
    "jaccard",
    "parabolic_length_reward",
    "rubric_score",
]

Float = float | Array

SMALLEST = 1e-6  # probability that the log score still takes at its word


def gated_process_reward(format_reward: Array, outcome_reward: Array, process_reward: Array) -> Array:
    """`r_format + r_outcome + r_outcome r_process`: a score of the reasoning counts for right answers alone.

    Where the outcome is 0 the process reward has no influence, and may be NaN. It should be bounded by 1. In groups
    scaled by their own std, one that is all right is then ranked by the process reward alone, however little it varies.

    Raises:
      ValueError: shapes that differ, rewards that are not floating.

    Reference: Posterior-GRPO: Rewarding Reasoning Processes in Code Generation, arXiv:2508.05170.
    """
    rewards = {"format_reward": format_reward, "outcome_reward": outcome_reward, "process_reward": process_reward}
    check_floating(**rewards)
    check_same_shape(**rewards)
    form, outcome, process = map(at_least_float32, rewards.values())
    return form + outcome * (1 + jnp.where(outcome != 0, process, 0))


def calibrated_correctness_reward(
    correct: Array,
    confidence: Array,
    *,
    score: Literal["brier", "spherical", "log"] = "brier",
    coef: Float = 1.0,
) -> Array:
    r"""`y + coef S(q, y)`: correctness `y`, and a proper score of the confidence `q` that the answer states.

        score         S(q, y)                                              expected under y ~ Bernoulli(p), at q = p
        "brier"       -(y - q)^2                                           -p (1 - p)
        "spherical"   (y q + (1 - y) (1 - q)) / sqrt(q^2 + (1 - q)^2)      sqrt(p^2 + (1 - p)^2)
        "log"         y log q + (1 - y) log(1 - q)                         -(entropy of p)

    Each is largest at `q = p`. With "brier" and `coef=1`, RLCR, it is then `p^2`, which rises with `p`: the best answer
    is still the one most likely right. The log score is steep where the other two are bounded: below 1e-6 and above
    `1 - 1e-6` the confidence is taken as these, and a wrong answer may earn more than a right one that was doubted.
    A std of the group in the divisor would bend the score: the paper has none.

    Args:
      correct: 1 or 0.
      confidence: of the same shape, clipped to `[0, 1]`. NaN, none stated, gives NaN, which `group_advantage` leaves
        out; give such answers the reward for a wrong format instead where there is one.
      score: see above.
      coef: weight of the score.

    Raises:
      ValueError: shapes that differ, a confidence that is not floating, an unknown score.

    Reference: Beyond Binary Rewards: Training LMs to Reason About Their Uncertainty, arXiv:2507.16806.
    """
    check_floating(confidence=confidence)
    check_same_shape(correct=correct, confidence=confidence)
    y, q = at_least_float32(correct), jnp.clip(at_least_float32(confidence), 0, 1)
    if score == "brier":
        return y - coef * jnp.square(y - q)
    if score == "spherical":
        return y + coef * (y * q + (1 - y) * (1 - q)) / jnp.sqrt(jnp.square(q) + jnp.square(1 - q))
    if score == "log":
        q = jnp.clip(q, SMALLEST, 1 - SMALLEST)
        return y + coef * (y * jnp.log(q) + (1 - y) * jnp.log1p(-q))
    raise ValueError(f'score must be "brier", "spherical" or "log", got {score!r}')


# --- length and format ------------------------------------------------------------------------------------------------


def parabolic_length_reward(lengths: Array, max_length: Float, *, peak: Float = 0.5) -> Array:
    """`1 - (1 - x / peak)^2` up to the peak, then `1 - 2 ((x - peak) / (1 - peak))^2`, with `x = length / max_length`.

    0 for an empty answer, 1 at the peak with slope 0 on both sides, -1 at the maximum, beyond which `x` stays 1.

    Args:
      lengths: in tokens, of any shape.
      max_length: that of a truncated answer.
      peak: the best length as a share of it, in `[0, 1]`; the default is the paper's, which finds 0.8 as good.

    Reference: Surrogate Signals from Format and Length: Reinforcement Learning for Solving Mathematical Problems
      without Ground Truth Answers, arXiv:2505.19439.
    """
    away = jnp.clip(at_least_float32(lengths) / max_length, 0, 1) - peak
    short, long = (away / jnp.where(room > 0, room, 1) for room in (jnp.asarray(peak), 1 - jnp.asarray(peak)))
    return 1 - jnp.where(away <= 0, jnp.square(short), 2 * jnp.square(long))


def format_length_reward(format_ok: Array, lengths: Array, max_length: Float, *, peak: Float = 0.5) -> Array:
    """`1 + r_length` where the format is right, else `min(r_length, 0)`: a reward that knows no answer.

    `r_length` is `parabolic_length_reward`. A good length earns nothing where the format is wrong; a bad one costs.

    Args:
      format_ok: flags.
      lengths: and the others as in `parabolic_length_reward`, of the same shape.
      max_length: likewise.
      peak: likewise.

    Raises:
      ValueError: shapes that differ.

    Reference: Surrogate Signals from Format and Length: Reinforcement Learning for Solving Mathematical Problems
      without Ground Truth Answers, arXiv:2505.19439.
    """
    check_same_shape(format_ok=format_ok, lengths=lengths)
    length_reward = parabolic_length_reward(lengths, max_length, peak=peak)
    return jnp.where(format_ok != 0, 1 + length_reward, jnp.minimum(length_reward, 0))


# --- sets and rubrics -------------------------------------------------------------------------------------------------


def answer_set_f1(match: Array, pred_valid: Array, gold_valid: Array) -> Array:
    """`2 P R / (P + R)` of a set of answers against a set of right ones, `[..., N, M] -> [...]`.

    `P` is the share of the given answers that match some right one, `R` that of the right ones that some given answer
    matches; 0 where nothing matches, or either set is empty. An answer may match several, and the paper does not say
    whether it may. Answers given twice count twice in `P`: drop repetitions first.

    Args:
      match: flags, whether given answer `n` is right answer `m` or one of its aliases, `[..., N, M]`.
      pred_valid: `[..., N]`, 0 where there is no answer.
      gold_valid: `[..., M]`, likewise.

    Raises:
      ValueError: shapes that do not fit.

    Reference: A^2Search: Ambiguity-Aware Question Answering with Reinforcement Learning, arXiv:2510.07958.
    """
    for name, valid, wanted in (
        ("pred_valid", pred_valid, match.shape[:-1]),
        ("gold_valid", gold_valid, (*match.shape[:-2], *match.shape[-1:])),
    ):
        if match.ndim < 2 or valid.shape != wanted:
            raise ValueError(f"{name} does not fit match [..., N, M]: got {valid.shape} for {match.shape}")
    given, right = pred_valid != 0, gold_valid != 0
    hits = (match != 0) & given[..., :, None] & right[..., None, :]
    precision, recall = (
        at_least_float32(hits.any(axis).sum(-1)) / jnp.maximum(valid.sum(-1), 1)
        for axis, valid in ((-1, given), (-2, right))
    )
    total = precision + recall
    return 2 * precision * recall / jnp.where(total > 0, total, 1)


def jaccard(first: Array, second: Array) -> Array:
    """`|A and B| / |A or B|` of two sets, given by flags `[..., N] -> [...]`; 1 where both are empty.

    Of tables and columns that a query names, or of the n-grams that it holds, it is a reward for being nearly right.

    Raises:
      ValueError: shapes that differ.

    Reference: Reasoning-SQL: Reinforcement Learning with SQL Tailored Partial Rewards for Reasoning-Enhanced
      Text-to-SQL, arXiv:2503.23157.
    """
    check_same_shape(first=first, second=second)
    first, second = first != 0, second != 0
    both, either = (at_least_float32(flags.sum(-1)) for flags in (first & second, first | second))
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1)


def rubric_score(met: Array, points: Array, mask: Array) -> Array:
    """`sum_c points_c met_c / sum_c max(points_c, 0)`, `[..., C] -> [...]`: 1 where all that is wanted is met.

    Criteria with negative points are faults, and the score may fall below 0. 0 where no criterion has positive points.

    Args:
      met: whether each criterion is met, or how far, in `[0, 1]`.
      points: of each criterion, of the same shape.
      mask: of the same shape, 0 where there is no criterion.

    Raises:
      ValueError: shapes that differ, points that are not floating.

    Reference: Breaking the Exploration Bottleneck: Rubric-Scaffolded Reinforcement Learning for General LLM Reasoning,
      arXiv:2508.16949.
    """
    check_floating(points=points)
    check_same_shape(met=met, points=points, mask=mask)
    met, points = (jnp.where(mask != 0, at_least_float32(x), 0) for x in (met, points))
    possible = jnp.maximum(points, 0).sum(-1)
    return jnp.where(possible > 0, (points * met).sum(-1) / jnp.where(possible > 0, possible, 1), 0)


# --- several rewards --------------------------------------------------------------------------------------------------


def combine_rewards(rewards: Array, weights: Array) -> Array:
    """`sum_k w_k r_k`, `[K, ...] -> [...]`.

    Rewards that are NaN, of a judge that was not asked, are left out, as in TRL; where all are, the result is NaN,
    which `group_advantage` reads as a sample without a reward. For partial rewards, those of a wrong answer must sum
    to less than that of a right one.

    Args:
      rewards: `[K, ...]`.
      weights: `[K]`.

    Raises:
      ValueError: shapes that do not fit, rewards that are not floating.

    Reference: Reasoning-SQL: Reinforcement Learning with SQL Tailored Partial Rewards for Reasoning-Enhanced
      Text-to-SQL, arXiv:2503.23157.
    """
    check_floating(rewards=rewards)
    if rewards.ndim < 1 or weights.shape != rewards.shape[:1]:
        raise ValueError(f"weights must be [K] for rewards [K, ...], got {weights.shape} for {rewards.shape}")
    missing = jnp.isnan(rewards)
    weights = at_least_float32(weights).reshape(-1, *(1,) * (rewards.ndim - 1))
    total = (weights * jnp.where(missing, 0, at_least_float32(rewards))).sum(0)
    return jnp.where(missing.all(0), jnp.nan, total)


def gdpo_advantage(rewards: Array, weights: Array, *, ddof: int = 1, eps: Float = 1e-4) -> Array:
    """`whiten(sum_k w_k (r_k - mean) / (std_k + eps))`, `[K, P, G] -> [P, G]`: each reward counts on its own scale.

    Mean and std of each reward are those of its group; the sum is whitened over the batch. Where rewards are summed
    first, different answers may have the same sum; here a reward that is rarely earned is as loud as one that often is,
    but for its weight. TRL's "normalize_then_sum", whose defaults these are.

    Args:
      rewards: K rewards of G answers to each of P prompts, `[K, P, G]`; NaN where one is missing, which gives 0 to that
        reward. An answer without any gets 0 and is left out of the batch's statistics.
      weights: `[K]`.
      ddof: of both stds.
      eps: added to both stds.

    Raises:
      ValueError: shapes that do not fit, rewards that are not floating.

    Reference: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization,
      arXiv:2601.05242.
    """
    check_floating(rewards=rewards)
    if rewards.ndim != 3:
        raise ValueError(f"rewards must have shape [K, P, G], got {rewards.shape}")
    alone = jax.vmap(lambda reward: group_advantage(reward, ddof=ddof, eps=eps))(rewards)
    total = combine_rewards(jnp.where(jnp.isnan(rewards), jnp.nan, alone), weights)
    return group_advantage(total.reshape(1, -1), ddof=ddof, eps=eps).reshape(total.shape)

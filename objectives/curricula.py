r"""Curricula: which prompts to train on next, by what the last ones taught, by difficulty, or by the model's angles.

Probabilities and schedules, to be sampled from with a key: `jax.random.categorical(key, jnp.log(probabilities))` draws
with replacement, and with `k` Gumbel-perturbed largest ones without. Nothing here needs a gradient; results are float32
at least.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_same_shape, safe_sqrt, squared_norm

__all__ = [
    "CategorySignal",
    "abs_advantage_signal",
    "angle_concentration",
    "curriculum_probs",
    "curriculum_update",
    "gaussian_mu_update",
    "gaussian_order_probs",
    "scaffold_ratio",
]

Float = float | Array

# --- by what a category teaches ---------------------------------------------------------------------------------------


class CategorySignal(NamedTuple):
    """What each category of prompts taught, `[C]` each."""

    signal: Array
    seen: Array  # booleans: whether it was in the batch


def abs_advantage_signal(
    advantages: Array, categories: Array, num_categories: int, *, valid: Array | None = None
) -> CategorySignal:
    r"""Mean of `|A|` over the samples of each category, and which categories there were: how much is left to learn.

    Of a group with right-or-wrong rewards and advantages scaled by the population std it is twice that std,
    `2 sqrt(K (G - K)) / G`, largest where half are right; of centred advantages, `2 K (G - K) / G^2`: the same order
    of categories at another temperature.

    Args:
      advantages: `[P, G]`.
      categories: of the prompts, integers `[P]`; outside of `0..num_categories - 1` a prompt does not count.
      num_categories: static.
      valid: `[P, G]`, 0 for samples that do not count.

    Returns:
      Signals, 0 for a category that was not seen, and which were.

    Raises:
      ValueError: shapes that do not fit, advantages that are not floating, categories that are not integers.

    Reference: Self-Evolving Curriculum for LLM Reasoning, arXiv:2505.14970.
    """
    check_floating(advantages=advantages)
    valid = jnp.ones(advantages.shape, bool) if valid is None else valid != 0
    check_same_shape(advantages=advantages, valid=valid)
    if advantages.ndim != 2:
        raise ValueError(f"advantages must have shape [P, G], got {advantages.shape}")
    if categories.shape != advantages.shape[:1] or not jnp.issubdtype(categories.dtype, jnp.integer):
        wanted = f"integers of shape {advantages.shape[:1]}"
        raise ValueError(f"categories must be {wanted}, got {categories.dtype}{list(categories.shape)}")
    member = (categories == jnp.arange(num_categories)[:, None])[..., None] & valid
    size = jnp.abs(jnp.broadcast_to(advantages, member.shape))
    return CategorySignal(tokens.masked_mean(size, member, axis=(1, 2)), member.any((1, 2)))


def curriculum_update(values: Array, signal: Array, seen: Array, *, alpha: Float = 0.5) -> Array:
    """`alpha signal + (1 - alpha) values` where a category was seen, else its value as it was, `[C]`.

    Raises:
      ValueError: shapes that differ, values or signals that are not floating.

    Reference: Self-Evolving Curriculum for LLM Reasoning, arXiv:2505.14970.
    """
    check_floating(values=values, signal=signal)
    check_same_shape(values=values, signal=signal, seen=seen)
    values, signal = at_least_float32(values), jnp.where(seen != 0, at_least_float32(signal), 0)
    return jnp.where(seen != 0, alpha * signal + (1 - alpha) * values, values)


def curriculum_probs(values: Array, tau: Float = 1.0, *, available: Array | None = None) -> Array:
    """`softmax(values / tau)` over the categories that are available, `[..., C] -> [..., C]`; 0 where none is.

    `tau` is positive.

    Raises:
      ValueError: shapes that differ, values that are not floating.

    Reference: Self-Evolving Curriculum for LLM Reasoning, arXiv:2505.14970.
    """
    check_floating(values=values)
    kept = jnp.ones(values.shape, bool) if available is None else available != 0
    check_same_shape(values=values, available=kept)
    logits = jnp.where(kept, at_least_float32(values), 0) / tau
    some = kept.any(-1, keepdims=True)
    return jnp.where(kept, jax.nn.softmax(jnp.where(kept | ~some, logits, -jnp.inf), axis=-1), 0)


# --- by the angles between hidden states ------------------------------------------------------------------------------


def angle_concentration(hidden: Array, question: Array, instruction: Array, *, w_cross: Float = 8.0) -> Array:
    r"""`mean_ij cos(h_i, h_j) + w_cross mean_ik cos(h_i, h_k)`, `[B, T, D] -> [B]`: do hidden states point one way.

    `i` and `j` run over the tokens of the question, `i = j` included, `k` over those of the instruction before it. The
    means of cosines are products of the means of unit vectors. Prompts with a large one are learned faster, and come
    first. 0 for an empty region; hidden states of 0 have the cosine 0 with all.

    Args:
      hidden: `[B, T, D]`; the authors take what enters the last layer's up-projection.
      question: `[B, T]`, not 0 on its tokens.
      instruction: `[B, T]`, likewise.
      w_cross: the authors' weight.

    Raises:
      ValueError: shapes that do not fit, hidden states that are not floating.

    Reference: Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals, arXiv:2506.02281.
    """
    check_floating(hidden=hidden)
    check_same_shape(question=question, instruction=instruction)
    if hidden.ndim != 3 or question.shape != hidden.shape[:2]:
        raise ValueError(f"question must be [B, T] for hidden [B, T, D], got {question.shape} for {hidden.shape}")
    used = ((question != 0) | (instruction != 0))[..., None]
    h = jnp.where(used, at_least_float32(hidden), 0)
    length = safe_sqrt(jnp.square(h).sum(-1, keepdims=True))
    unit = h / jnp.where(length > 0, length, 1)
    ours, theirs = (
        tokens.masked_mean(unit, jnp.broadcast_to((region != 0)[..., None], unit.shape), axis=1)
        for region in (question, instruction)
    )
    return squared_norm(ours) + w_cross * (ours * theirs).sum(-1)


def gaussian_order_probs(ranks: Array, mu: Float, *, sigma: Float = 1000.0, available: Array | None = None) -> Array:
    """Probabilities of prompts, proportional to `exp(-((rank - mu) / sigma)^2 / 2)`, `[N]`; 0 where none is available.

    Args:
      ranks: of the prompts, 0 for the one to come first, `[N]`, integers or floats.
      mu: where in that order training is.
      sigma: positive; the authors'.
      available: `[N]`, 0 for prompts that were drawn already.

    Raises:
      ValueError: shapes that differ.

    Reference: Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals, arXiv:2506.02281.
    """
    kept = jnp.ones(ranks.shape, bool) if available is None else available != 0
    check_same_shape(ranks=ranks, available=kept)
    away = (jnp.where(kept, at_least_float32(ranks), 0) - mu) / sigma
    return curriculum_probs(-jnp.square(away) / 2, available=kept)


def gaussian_mu_update(
    mu: Float,
    accuracy: Float,
    angle: Float,
    *,
    n: Float = 500.0,
    alpha: Float = 2.0,
    beta: Float = 0.5,
    max_step: Float = 1000.0,
) -> Array:
    """`mu + clip(n tanh(alpha (accuracy - beta)) + n tanh(alpha angle), 0, max_step)`: never back to easier prompts.

    The authors' code draws a batch with the `mu` from before the update.

    Args:
      mu: as in `gaussian_order_probs`; scalars, as all others.
      accuracy: of the batch, in `[0, 1]`; the authors' code halves a reward whose maximum is 2.
      angle: mean of `angle_concentration` over the batch.
      n: half the longest step; the defaults are the authors'.
      alpha: how steeply it depends on both.
      beta: the accuracy at which its own part is 0.
      max_step: longest step.

    Reference: Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals, arXiv:2506.02281.
    """
    mu, accuracy, angle = (at_least_float32(x) for x in (mu, accuracy, angle))
    return mu + jnp.clip(n * jnp.tanh(alpha * (accuracy - beta)) + n * jnp.tanh(alpha * angle), 0, max_step)


# --- scaffolds --------------------------------------------------------------------------------------------------------


def scaffold_ratio(
    group_size: int,
    progress: Float,
    *,
    kind: Literal["sigmoid", "power"] = "sigmoid",
    start: Float = 0.2,
    steepness: Float = 125.0,
    power: Float = 1.0,
) -> Array:
    r"""`(G - 1 - i) / (G - 1) d(progress)`, `[G]`: what share of the rubric each answer of a group is shown.

        kind        d(x)
        "sigmoid"   sigmoid(-steepness (x - start))
        "power"     (1 - x)^power

    The first answer is shown most and the last one nothing; a group of one has `d` itself, where the authors' code goes
    on showing all. They show `round(ratio C)` of `C` criteria, and train without the scaffold in the prompt.

    Args:
      group_size: `G`, static.
      progress: share of the training that is over, clipped to `[0, 1]`.
      kind: see above.
      start: of the fall, and as the next that of the published run; the code's own defaults are 0.3 and 10.
      steepness: of the fall.
      power: 1 is linear.

    Raises:
      ValueError: an empty group, an unknown kind.

    Reference: Breaking the Exploration Bottleneck: Rubric-Scaffolded Reinforcement Learning for General LLM Reasoning,
      arXiv:2508.16949.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    x = jnp.clip(at_least_float32(progress), 0, 1)
    if kind == "sigmoid":
        decay = jax.nn.sigmoid(-steepness * (x - start))
    elif kind == "power":
        decay = jnp.power(1 - x, power)
    else:
        raise ValueError(f'kind must be "sigmoid" or "power", got {kind!r}')
    return jnp.linspace(1, 0, group_size, dtype=decay.dtype) * decay

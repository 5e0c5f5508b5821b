r"""Credit: advantages and rewards of the tokens, steps and turns of an answer, where one number for all says little.

Steps have masks `[B, S]` and tokens `[P, G, T]` without holes: 1 from the first on, as far as the answer goes.
`tokens.segment_broadcast` gives every token what its step has. Results are float32 at least and receive gradients as
any function does, unless said otherwise: a loss stops them where it uses them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens as core_tokens
from esscher.core.arrays import at_least_float32, check_floating, check_same_shape
from esscher.objectives.advantages import Center, Scale, group_advantage

__all__ = [
    "PrefixValues",
    "clip_process_reward",
    "common_prefix",
    "delta_process_reward",
    "entropy_modulated_advantage",
    "mc_step_advantage",
    "prefix_tree_values",
    "segment_group_advantage",
    "self_correction_rewards",
    "tempo_advantage",
]

Float = float | Array

# --- groups -----------------------------------------------------------------------------------------------------------


def segment_group_advantage(
    rewards: Array,
    groups: Array,
    num_groups: int,
    *,
    center: Center = "mean",
    scale: Scale = "group",
    ddof: int = 1,
    eps: Float = 1e-6,
    valid: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """`group_advantage` for samples in any order and groups of any sizes, `[B] -> [B]`.

    Every sample of a group must be there: under `shard_map` groups do not straddle devices. It works on an array
    `[num_groups, B]`.

    Args:
      rewards: `[B]`.
      groups: number of the group that each sample belongs to, integers `[B]`; a sample with another number than
        `0..num_groups - 1` counts nowhere and gets 0.
      num_groups: static.
      center: and all others as in `group_advantage`, of shape `[B]`.
      scale: likewise.
      ddof: likewise.
      eps: likewise.
      valid: likewise.
      lengths: likewise.

    Raises:
      ValueError: shapes that differ or are not `[B]`, groups that are not integers, and as in `group_advantage`.

    Reference: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv:2402.03300.
    """
    check_floating(rewards=rewards)
    valid = ~jnp.isnan(rewards) if valid is None else valid != 0
    check_same_shape(rewards=rewards, groups=groups, valid=valid)
    if rewards.ndim != 1 or not jnp.issubdtype(groups.dtype, jnp.integer):
        raise ValueError(f"groups must be integers [B] like rewards, got {groups.dtype}{list(groups.shape)}")
    if lengths is not None:
        check_same_shape(rewards=rewards, lengths=lengths)
        lengths = jnp.broadcast_to(lengths, (num_groups, *lengths.shape))
    members = valid & (groups == jnp.arange(num_groups)[:, None])
    advantages = group_advantage(
        jnp.broadcast_to(rewards, members.shape),
        center=center,
        scale=scale,
        ddof=ddof,
        eps=eps,
        valid=members,
        lengths=lengths,
    )
    return advantages.sum(0)


# --- trees of prefixes ------------------------------------------------------------------------------------------------


class PrefixValues(NamedTuple):
    """Mean rewards of the answers that begin with a prefix, `[P, G, T]` each, 0 where the mask is."""

    before: Array  # with the tokens before this one
    after: Array  # with this one too


def common_prefix(tokens: Array, mask: Array) -> Array:
    """Whether answers `i` and `j` agree in all their tokens up to `t`, `[P, G, T] -> [P, G, G, T]`, booleans.

    False where either has ended. An answer that has ended agrees up to its last token with a longer one that begins
    like it, so the end token must be one of the tokens. Memory is `P G^2 T`.

    Args:
      tokens: integers `[P, G, T]`, of G answers to each of P prompts.
      mask: `[P, G, T]`, 1 from the first token of the answer on, as far as it goes.

    Raises:
      ValueError: shapes that differ or are not `[P, G, T]`, tokens that are not integers.

    Reference: Exploiting Tree Structure for Credit Assignment in RL Training of LLMs, arXiv:2509.18314.
    """
    check_same_shape(tokens=tokens, mask=mask)
    if tokens.ndim != 3 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [P, G, T], got {tokens.dtype}{list(tokens.shape)}")
    kept = mask != 0
    agree = (tokens[:, :, None] == tokens[:, None]) & kept[:, :, None] & kept[:, None]
    return jax.lax.cummin(agree.astype(jnp.int8), axis=3) != 0


def prefix_tree_values(tokens: Array, mask: Array, rewards: Array, *, valid: Array | None = None) -> PrefixValues:
    r"""`V(prefix) = mean of r_j over the answers j that begin with it`, before and after each token.

    Before the first token it is the mean of all. Where all strings are there, as often as the policy samples them, the
    values are exact, and `after - before` is the advantage of each token. At the end of a plan it is the plan's value.

    Args:
      tokens: as in `common_prefix`.
      mask: likewise.
      rewards: `[P, G]`.
      valid: `[P, G]`, 0 for an answer that has no reward: it is left out of all means and its own values are 0. Where
        it is absent, answers whose reward is NaN are such.

    Raises:
      ValueError: as in `common_prefix`, or rewards that are not floating or not `[P, G]`.

    Reference: Exploiting Tree Structure for Credit Assignment in RL Training of LLMs, arXiv:2509.18314.
    """
    share = common_prefix(tokens, mask)
    check_floating(rewards=rewards)
    valid = ~jnp.isnan(rewards) if valid is None else valid != 0
    check_same_shape(rewards=rewards, valid=valid)
    if rewards.shape != tokens.shape[:2]:
        raise ValueError(f"rewards must have shape {tokens.shape[:2]}, got {rewards.shape}")
    share = share & valid[:, None, :, None] & valid[:, :, None, None]
    kept = jnp.where(valid, at_least_float32(rewards), 0)
    # Not a product of matrices: accelerators round the operands of one.
    after = jnp.where(share, kept[:, None, :, None], 0).sum(2) / jnp.maximum(share.sum(2), 1)
    mean = jnp.broadcast_to(core_tokens.masked_mean(kept, valid, axis=1)[:, None, None], (*kept.shape, 1))
    before = jnp.concatenate([mean, after[..., :-1]], axis=-1)
    return PrefixValues(jnp.where(share.any(2), before, 0), after)


def tempo_advantage(
    tokens: Array,
    mask: Array,
    rewards: Array,
    *,
    scale: Scale = "group",
    ddof: int = 1,
    eps: Float = 1e-6,
    valid: Array | None = None,
) -> Array:
    r"""`(r_i - mean(r) + V_after - V_before) / (std(r) + eps)` of each token, `[P, G, T]`, 0 where the mask is: TEMPO.

    GRPO wherever no two answers part, and one step of temporal differences on top where they do. Those of an answer
    that is like no other sum to `r_i - mean(r)`, which therefore counts once more, on the tokens that made it differ.
    The values are linear in the rewards, so they are taken of GRPO's advantages. The paper divides by the std and does
    not say which one; `ddof` and `eps` are `group_advantage`'s.

    Args:
      tokens: as in `common_prefix`.
      mask: likewise.
      rewards: `[P, G]`.
      scale: as in `group_advantage`, as the others.
      ddof: likewise.
      eps: likewise.
      valid: likewise.

    Raises:
      ValueError: as in `prefix_tree_values` and `group_advantage`.

    Reference: Exploiting Tree Structure for Credit Assignment in RL Training of LLMs, arXiv:2509.18314.
    """
    check_floating(rewards=rewards)
    valid = ~jnp.isnan(rewards) if valid is None else valid
    outcome = group_advantage(rewards, scale=scale, ddof=ddof, eps=eps, valid=valid)
    values = prefix_tree_values(tokens, mask, outcome, valid=valid)
    return jnp.where(mask != 0, outcome[..., None] + values.after - values.before, 0)


# --- steps ------------------------------------------------------------------------------------------------------------


def entropy_modulated_advantage(
    advantages: Array,
    step_entropy: Array,
    step_mask: Array,
    *,
    k: Float = 1.0,
    k_future: Float = 1.0,
    zeta: Float = 0.05,
    eps: Float = 1e-8,
) -> Array:
    r"""`A g_s + zeta f_{s+1}`, less its mean over all steps, `[B, S]`: EMPG, more credit for steps of low entropy.

        h = (H - min H) / (max H - min H + eps)       g = e^{-k h} / mean e^{-k h}       f = e^{-k_future h}

    Minima, maxima and means are those of all steps of the batch, so that `g` is 1 on average. The last step of an
    answer gets no bonus, as in public implementations. The bonus, for a clear step to come, is no difference of
    potentials: it changes which policy is best. With `k = zeta = 0` it is `A` less its mean over steps.

    Args:
      advantages: of whole answers, `[B]`.
      step_entropy: mean entropy of the tokens of each step, in nats, `[B, S]`, a constant;
        `tokens.segment_mean(tokens.token_entropy(logits), segments, S)`.
      step_mask: `[B, S]`, 1 from the first step on, as far as the answer goes.
      k: how much the credit of a step falls with its entropy. The defaults are those of public implementations.
      k_future: likewise, of the bonus.
      zeta: of the bonus.
      eps: of the entropies' range.

    Returns:
      `[B, S]`, 0 where the mask is.

    Raises:
      ValueError: shapes that do not fit, advantages or entropies that are not floating.

    Reference: Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents, arXiv:2509.09265.
    """
    kept = _steps(step_mask, step_entropy=step_entropy)
    check_floating(advantages=advantages)
    if advantages.shape != step_mask.shape[:1]:
        raise ValueError(f"advantages must have shape {step_mask.shape[:1]}, got {advantages.shape}")
    entropy = jax.lax.stop_gradient(jnp.where(kept, at_least_float32(step_entropy), 0))
    some = kept.any()
    low = jnp.where(some, jnp.min(entropy, where=kept, initial=jnp.inf), 0)
    high = jnp.where(some, jnp.max(entropy, where=kept, initial=-jnp.inf), 0)
    h = jnp.where(kept, (entropy - low) / (high - low + eps), 0)
    g = jnp.exp(-k * h)
    g = g / jnp.where(some, core_tokens.masked_mean(g, kept), 1)
    bonus = _shift(jnp.where(kept, jnp.exp(-k_future * h), 0))
    modulated = at_least_float32(advantages)[:, None] * g + zeta * bonus
    return jnp.where(kept, modulated - core_tokens.masked_mean(modulated, kept), 0)


def mc_step_advantage(step_values: Array, step_mask: Array) -> Array:
    """`V_{s+1} - V_s`, `[B, S + 1] -> [B, S]`: what each step adds to the share of continuations that are correct.

    They sum to the last value, the correctness itself, minus the first, the pass rate of the prompt. Few continuations
    make noisy values, and so critical steps that are none.

    Args:
      step_values: mean correctness of continuations from before the first step, after it, and so on, `[B, S + 1]`.
      step_mask: `[B, S]`, 1 from the first step on, as far as the answer goes.

    Returns:
      `[B, S]`, 0 where the mask is.

    Raises:
      ValueError: shapes that do not fit, values that are not floating.

    Reference: RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold,
      arXiv:2406.14532.
    """
    check_floating(step_values=step_values)
    if step_mask.ndim != 2 or step_values.shape != (step_mask.shape[0], step_mask.shape[1] + 1):
        raise ValueError(f"step_values must be [B, S + 1] for step_mask {step_mask.shape}, got {step_values.shape}")
    values = at_least_float32(step_values)
    after, before = (jnp.where(step_mask != 0, x, 0) for x in (values[:, 1:], values[:, :-1]))
    return after - before


def clip_process_reward(step_rewards: Array, step_mask: Array, *, eta: Float) -> Array:
    """`min(r_s - eta, 0)` of each step, `[B, S]`, 0 where the mask is: no step can earn, so repeating one cannot.

    Alone it makes short answers best; `delta_process_reward` comes after it. The paper takes for `eta` about the mean
    of the process rewards.

    Raises:
      ValueError: shapes that differ or are not `[B, S]`, rewards that are not floating.

    Reference: On Designing Effective RL Reward at Training Time for LLM Reasoning, arXiv:2410.15115.
    """
    kept = _steps(step_mask, step_rewards=step_rewards)
    return jnp.where(kept, jnp.minimum(jnp.where(kept, at_least_float32(step_rewards), 0) - eta, 0), 0)


def delta_process_reward(step_rewards: Array, step_mask: Array) -> Array:
    """`r_s - r_{s+1}`; `r_s` at the last step but one, 0 at the last, `[B, S]`: the return from step `s` on is `r_s`.

    So the sum over an answer is the first step's reward, however many there are. The last step is left to the reward
    of the answer; an answer of one step gets 0.

    Args:
      step_rewards: `[B, S]`.
      step_mask: `[B, S]`, 1 from the first step on, as far as the answer goes.

    Returns:
      `[B, S]`, 0 where the mask is.

    Raises:
      ValueError: shapes that differ or are not `[B, S]`, rewards that are not floating.

    Reference: On Designing Effective RL Reward at Training Time for LLM Reasoning, arXiv:2410.15115.
    """
    kept = _steps(step_mask, step_rewards=step_rewards)
    returns = jnp.where(kept & _shift(kept), at_least_float32(step_rewards), 0)
    return returns - _shift(returns)


def self_correction_rewards(first: Array, second: Array, *, alpha: Float = 10.0) -> tuple[Array, Array]:
    """`(r_1, r_2 + alpha (r_2 - r_1))` of the two turns, of any shape: SCoRe's second stage.

    Each is for the tokens of its own turn alone. As one return for both, the bonus would reach the first turn with
    `1 - alpha` in front of `r_1`: with the paper's alpha, that turn would learn to be wrong.

    Args:
      first: reward of the first answer.
      second: of the corrected one, of the same shape.
      alpha: of the progress; the paper's default.

    Returns:
      Rewards of the first and of the second turn.

    Raises:
      ValueError: shapes that differ, rewards that are not floating.

    Reference: Training Language Models to Self-Correct via Reinforcement Learning, arXiv:2409.12917.
    """
    check_floating(first=first, second=second)
    check_same_shape(first=first, second=second)
    first, second = at_least_float32(first), at_least_float32(second)
    return first, second + alpha * (second - first)


def _steps(step_mask: Array, **named: Array) -> Array:
    """Which steps count, after a check of the array of that shape."""
    ((name, array),) = named.items()
    check_floating(**named)
    check_same_shape(**named, step_mask=step_mask)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [B, S], got {array.shape}")
    return step_mask != 0


def _shift(x: Array) -> Array:
    """The next entry of each row in place of this one; 0 or False in place of the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

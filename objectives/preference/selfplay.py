r"""Self-play: losses on samples of the policy itself, for preferences `P(y > y')` that no reward need explain.

The policy is regularised towards a reference with temperature beta. Most methods of this kind are pair losses on pairs
sampled from the current policy, and live in `pairs`: online DPO and online IPO are `dpo` and `ipo` on such pairs with
the fixed reference; iterated DPO, SPIN and DNO take the policy that sampled as the reference, DNO with soft labels;
INPO mixes both references (`scores.mixed_reference`). Here is the rest: Nash-MD, whose opponent is a mixture, P3O, a
policy gradient of pairs, TRPA, lists of the policy's samples inside a trust region, and what accelerates any iteration.

Log-probabilities are in nats; `[B]` of whole responses, `[B, T]` of tokens with their mask. All but the policy's are
constants, as are rewards and preferences. Results are float32 at least. Every function raises a ValueError for shapes
that do not fit and for log-probabilities that are not floating.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape, expand_like
from esscher.objectives.preference.losses import pairwise_list
from esscher.objectives.preference.regularizers import token_kl
from esscher.objectives.preference.scores import log_ratio

__all__ = ["extrapolate_log_policy", "extrapolate_tree", "geometric_mixture", "nash_md", "p3o", "p3o_token", "trpa"]

# --- Nash-MD ----------------------------------------------------------------------------------------------------------


def nash_md(logp: Array, ref_logp: Array, mask: Array, preference: Array, *, beta: float | Array = 0.1) -> Array:
    """`beta sum_t logp_t sg[logp_t - ref_t] - (preference - 1/2) sum_t logp_t`: only its gradient has a meaning.

    Its expectation over responses of the policy is minus the gradient of `P(pi > mixture) - beta KL(pi || ref)` for
    responses of one token. For longer ones, as in TRL, a token's log-ratio multiplies that token's score alone, not
    those before it: the penalty is the KL of each token's law, without its influence on the prefixes to come.

    Args:
      logp: of the tokens of a response that the policy sampled, `[B, T]`.
      ref_logp: under the reference, `[B, T]`.
      mask: `[B, T]`, 0 where a token does not count.
      preference: `P(y > y')` against a response of `geometric_mixture`, `[B]`.
      beta: temperature, a scalar or `[B]`.

    Returns:
      `[B]`.

    Reference: Nash Learning from Human Feedback, arXiv:2312.00886.
    """
    logp, ref_logp = _tokens("mask", mask, logp=logp, ref_logp=ref_logp)
    check_per_example(logp, preference=preference, beta=beta)
    weight = expand_like(beta, logp) * (logp - ref_logp) - expand_like(at_least_float32(preference), logp) + 0.5
    return jnp.sum(logp * stop_gradient(weight), -1)


def geometric_mixture(policy_logits: Array, ref_logits: Array, *, mixture: float | Array = 0.5) -> Array:
    """`log softmax((1 - mixture) policy_logits + mixture ref_logits)`, `[..., V]`: the opponent of Nash-MD.

    A forbidden token (`-inf`) on one side is forbidden, unless that side has weight 0. Mixing tilts of one law gives
    its tilt by the mixed reward, so this is also how heads of several objectives are combined. Nothing is stopped.

    Reference: Nash Learning from Human Feedback, arXiv:2312.00886.
    """
    check_floating(policy_logits=policy_logits, ref_logits=ref_logits)
    check_same_shape(policy_logits=policy_logits, ref_logits=ref_logits)
    parts = ((1 - mixture, policy_logits), (mixture, ref_logits))
    return jax.nn.log_softmax(sum(jnp.where(w == 0, 0, w * at_least_float32(x)) for w, x in parts), axis=-1)


# --- P3O --------------------------------------------------------------------------------------------------------------


def p3o(
    policy_first: Array,
    policy_second: Array,
    old_first: Array,
    old_second: Array,
    ref_first: Array,
    ref_second: Array,
    rewards_first: Array,
    rewards_second: Array,
    *,
    beta: float | Array,
    clip_ratio: float | Array,
    clip_range: float | Array,
) -> Array:
    r"""Pairwise proximal policy optimization, clipped jointly: `max(-q w d, -q w clip(d, d_old +- clip_range)) / 2`.

        d = log pi(y_1) - log pi(y_2)        w = sg[ratio_1 ratio_2], clipped to [1/clip_ratio, clip_ratio]
        q = sg[r_1 - r_2 - beta (h_1 - h_2)]

    with the ratios `pi / pi_old`, and `h = log pi - log ref`. On pairs of the policy itself the expected gradient is
    minus that of `E r - beta KL(pi || ref)`. A constant of the prompt in the rewards cancels.

    Args:
      policy_first: `log pi(y_1)`, `[B]`, as all the others; `first` and `second` are two responses to a prompt.
      policy_second: `log pi(y_2)`.
      old_first: under the policy that sampled both.
      old_second: likewise.
      ref_first: under the reference.
      ref_second: likewise.
      rewards_first: of the responses.
      rewards_second: likewise.
      beta: temperature.
      clip_ratio: above 1, for the weight.
      clip_range: for the difference of log-probabilities.

    Returns:
      `[B]`.

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment, arXiv:2310.00212.
    """
    logps = {
        "policy_first": policy_first, "policy_second": policy_second, "old_first": old_first, "old_second": old_second,
        "ref_first": ref_first, "ref_second": ref_second,
    }  # fmt: skip
    check_floating(**logps)
    check_same_shape(**logps, rewards_first=rewards_first, rewards_second=rewards_second)
    first, second, old_1, old_2, ref_1, ref_2 = map(at_least_float32, logps.values())
    rewards = at_least_float32(rewards_first) - at_least_float32(rewards_second)
    check_per_example(first, beta=beta, clip_ratio=clip_ratio, clip_range=clip_range)
    q = stop_gradient(rewards - beta * ((first - ref_1) - (second - ref_2)))
    q = q * _weight((first - old_1) + (second - old_2), clip_ratio)
    return 0.5 * _clipped(q, first - second, old_1 - old_2, clip_range)


def p3o_token(
    policy_first: Array,
    policy_second: Array,
    old_first: Array,
    old_second: Array,
    ref_first: Array,
    ref_second: Array,
    mask_first: Array,
    mask_second: Array,
    rewards_first: Array,
    rewards_second: Array,
    *,
    beta: float | Array,
    clip_ratio: float | Array,
    clip_range: float | Array,
) -> tuple[Array, Array]:
    """P3O clipped for each token: `max(-+q w log pi_t, -+q w clip(log pi_t, log old_t +- clip_range))`.

    Minus is for tokens of the first response, plus for the second's; `q` and `w` are those of `p3o` for the whole
    responses. The loss is the sum of all that is returned, divided by the number of tokens of both responses.

    Args:
      policy_first: `log pi` of each token, `[B, T]`; the log-probabilities and mask of the second may be `[B, U]`.
      policy_second: and all the others as in `p3o`, per token.
      old_first: likewise.
      old_second: likewise.
      ref_first: likewise.
      ref_second: likewise.
      mask_first: `[B, T]`, 0 where a token does not count.
      mask_second: likewise.
      rewards_first: `[B]`.
      rewards_second: `[B]`.
      beta: as the last two, in `p3o`.
      clip_ratio: likewise.
      clip_range: for the log-probability of a token.

    Returns:
      Losses of the tokens of both responses, `[B, T]` and `[B, U]`, 0 where masked.

    Reference: Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment, arXiv:2310.00212.
    """
    first = _tokens("mask_first", mask_first, policy_first=policy_first, old_first=old_first, ref_first=ref_first)
    second = _tokens(
        "mask_second", mask_second, policy_second=policy_second, old_second=old_second, ref_second=ref_second
    )
    pi_1, old_1, ref_1, pi_2, old_2, ref_2 = (x.sum(-1) for x in (*first, *second))
    check_same_shape(policy_first=pi_1, policy_second=pi_2, rewards_first=rewards_first, rewards_second=rewards_second)
    check_per_example(pi_1, beta=beta, clip_ratio=clip_ratio, clip_range=clip_range)
    rewards = at_least_float32(rewards_first) - at_least_float32(rewards_second)
    q = stop_gradient(rewards - beta * ((pi_1 - ref_1) - (pi_2 - ref_2)))
    q = (q * _weight((pi_1 - old_1) + (pi_2 - old_2), clip_ratio))[:, None]
    window = expand_like(clip_range, first[0])
    return (
        jnp.where(mask_first != 0, _clipped(q, first[0], first[1], window), 0),
        jnp.where(mask_second != 0, _clipped(-q, second[0], second[1], window), 0),
    )


def _weight(log_w: Array, clip_ratio: float | Array) -> Array:
    bound = jnp.log(clip_ratio)
    return stop_gradient(jnp.exp(jnp.clip(log_w, -bound, bound)))


def _clipped(q: Array, x: Array, old: Array, window: float | Array) -> Array:
    """`max(-q x, -q clip(x, old +- window))`."""
    old = stop_gradient(old)
    return jnp.maximum(-q * x, -q * jnp.clip(x, old - window, old + window))


def _tokens(mask_name: str, mask: Array, **arrays: Array) -> list[Array]:
    """Log-probabilities `[B, T]` in float32 at least, 0 where the mask is."""
    check_floating(**arrays)
    check_same_shape(**arrays, **{mask_name: mask})
    name, first = next(iter(arrays.items()))
    if first.ndim != 2:
        raise ValueError(f"{name} must have shape [B, T], got {first.shape}")
    return [jnp.where(mask != 0, at_least_float32(x), 0) for x in arrays.values()]


# --- TRPA -------------------------------------------------------------------------------------------------------------


def trpa(
    logp: Array,
    ref_logp: Array,
    old_logp: Array,
    levels: Array,
    mask: Array,
    *,
    beta: float | Array = 0.1,
    top_weight: float | Array = 2.5,
    kl_coef: float | Array = 0.001,
) -> Array:
    r"""Pairs of a prompt's responses of different levels, and a trust region around the policy that sampled them:

        mean_{levels_i < levels_j} softplus(-beta c_i (s_i - s_j)) + kl_coef mean_t (e^{d_t} - d_t - 1)

    with `s` the mean of `logp - ref_logp` over a response's tokens, `c_i = top_weight` at level 1 and 1 below it, and
    `d = old_logp - logp`, clipped at 20. Without a pair the first term is the mean of `softplus(-s_i)` at level 1 and
    `softplus(s_i)` below. The authors take both means over a micro-batch, which is a prompt here.

    Args:
      logp: of each token, `[P, G, T]`: P prompts, G responses.
      ref_logp: under the reference, `[P, G, T]`.
      old_logp: under the policy that sampled, `[P, G, T]`.
      levels: `[P, G]`; 1 is best.
      mask: `[P, G, T]`; a response without tokens does not count.
      beta: temperature per token, a scalar or `[P]`.
      top_weight: `c` of the best level, likewise.
      kl_coef: of the trust region, likewise.

    Returns:
      `[P]`.

    Reference: Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM
      reasoning, arXiv:2504.04524.
    """
    check_floating(logp=logp, ref_logp=ref_logp, old_logp=old_logp)
    check_same_shape(logp=logp, ref_logp=ref_logp, old_logp=old_logp, mask=mask)
    if logp.ndim != 3 or levels.shape != logp.shape[:2]:
        raise ValueError(f"levels must be [P, G] for logp [P, G, T], got {levels.shape} for {logp.shape}")
    check_per_example(logp, beta=beta, top_weight=top_weight, kl_coef=kl_coef)
    s = log_ratio(*(tokens.sequence_logp(x, mask, normalize=True) for x in (logp, ref_logp)))
    valid, top, rank = (mask != 0).any(-1), levels == 1, -levels.astype(jnp.float32)
    pairs = 0
    for scale, better in ((beta * top_weight, top), (beta, ~top)):
        weight = jnp.broadcast_to(better[:, :, None], (*top.shape, top.shape[1]))
        pairs += pairwise_list(expand_like(scale, s) * s, rank, pair_weight=weight, mask=valid, normalize=True)
    alone = tokens.masked_mean(jax.nn.softplus(jnp.where(top, -s, s)), valid, axis=1)
    several = jnp.where(valid, rank, -jnp.inf).max(1) > jnp.where(valid, rank, jnp.inf).min(1)
    trust = token_kl(*(x.reshape(x.shape[0], -1) for x in (logp, old_logp, mask)))
    return jnp.where(several, pairs, alone) + kl_coef * trust


# --- acceleration -----------------------------------------------------------------------------------------------------


def extrapolate_log_policy(new: Array, previous: Array, *, momentum: float | Array = 0.3) -> Array:
    """`log softmax((1 + momentum) new - momentum previous)`, `[..., V]`: the policy, overshot along its last step.

    In an iteration of preference steps, accelerated so by momentum, it becomes the next reference and samples the next
    pairs. Nothing is stopped. A token that `new` forbids (`-inf`) stays forbidden; `previous` must allow all that `new`
    does.

    Args:
      new: logits or log-probabilities after a step.
      previous: before it.
      momentum: 0 keeps `new`.

    Returns:
      Log-probabilities.

    Reference: Accelerated Preference Optimization for Large Language Model Alignment, arXiv:2410.06293.
    """
    check_floating(new=new, previous=previous)
    check_same_shape(new=new, previous=previous)
    new, previous = at_least_float32(new), at_least_float32(previous)
    forbidden = jnp.isneginf(new)
    finite = jnp.where(forbidden, 0, new)
    moved = finite + momentum * (finite - jnp.where(forbidden, 0, previous))
    return jax.nn.log_softmax(jnp.where(forbidden, -jnp.inf, moved), axis=-1)


def extrapolate_tree(new: Any, previous: Any, *, momentum: float | Array = 0.3) -> Any:
    """`new + momentum (new - previous)` for every floating leaf of two pytrees of parameters; others as in `new`.

    It is `extrapolate_log_policy` for policies whose logits are linear in the parameters, and its practical form for
    others. Leaves keep their type; the arithmetic is in float32 at least.

    Reference: Accelerated Preference Optimization for Large Language Model Alignment, arXiv:2410.06293.
    """

    def move(new: Array, previous: Array) -> Array:
        check_same_shape(new=new, previous=previous)
        if new.dtype != previous.dtype:
            raise ValueError(f"new and previous must have one type, got {new.dtype} and {previous.dtype}")
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        wide = at_least_float32(new)
        return (wide + momentum * (wide - at_least_float32(previous))).astype(new.dtype)

    return jax.tree.map(move, new, previous)

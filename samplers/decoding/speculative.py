"""Speculative sampling: a small model drafts several tokens, and a large one, whose law it is, checks them at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating
from esscher.core.contracts import LanguageModel, Transform
from esscher.core.tokens import token_logps
from esscher.samplers.decoding.generation import Generation, check_prompt

__all__ = ["DraftCounts", "speculative_accept", "speculative_generate"]


class DraftCounts(NamedTuple):
    """How a draft has fared, for each row, `[B]`; tokens drafted past a row's end are counted too."""

    accepted: Array  # tokens that the target took over
    proposed: Array  # tokens drafted: `ahead` in each round, so `proposed / ahead` is the number of target calls


def speculative_accept(key: Array, target_logp: Array, draft_logp: Array, draft: Array) -> tuple[Array, Array]:
    r"""Decides how many drafted tokens to keep, and draws the token after them, so that all have the target's law.

    Token `v_i`, drawn from `q_i`, is accepted with probability `min(1, p_i(v_i) / q_i(v_i))` if all before it are. The
    first rejected one is replaced by a draw from `max(p_i - q_i, 0)`, normalised; if none is, `p_(G+1)` gives one more.
    A token is accepted with probability `sum_v min(p, q) = 1 - TV(p, q)`.

    Args:
      key: a random key.
      target_logp: `log p`, normalised, in nats, `[B, G + 1, V]`: given the tokens drafted before each position.
      draft_logp: `log q`, normalised, `[B, G, V]`: exactly the law that the draft was drawn from.
      draft: integers, `[B, G]`.

    Returns:
      The number of drafted tokens kept, `[B]`, from 0 to `G`; and the token that follows them, `[B]`.

    Raises:
      ValueError: shapes that do not fit, log-probs that are not floating, or a draft that is not integers.

    Reference: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
    """
    check_floating(target_logp=target_logp, draft_logp=draft_logp)
    if draft.ndim != 2 or not jnp.issubdtype(draft.dtype, jnp.integer):
        raise ValueError(f"draft must be integers [B, G], got {draft.dtype} of {draft.shape}")
    (batch, ahead), vocabulary = draft.shape, target_logp.shape[-1]
    if (target_logp.shape, draft_logp.shape) != ((batch, ahead + 1, vocabulary), (batch, ahead, vocabulary)):
        raise ValueError(
            f"target_logp must be [B, G + 1, V] and draft_logp [B, G, V] for a draft {draft.shape}, "
            f"got {target_logp.shape} and {draft_logp.shape}"
        )
    uniform_key, token_key = jax.random.split(key)
    target_logp, draft_logp = at_least_float32(target_logp), at_least_float32(draft_logp)
    p, q = (jnp.take_along_axis(x, draft[..., None], -1)[..., 0] for x in (target_logp[:, :ahead], draft_logp))
    accepted = jnp.log(jax.random.uniform(uniform_key, p.shape, p.dtype)) < p - q
    n = jnp.cumprod(accepted, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
    # Past the draft nothing was drawn: with q = 0 the residual is p itself.
    draft_logp = jnp.pad(draft_logp, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf)
    p, q = (jnp.take_along_axis(x, n[:, None, None], 1)[:, 0] for x in (target_logp, draft_logp))
    more = p > q
    residual = jnp.where(more, p + jnp.log(-jnp.expm1(jnp.where(more, q - p, -1))), -jnp.inf)
    # Equal laws reject nothing, but laws that are equal up to rounding may.
    residual = jnp.where(more.any(-1, keepdims=True), residual, p)
    return n, jax.random.categorical(token_key, residual).astype(jnp.int32)


def speculative_generate(
    key: Array,
    target: LanguageModel,
    draft: LanguageModel,
    prompt: Array,
    mask: Array,
    length: int,
    *,
    ahead: int = 4,
    transforms: Sequence[Transform] = (),
    stop: Sequence[int] = (),
    pad: int = 0,
) -> tuple[Generation, DraftCounts]:
    r"""Continues each prompt as `generate` does with the target, in law, but with fewer calls of it.

    In each round the draft proposes `ahead` tokens, the target reads them in one pass, and `speculative_accept` keeps
    some and adds one. Between rounds both caches hold all tokens of a row but the newest. Rows advance by different
    numbers of tokens; the rounds end when all rows have.

    A cache of `models.language_model` needs a capacity of `T0 + length + ahead` for one row. With several, each round
    may use as many slots as its luckiest row, `T0 + (ahead + 1) length` at worst.

    Args:
      key: a random key.
      target: whose law is sampled; needs `extend` and `rewind`.
      draft: a cheaper model with the same vocabulary; needs `rewind`.
      prompt: integers, `[B, T0]`, padded on the left.
      mask: `[B, T0]`, 0 where the prompt is padding.
      length: number of tokens at most.
      ahead: tokens drafted in a round.
      transforms: applied to the logits of both models, in order; without a carry, such as temperature and top-p.
      stop: tokens after which a row stops.
      pad: token to fill up with.

    Returns:
      The continuations with their log-probs under the target, transformed and not; and counts of drafted tokens.

    Raises:
      ValueError: a prompt that is not integers `[B, T0]`, a mask of another shape, `length` or `ahead` below 1, a model
        that lacks a function, vocabularies that differ, or a transform with a carry.

    Reference: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
    """
    check_prompt(prompt, mask, length)
    _check_models(target, draft, ahead)
    (logits, cache), (draft_logits, draft_cache) = target.init(prompt, mask), draft.init(prompt, mask)
    if logits.shape != draft_logits.shape:
        raise ValueError(
            f"target and draft must have one vocabulary, got logits {logits.shape} and {draft_logits.shape}"
        )
    law = _law(transforms, prompt, mask, logits.shape[-1])

    def body(state: tuple) -> tuple:
        i, token, cache, draft_cache, progress, counts = state
        draft_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        draft_cache, drafted, draft_logp = _propose(draft_key, draft, law, draft_cache, token, ahead)
        logits, cache = target.extend(cache, jnp.concatenate([token[:, None], drafted], axis=1))
        logp = law(logits)
        n, token = speculative_accept(accept_key, logp, draft_logp, drafted)
        alive = progress.alive
        counts = DraftCounts(counts.accepted + alive * n, counts.proposed + alive * ahead)
        # Rows that have ended keep nothing, lest they hold on to slots that the others could use again.
        surplus = jnp.where(alive, ahead - n, ahead + 1)
        cache, draft_cache = target.rewind(cache, surplus), draft.rewind(draft_cache, surplus)
        tokens = jnp.where(jnp.arange(ahead + 1) < n[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), token[:, None])
        return i + 1, token, cache, draft_cache, _append(progress, tokens, n + 1, logp, logits, stop), counts

    rows = logits.shape[0]
    logp, nothing = law(logits), jnp.zeros(rows, jnp.int32)
    token = jax.random.categorical(jax.random.fold_in(key, 0), logp).astype(jnp.int32)
    kinds = ((pad, jnp.int32), (0, bool), (0, jnp.float32), (0, jnp.float32))
    out = Generation(*(jnp.full((rows, length), fill, dtype) for fill, dtype in kinds))
    progress = _Progress(out, nothing, jnp.ones(rows, bool))
    progress = _append(progress, token[:, None], nothing + 1, logp[:, None], logits[:, None], stop)
    state = (jnp.array(1), token, cache, draft_cache, progress, DraftCounts(nothing, nothing))
    *_, progress, counts = jax.lax.while_loop(lambda state: state[4].alive.any(), body, state)
    return progress.out, counts


def _check_models(target: LanguageModel, draft: LanguageModel, ahead: int) -> None:
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1, got {ahead}")
    needed = {"target": {"extend": target.extend, "rewind": target.rewind}, "draft": {"rewind": draft.rewind}}
    for name, functions in needed.items():
        missing = [function for function, value in functions.items() if value is None]
        if missing:
            raise ValueError(f"{name} must have {' and '.join(missing)}: drafted tokens are read and taken back")


def _law(transforms: Sequence[Transform], prompt: Array, mask: Array, vocabulary: int) -> Callable[[Array], Array]:
    """The function from logits `[..., V]` to the log-probs that tokens are drawn from."""
    carries = [transform.init(prompt, mask, vocabulary) for transform in transforms]
    if jax.tree.leaves(carries):
        raise ValueError("transforms must have no carry here: it would have to forget tokens that are rejected")

    def law(logits: Array) -> Array:
        shaped = logits.reshape(-1, vocabulary)
        for transform, carry in zip(transforms, carries, strict=True):
            shaped = transform.apply(shaped, carry)
        return jax.nn.log_softmax(at_least_float32(shaped)).reshape(logits.shape)

    return law


def _propose(
    key: Array, draft: LanguageModel, law: Callable[[Array], Array], cache: Any, token: Array, ahead: int
) -> tuple[Any, Array, Array]:
    """The cache with `token` and `ahead` tokens after it read, those tokens `[B, G]`, and their laws `[B, G, V]`."""

    def step(state: tuple, key: Array) -> tuple:
        logits, cache = draft.step(*state)
        logp = law(logits)
        token = jax.random.categorical(key, logp).astype(jnp.int32)
        return (cache, token), (token, logp)

    # One step more than there are tokens to draft: if all are accepted, the draft must have read the last one too.
    (cache, _), drafted = jax.lax.scan(step, (cache, token), jax.random.split(key, ahead + 1))
    return cache, *(jnp.moveaxis(x[:ahead], 0, 1) for x in drafted)


class _Progress(NamedTuple):
    out: Generation
    length: Array  # [B] tokens written
    alive: Array  # [B]


def _append(progress: _Progress, tokens: Array, n: Array, logp: Array, logits: Array, stop: Sequence[int]) -> _Progress:
    """Writes each row's first `n[B]` of `tokens[B, K]`, up to its first stop token and to the end of the buffer."""
    (rows, length), place = progress.out.tokens.shape, jnp.arange(tokens.shape[1])
    at = progress.length[:, None] + place
    written = progress.alive[:, None] & (place < n[:, None]) & (at < length)
    stops = written & jnp.isin(tokens, jnp.asarray(stop, jnp.int32))
    written &= jnp.cumsum(stops, axis=1) - stops == 0
    new = Generation(tokens, written, token_logps(logp, tokens), token_logps(logits, tokens))
    index = (jnp.arange(rows)[:, None], jnp.where(written, at, length))
    out = jax.tree.map(lambda buffer, x: buffer.at[index].set(x.astype(buffer.dtype), mode="drop"), progress.out, new)
    total = progress.length + written.sum(1, dtype=jnp.int32)
    return _Progress(out, total, progress.alive & ~stops.any(1) & (total < length))

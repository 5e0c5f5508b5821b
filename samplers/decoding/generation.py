r"""Sampling continuations token by token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32
from esscher.core.contracts import LanguageModel, Transform
from esscher.core.tokens import token_logps

__all__ = ["Generation", "check_prompt", "generate", "greedy"]


class Generation(NamedTuple):
    """Continuations, without their prompts: `[B, length]` each, or `[B, n, length]`."""

    tokens: Array  # `pad` where the mask is 0
    mask: Array  # 1 up to the first stop token, that one included
    logp: Array  # of each token under the law that was sampled, in nats; 0 where the mask is 0
    model_logp: Array  # likewise under the model, before any transform


def greedy(key: Array, logits: Array) -> Array:
    """The most likely token, `[B, V] -> [B]`; to be given to `generate` in place of `jax.random.categorical`."""
    # Two plain reductions: on CPU an argmax, which carries a value and an index, takes several times as long.
    best = logits == logits.max(-1, keepdims=True)
    return jnp.where(best, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1).min(-1)


def generate(
    key: Array,
    language_model: LanguageModel,
    prompt: Array,
    mask: Array,
    length: int,
    *,
    transforms: Sequence[Transform] = (),
    choose: Callable[[Array, Array], Array] = jax.random.categorical,
    stop: Sequence[int] = (),
    n: int | None = None,
    pad: int = 0,
) -> Generation:
    r"""Continues each prompt by up to `length` tokens, `x_t ~ softmax(transforms(logits(x_{<t})))`.

    The prompt is read once, then one program draws token after token and ends when every row has stopped. Call it under
    `jax.jit`, where it is compiled once for a shape of prompts, and pad those on the left to a few lengths; outside, a
    model's functions are new ones at every call, and so is the program.

    Args:
      key: a random key.
      language_model: for instance `models.language_model.language_model(params, config, capacity)`.
      prompt: integers, `[B, T0]`, padded on the left.
      mask: `[B, T0]`, 0 where the prompt is padding.
      length: number of tokens at most.
      transforms: applied to the logits in order.
      choose: `(key, logits[B, V]) -> token[B]`; `greedy` takes the most likely one. Log-probabilities are those of
        `softmax(transforms(logits))` all the same.
      stop: tokens after which a row stops.
      n: that many continuations of each prompt, `[B, n, length]`; the prompt is still read once.
      pad: token to fill up with.

    Returns:
      The continuations, their log-probabilities under the law sampled from, and under the model.

    Raises:
      ValueError: a prompt that is not integers `[B, T0]`, a mask of another shape, `length` or `n` below 1.
    """
    check_prompt(prompt, mask, length)
    logits, cache = language_model.init(prompt, mask)
    wide = at_least_float32(logits).dtype  # sampling in bfloat16 would be from another law
    carries = tuple(t.init(prompt, mask, logits.shape[-1]) for t in transforms)
    if n is not None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        logits, cache, carries = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (logits, cache, carries))
    rows = logits.shape[0]

    def draw(i: Array, logits: Array, carries: tuple, alive: Array, out: Generation) -> tuple[Array, tuple, Array, Any]:
        shaped = logits = logits.astype(wide)
        for transform, carry in zip(transforms, carries, strict=True):
            shaped = transform.apply(shaped, carry).astype(wide)
        token = choose(jax.random.fold_in(key, i), shaped).astype(jnp.int32)
        model_logp = token_logps(logits, token)
        logp = token_logps(shaped, token) if transforms else model_logp
        token = jnp.where(alive, token, pad)
        carries = tuple(t.update(carry, token) for t, carry in zip(transforms, carries, strict=True))
        new = Generation(token, alive, *(jnp.where(alive, x, 0) for x in (logp, model_logp)))
        out = jax.tree.map(lambda buffer, x: buffer.at[:, i].set(x.astype(buffer.dtype)), out, new)
        return token, carries, alive & ~jnp.isin(token, jnp.asarray(stop, jnp.int32)), out

    def body(state: tuple) -> tuple:
        i, token, cache, carries, alive, out = state
        logits, cache = language_model.step(cache, token)
        token, carries, alive, out = draw(i, logits, carries, alive, out)
        return i + 1, token, cache, carries, alive, out

    empty = Generation(
        jnp.full((rows, length), pad, jnp.int32), *(jnp.zeros((rows, length), d) for d in (bool, wide, wide))
    )
    token, carries, alive, out = draw(jnp.array(0), logits, carries, jnp.ones(rows, bool), empty)
    state = (jnp.array(1), token, cache, carries, alive, out)
    out = jax.lax.while_loop(lambda state: (state[0] < length) & state[4].any(), body, state)[-1]
    return out if n is None else jax.tree.map(lambda x: x.reshape(-1, n, length), out)


def check_prompt(prompt: Array, mask: Array, length: int) -> None:
    """Raises a ValueError unless the prompt is integers `[B, T0]`, the mask has its shape, and there is a length."""
    prompt, mask = jnp.asarray(prompt), jnp.asarray(mask)
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt must be integers [B, T0], got {prompt.dtype} of {prompt.shape}")
    if mask.shape != prompt.shape:
        raise ValueError(f"mask must have the shape of prompt, {prompt.shape}, got {mask.shape}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")

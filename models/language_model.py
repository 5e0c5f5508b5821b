r"""The decoder as a `LanguageModel`: a prompt is read at once, then tokens one or several at a time, with a cache.

Layers are run one after another, not by a scan, each with its own cache and with fused projections: a token costs the
reading of the weights once, and caches are written in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import check_same_shape
from esscher.core.contracts import LanguageModel
from esscher.models import decoder
from esscher.models.attention import Attention, cached_attention, dot_product_attention
from esscher.models.decoder import Config
from esscher.models.functional import Params

__all__ = ["Cache", "language_model"]


class Cache(NamedTuple):
    """What has been read: keys and values in slots `0..S`, of which rows may use different ones."""

    keys: tuple[Array, ...]  # per layer, [B, K, D, S], positions applied
    values: tuple[Array, ...]  # per layer, [B, K, S, D]
    positions: Array  # [B, S] of the token in each slot, -1 if there is none
    position: Array  # [B] of the next token
    slot: Array  # [B] of the next token, the same in all rows


def language_model(
    params: Params, config: Config, capacity: int, *, attention: Attention = dot_product_attention
) -> LanguageModel:
    """A decoder with a cache of `capacity` tokens, prompt included; past it, logits are NaN, and after no token, too.

    `extend` writes all rows' tokens into the same slots. Rows from which `rewind` took fewer tokens than from others
    leave slots empty, so leave room where rows differ: `G` tokens for every round of speculation. `rewind` stops at the
    empty prefix.

    Args:
      params: of `decoder.init` or `hf.load`.
      config: which decoder.
      capacity: of the cache.
      attention: that reads the prompt, see `models.attention`.

    Returns:
      Its four functions.

    Raises:
      ValueError: (from `init`) a prompt that is no matrix of integers or longer than `capacity`, or a mask of another
        shape; (from `step` and `extend`) tokens that are not integers, one or several for each row of the cache, or
        more at once than `capacity`.
    """
    stacked = params["layers"]
    layers = [decoder.fuse(jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(config.depth)]

    def forward(tokens: Array, positions: Array, cache: Cache | None) -> tuple[Array, list[tuple[Array, Array]], Array]:
        """Hidden states; keys and values of each layer; and positions of the keys."""
        known = positions if cache is None else _write(cache.positions, positions, cache.slot, axis=1)
        rotations, masks = decoder.kinds(config, positions, known, (known >= 0)[:, None])
        x, written = decoder.embed(params, config, tokens), []
        for i, weights in enumerate(layers):
            kind = int(bool(config.sliding) and config.sliding[i])

            def attend(query, key, value, i=i, kind=kind):
                options = {
                    "mask": masks[kind],
                    "scale": decoder.query_scale(config),
                    "softcap": config.attention_softcap,
                }
                key_columns, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
                if cache is None:
                    written.append((key_columns, values))
                    return attention(query, key, value, **options)
                keys = _write(cache.keys[i], key_columns, cache.slot, axis=3)
                written.append((keys, _write(cache.values[i], values, cache.slot, axis=2)))
                return cached_attention(query, *written[-1], **options)

            x = decoder.layer(weights, config, x, rotations[kind], attend)
        return decoder.final_norm(params, config, x), written, known

    def init(prompt: Array, mask: Array) -> tuple[Array, Cache]:
        if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
            raise ValueError(f"prompt must be integers [B, T0], got {prompt.dtype} of {prompt.shape}")
        check_same_shape(prompt=prompt, mask=mask)
        length = prompt.shape[1]
        if not 0 < length <= capacity:
            raise ValueError(f"prompt must have 1 to {capacity} tokens, the capacity, got {length}")
        present = mask != 0
        positions = jnp.where(present, jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1, -1)
        states, written, _ = forward(jnp.where(present, prompt, 0), positions, None)
        room = (0, capacity - length)
        keys = tuple(jnp.pad(keys, ((0, 0), (0, 0), (0, 0), room)) for keys, _ in written)
        values = tuple(jnp.pad(values, ((0, 0), (0, 0), room, (0, 0))) for _, values in written)
        known = jnp.pad(positions, ((0, 0), room), constant_values=-1)
        slot = jnp.full(prompt.shape[0], length, jnp.int32)
        cache = Cache(keys, values, known, positions.max(1) + 1, slot)
        # Of the last token that is there: padding may stand on the right as well.
        last = jnp.take_along_axis(states, jnp.argmax(positions, axis=1)[:, None, None], axis=1)[:, 0]
        # A row without a token has read its padding, which means nothing.
        return jnp.where(present.any(1)[:, None], decoder.logits(params, config, last), jnp.nan), cache

    def extend(cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        _check_tokens(cache, 2, tokens=tokens)
        n = tokens.shape[1]
        if n > capacity:
            raise ValueError(f"tokens must have at most {capacity} a row, the capacity, got {n}")
        states, written, known = forward(tokens, cache.position[:, None] + jnp.arange(n, dtype=jnp.int32), cache)
        keys, values = (tuple(part) for part in zip(*written, strict=True))
        out = decoder.logits(params, config, states)
        out = jnp.where((cache.slot + n <= capacity)[:, None, None], out, jnp.nan)
        return out, Cache(keys, values, known, cache.position + n, cache.slot + n)

    def step(cache: Cache, token: Array) -> tuple[Array, Cache]:
        _check_tokens(cache, 1, token=token)
        out, cache = extend(cache, token[:, None])
        return out[:, 0], cache

    return LanguageModel(init, step, extend, _rewind)


def _check_tokens(cache: Cache, ndim: int, **given: Array) -> None:
    ((name, tokens),) = given.items()
    rows = len(cache.position)
    if tokens.ndim != ndim or len(tokens) != rows or not jnp.issubdtype(tokens.dtype, jnp.integer):
        wanted = f"[{rows}]" if ndim == 1 else f"[{rows}, G]"
        raise ValueError(f"{name} must be integers {wanted}, got {tokens.dtype} of {tokens.shape}")


def _rewind(cache: Cache, n: Array) -> Cache:
    n = jnp.minimum(n, cache.position)
    position = cache.position - n
    positions = jnp.where(cache.positions < position[:, None], cache.positions, -1)
    return cache._replace(positions=positions, position=position, slot=cache.slot - n.min())


def _write(buffer: Array, new: Array, slot: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), slot[0], axis)

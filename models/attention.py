r"""Attention of queries to keys, as an argument of the decoder.

Every function here has the signature of `Attention`, and so may yours. `dot_product_attention` serves all devices; on
NVIDIA GPUs `functools.partial(dot_product_attention, implementation="cudnn")` runs cuDNN's flash kernel (bfloat16, no
soft cap). A TPU kernel is plugged in the same way; `docs/kernels.md` shows one.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Attention", "cached_attention", "dot_product_attention"]

Attention = Callable[..., Array]
"""`(query[B, T, H, D], key[B, S, K, D], value[B, S, K, D], *, mask, scale, softcap) -> [B, T, H, D]`.

`mask[B, T, S]` says what a query sees; `None` is the causal mask of `T = S` tokens. Heads `h` share the key head
`h // (H / K)`. Scores are `scale query . key`, and with a soft cap `cap tanh(scores / cap)`.
"""


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None,
    scale: float,
    softcap: float | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Array:
    """Softmax attention with JAX's own kernels, or with plain products if there is a soft cap.

    Softmax is in float32 at least. A query that sees nothing gets some finite value.

    Args:
      query: `[B, T, H, D]`.
      key: `[B, S, K, D]`.
      value: `[B, S, K, D]`.
      mask: booleans `[B, T, S]`; causal if absent.
      scale: of the scores.
      softcap: of the scores.
      implementation: of `jax.nn.dot_product_attention`; "cudnn" needs an NVIDIA GPU.

    Returns:
      `[B, T, H, D]`.

    Reference: Attention Is All You Need, arXiv:1706.03762.
    """
    if softcap is None:
        seen = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(
            query, key, value, mask=seen, scale=scale, is_causal=mask is None, implementation=implementation
        )
    if mask is None:
        mask = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None]
    keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    return cached_attention(query, keys, values, mask=mask, scale=scale, softcap=softcap)


def cached_attention(
    query: Array, key: Array, value: Array, *, mask: Array, scale: float, softcap: float | None = None
) -> Array:
    """Softmax attention to keys and values as caches hold them: heads first, positions of keys last.

    Both steps are products of matrices, row by column, for each row and head: for a single query on CPU that is some
    twenty times faster than with the layout of the prompt.

    Args:
      query: `[B, T, H, D]`.
      key: `[B, K, D, S]`.
      value: `[B, K, S, D]`.
      mask: booleans `[B, T, S]`.
      scale: of the scores.
      softcap: of the scores.

    Returns:
      `[B, T, H, D]`.
    """
    b, t, h, d = query.shape
    groups = h // key.shape[1]
    # Queries that share a key head are rows of one matrix, so that both products are plain batched ones.
    rows = query.reshape(b, t, -1, groups, d).transpose(0, 2, 1, 3, 4).reshape(b, -1, t * groups, d)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.einsum("bknd,bkds->bkns", rows, key, preferred_element_type=wide)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.repeat(mask, groups, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1).astype(value.dtype)
    out = jnp.einsum("bkns,bksd->bknd", weights, value)
    return out.reshape(b, -1, t, groups, d).transpose(0, 2, 1, 3, 4).reshape(b, t, h, d)

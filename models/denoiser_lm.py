r"""The decoder's transformer as a denoiser of tokens: every token sees all others, and logits are of the token itself.

    x      = embedding[tokens] + sinusoid(100 t) time
    x     += attention(norm(x));  x += mlp(norm(x))        per layer, as in `models.decoder`, but both ways
    logits = norm(x) @ unembedding

Parameters are those of `models.decoder` and, if wanted, one matrix more for the time. So those of an autoregressive
checkpoint are a start for it. The mask is one of the vocabulary's tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from esscher.models import decoder
from esscher.models.attention import Attention, dot_product_attention
from esscher.models.decoder import Config
from esscher.models.functional import Params
from esscher.models.layers import sinusoid
from esscher.models.rope import angles

__all__ = ["axes", "init", "logits"]

FREQUENCIES = 128


def init(key: Array, config: Config, dtype: DTypeLike = jnp.float32, *, time: bool = False) -> Params:
    """Draws the parameters of `decoder.init`; with `time` also `time[frequencies, width]`, at zero.

    Masked diffusion needs no time, since the tokens show how many are masked; uniform diffusion does.
    """
    params = decoder.init(key, config, dtype)
    return params | {"time": jnp.zeros((FREQUENCIES, config.width), dtype)} if time else params


def axes(config: Config, *, time: bool = False) -> Params:
    """Logical names of every parameter's axes, for `core.meshes.parameter_specs`."""
    return decoder.axes(config) | ({"time": ("frequencies", "embed")} if time else {})


def logits(
    params: Params,
    config: Config,
    tokens: Array,
    t: Array | None = None,
    *,
    mask: Array | None = None,
    attention: Attention = dot_product_attention,
    remat: bool = False,
) -> Array:
    """Logits of the data's token at each position, `[B, L] -> [B, L, vocabulary]`, float32 or wider.

    `functools.partial(logits, params, config)` is the denoiser that samplers take.

    Args:
      params: see `init`.
      config: which decoder; without sliding layers.
      tokens: noisy tokens, integers `[B, L]`; an unknown one makes its row NaN.
      t: times in `[0, 1]`, `[B]`; not used by parameters without time.
      mask: `[B, L]`, 0 for padding, which others do not see and whose own logits mean nothing.
      attention: how; see `models.attention`.
      remat: keep only each layer's input for the gradient and compute the rest again.

    Returns:
      `[B, L, vocabulary]`.

    Raises:
      ValueError: shapes that do not fit, a config with sliding layers, parameters with time and no `t`.

    Reference: Large Language Diffusion Models, arXiv:2502.09992.
    """
    if any(config.sliding):
        raise ValueError(f"config must have no sliding layers, whose window is of the past, got {config.sliding}")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, L], got {tokens.dtype} of {tokens.shape}")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"mask must have shape {tokens.shape}, got {mask.shape}")
    batch, length = tokens.shape
    seen = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
    see = jnp.broadcast_to(seen[:, None], (batch, length, length))
    x = decoder.embed(params, config, tokens if mask is None else jnp.where(seen, tokens, 0))
    if "time" in params:
        if t is None or t.shape != (batch,):
            given = None if t is None else t.shape
            raise ValueError(f"t must have shape ({batch},) for parameters with time, got {given}")
        x += (sinusoid(t, FREQUENCIES, scale=100.0).astype(x.dtype) @ params["time"]).astype(x.dtype)[:, None]
    # Rotary positions tell distances, so padding in front needs no count of its own.
    rotation = angles(config.rope, config.head_dim, jnp.broadcast_to(jnp.arange(length), tokens.shape))

    def attend(query: Array, key: Array, value: Array) -> Array:
        options = {"scale": decoder.query_scale(config), "softcap": config.attention_softcap}
        return attention(query, key, value, mask=see, **options)

    def body(x: Array, weights: Params) -> tuple[Array, None]:
        return decoder.layer(weights, config, x, rotation, attend), None

    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, params["layers"])
    return decoder.logits(params, config, decoder.final_norm(params, config, x))

r"""Linear heads on hidden states: a reward for each sequence, a value or the logits of classes for each token.

Hidden states are those after the final norm, such as `decoder.hidden` returns. Parameters are a dictionary with
`weight`, `[E]` or `[E, C]`, and perhaps `bias`. Sums are in float32 at least, and so is the result.

The heads of Hugging Face's sequence and token classifiers have `score.weight[C, E]`: here that is
`{"weight": score_weight.T}` for `classify`, and for a reward, where `C = 1`, `{"weight": score_weight[0]}`.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from esscher.core.arrays import at_least_float32, normal
from esscher.models.functional import Params

__all__ = ["axes", "classifier_init", "classify", "last_token", "reward", "reward_init", "value", "value_init"]


def reward_init(key: Array, width: int, *, bias: bool = False, dtype: DTypeLike = jnp.float32) -> Params:
    """`w ~ N(0, 1 / (E + 1))`, bias 0: parameters of `reward`.

    Args:
      key: random key.
      width: `E`, of the hidden states.
      bias: have one. A loss of differences of rewards does not see it.
      dtype: of the parameters.

    Raises:
      ValueError: a width below 1.
    """
    _check_positive(width=width)
    return _parameters(_draw(key, (width,), dtype), bias)


def value_init(width: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32) -> Params:
    """`w = 0`, bias 0: parameters of `value`. Every value begins at 0, and the network gets no gradient from them.

    Arguments and errors as in `reward_init`.
    """
    _check_positive(width=width)
    return _parameters(jnp.zeros((width,), dtype), bias)


def classifier_init(
    key: Array, width: int, classes: int, *, bias: bool = False, dtype: DTypeLike = jnp.float32
) -> Params:
    """`w ~ N(0, 1 / (E + 1))`, bias 0: parameters of `classify`.

    Arguments and errors as in `reward_init`; `classes` is `C`, at least 1.
    """
    _check_positive(width=width, classes=classes)
    return _parameters(_draw(key, (width, classes), dtype), bias)


def axes(params: Params) -> Params:
    """Logical names of a head's axes, for `core.meshes.parameter_specs`; `params` may be shapes."""
    names = ("embed", "classes")
    return {name: names[: leaf.ndim] if name == "weight" else names[1 : 1 + leaf.ndim] for name, leaf in params.items()}


def reward(params: Params, hidden: Array, mask: Array) -> Array:
    """`r = w . h_last + b`: one score for each row, read off its last token.

    Neither the score nor its gradient depends on what stands under the padding, on either side. Of a row that packs
    several sequences take `value` at `core.tokens.segment_ends`.

    Args:
      params: of `reward_init`.
      hidden: `[B, T, E]`.
      mask: and the rows without a token as in `last_token`.

    Returns:
      `[B]`, float32 or wider.

    Raises:
      ValueError: as in `last_token`; a weight that is not `[E]`.
    """
    return value(params, last_token(hidden, mask))


def last_token(hidden: Array, mask: Array) -> Array:
    """`h[max_t t mask_t]`: the hidden state of each row's last token, padded on whichever side.

    A row without a token gives the state of its first padding; weight it by zero.

    Args:
      hidden: `[B, T, E]`.
      mask: `[B, T]`, nonzero at tokens.

    Returns:
      `[B, E]`.

    Raises:
      ValueError: hidden states that are not `[B, T, E]` with `T >= 1`, or a mask of another shape.
    """
    if hidden.ndim != 3 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must be [B, T, E] with T >= 1, got {hidden.shape}")
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask must have shape {hidden.shape[:2]}, got {mask.shape}")
    last = jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1]), 0), axis=1)
    # Picked and not multiplied by a mask, which would let a NaN under the padding through.
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def value(params: Params, hidden: Array) -> Array:
    """`V_t = w . h_t + b`, `[..., E] -> [...]`, float32 or wider.

    Raises:
      ValueError: a weight that is not `[E]`.
    """
    return _linear(params, hidden, 1)


def classify(params: Params, hidden: Array) -> Array:
    """`logits_t = h_t W + b`, `[..., E] -> [..., C]`, float32 or wider: of steps, labels, or bins of a return.

    Raises:
      ValueError: a weight that is not `[E, C]`.
    """
    return _linear(params, hidden, 2)


def _linear(params: Params, hidden: Array, ndim: int) -> Array:
    weight = params["weight"]
    if weight.ndim != ndim or weight.shape[0] != hidden.shape[-1]:
        wanted = f"({hidden.shape[-1]}{', C' if ndim == 2 else ','})"
        raise ValueError(f"params must hold a weight of {wanted} for hidden of {hidden.shape}, got {weight.shape}")
    wide = at_least_float32(hidden)
    # In full precision: next to the network it is nothing, and preferences hang on small differences of rewards.
    out = jnp.matmul(wide, weight.astype(wide.dtype), precision=jax.lax.Precision.HIGHEST)
    return out + params["bias"].astype(out.dtype) if "bias" in params else out


def _draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return (normal(key, shape, dtype) / math.sqrt(shape[0] + 1)).astype(dtype)


def _parameters(weight: Array, bias: bool) -> Params:
    return {"weight": weight} | ({"bias": jnp.zeros(weight.shape[1:], weight.dtype)} if bias else {})


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")

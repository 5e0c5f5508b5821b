r"""What the networks share: dense maps, convolutions, normalisation, and conditioning on noise level and class.

Parameters are float32. Arithmetic is in the layer's `dtype`, except norms, which are in float32 at least.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from esscher.core.arrays import at_least_float32, check_floating
from esscher.models.functional import parameter

__all__ = ["Conditioning", "Conv", "Dense", "SelfAttention", "check_images", "check_sizes", "sinusoid", "standardize"]

Init = Callable[..., Array]
Names = tuple[str | None, ...]

SMALL = jax.nn.initializers.normal(0.02)


class Dense(nnx.Module):
    """Affine map of the last axes, `[..., *inputs] -> [..., *outputs]`, as one matrix product.

    The kernel has the shape `[*inputs, *outputs]` and is drawn by `init`, or by Xavier's uniform rule times `gain`.

    Raises:
      ValueError: `dtype` is not a floating type.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[Names, Names],
        *,
        init: Init | None = None,
        gain: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the kernel; the bias is zero."""
        shape, rank = (*inputs, *outputs), len(inputs)
        xavier = _xavier(gain, tuple(range(rank)), tuple(range(rank, len(shape))))
        kernel = (init or xavier)(rngs.params(), shape, jnp.float32)
        self.kernel = parameter(kernel, (*axes[0], *axes[1]))
        self.bias = parameter(jnp.zeros(outputs), axes[1])
        self.inputs, self.outputs, self.dtype = inputs, outputs, _floating(dtype)

    def __call__(self, x: Array) -> Array:
        """Maps `x[..., *inputs]`."""
        # Two-dimensional, because XLA's CPU backend takes four times as long for the gradient of a batched product.
        rows, columns = math.prod(self.inputs), math.prod(self.outputs)
        kernel, bias = (leaf[...].astype(self.dtype) for leaf in (self.kernel, self.bias))
        out = x.astype(self.dtype).reshape(-1, rows) @ kernel.reshape(rows, columns) + bias.reshape(columns)
        return out.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)


class Conv(nnx.Module):
    """Square convolution with zero padding, `[B, H, W, channels_in] -> [B, H, W, channels_out]`, of odd window.

    The kernel is drawn by Xavier's uniform rule times `gain`.

    Raises:
      ValueError: `window` is even, or `dtype` is not a floating type.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        window: int = 3,
        gain: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the kernel; the bias is zero."""
        if window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        shape = (window, window, channels_in, channels_out)
        kernel = _xavier(gain, -2, -1)(rngs.params(), shape, jnp.float32)
        self.kernel = parameter(kernel, (None, None, "channels_in", "channels_out"))
        self.bias = parameter(jnp.zeros(channels_out), ("channels_out",))
        self.dtype = _floating(dtype)

    def __call__(self, x: Array) -> Array:
        """Convolves `x[B, H, W, channels_in]`."""
        kernel, bias = (leaf[...].astype(self.dtype) for leaf in (self.kernel, self.bias))
        return _convolve(x.astype(self.dtype), kernel) + bias


def _floating(dtype: DTypeLike) -> jnp.dtype:
    """The type of a layer's arithmetic, checked: in integers every weight would silently be 0."""
    check_floating(dtype=jax.ShapeDtypeStruct((), dtype))
    return jnp.dtype(dtype)


def _xavier(gain: float, inputs: int | tuple[int, ...], outputs: int | tuple[int, ...]) -> Init:
    if gain == 0:
        return jax.nn.initializers.zeros
    return jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform", inputs, outputs)


@jax.checkpoint  # so that only the arguments are kept for the gradient, whichever branch runs
def _convolve(x: Array, kernel: Array) -> Array:
    # On CPU a convolution's gradient is some 60 times slower than this product inside a loop or under vmap.
    return jax.lax.platform_dependent(x, kernel, cpu=_convolve_as_product, default=_convolve_natively)


def _convolve_natively(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_as_product(x: Array, kernel: Array) -> Array:
    window, height, width = kernel.shape[0], x.shape[1], x.shape[2]
    margin = window // 2
    padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(window) for j in range(window)]
    rows = jnp.concatenate(shifted, -1).reshape(-1, window**2 * x.shape[-1])
    return (rows @ kernel.reshape(rows.shape[-1], -1)).reshape(*x.shape[:-1], -1)


class SelfAttention(nnx.Module):
    """Multi-head attention of tokens to one another, `[B, N, width] -> [B, N, width]`; softmax in float32 at least.

    Raises:
      ValueError: `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, *, gain: float = 1.0, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Draws the parameters."""
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        embed, kv = ("embed",), width // heads
        # One product for query, key and value; heads first, so that a split over heads is a split of columns.
        axes = embed, ("heads", None, "kv")
        self.qkv = Dense((width,), (heads, 3, kv), axes, dtype=dtype, rngs=rngs)
        axes = ("heads", "kv"), embed
        self.projection = Dense((heads, kv), (width,), axes, gain=gain, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps tokens `x[B, N, width]`."""
        query, key, value = (part.squeeze(3) for part in jnp.split(self.qkv(x), 3, axis=3))
        precise = jnp.promote_types(query.dtype, jnp.float32)
        query = query * query.shape[-1] ** -0.5
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=precise)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return self.projection(jnp.einsum("bhqk,bkhd->bqhd", weights, value))


def standardize(x: Array, axes: int | tuple[int, ...] = -1) -> Array:
    """Zero mean and unit variance over `axes`, without scale or offset, in float32 at least; eps is 1e-6."""
    x = at_least_float32(x)
    # The variance of the difference, not E[x^2] - E[x]^2: more exact, and twice as fast to differentiate on CPU.
    centered = x - x.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + 1e-6)


def sinusoid(values: Array, n: int, scale: float = 1.0, max_period: float = 1e4) -> Array:
    """`[cos(scale v w_i), sin(scale v w_i)]` with `w_i = max_period^(-2i/n)` for `i < n/2`: `[B] -> [B, n]`, float32.

    Reference: Attention Is All You Need, arXiv:1706.03762.
    """
    values = at_least_float32(values)
    frequencies = scale * max_period ** (-2 * jnp.arange(n // 2) / n)
    angles = values[:, None] * frequencies.astype(values.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Conditioning(nnx.Module):
    """One vector for noise level and class: `W_2 SiLU(W_1 sinusoid(100 noise_level)) + table[label]`.

    Levels are expected to span a few units, like `log(sigma) / 4` or a time in `[0, 1]`: the fastest sinusoid turns
    once per 0.06 of a unit, which is a factor of 1.3 in sigma. The last row of the table is the null class, "no class".
    """

    def __init__(
        self, width: int, classes: int, *, frequencies: int = 256, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        """Draws the parameters."""
        names: Names = ("frequencies",)
        self.hidden = Dense((frequencies,), (width,), (names, ("mlp",)), init=SMALL, dtype=dtype, rngs=rngs)
        self.out = Dense((width,), (width,), (("mlp",), ("embed",)), init=SMALL, dtype=dtype, rngs=rngs)
        self.table = parameter(SMALL(rngs.params(), (classes + 1, width), jnp.float32), ("classes", "embed"))
        self.frequencies, self.classes = frequencies, classes

    def __call__(self, noise_level: Array, label: Array | None, batch: int) -> Array:
        """Maps `(noise_level[B], label[B])` to `[B, width]`; no label is the null class, a wrong one gives NaN."""
        noise_level = jnp.asarray(noise_level)
        if noise_level.shape != (batch,):
            raise ValueError(f"noise_level must have shape ({batch},) like the batch of x, got {noise_level.shape}")
        label = jnp.full(batch, self.classes) if label is None else jnp.asarray(label)
        if label.shape != (batch,) or not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(f"label must be integers of shape ({batch},), got {label.dtype} of {label.shape}")
        level = self.out(jax.nn.silu(self.hidden(sinusoid(noise_level, self.frequencies, scale=100.0))))
        # A gather clamps by default: a wrong label would silently be another class.
        rows = jnp.asarray(self.table[...]).at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return level + rows.astype(level.dtype)


def check_images(x: Array, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError unless `x` is floating and has the shape `[B, *shape]`."""
    check_floating(x=x)
    if x.ndim != 4 or x.shape[1:] != shape:
        raise ValueError(f"x must have shape [B, {', '.join(map(str, shape))}], got {x.shape}")


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Raises a ValueError, `width must be an integer of at least 1, got 0`, unless all sizes are."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")

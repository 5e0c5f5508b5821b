r"""A small convolutional U-Net in EDM's manner, with explicit skips."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from esscher.models.functional import parameter
from esscher.models.layers import Conditioning, Conv, Dense, SelfAttention, check_images, check_sizes, standardize

__all__ = ["GroupNorm", "ResidualBlock", "UNet"]

_NEAR_ZERO = 1e-5  # gain of what a residual branch ends with, so that blocks start near a multiple of the identity


class GroupNorm(nnx.Module):
    """Normalisation over space and groups of at least four channels, then a scale and an offset, in float32."""

    def __init__(self, channels: int):
        """Makes scales of one and offsets of zero."""
        self.groups = next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
        self.scale = parameter(jnp.ones(channels), ("channels_in",))
        self.bias = parameter(jnp.zeros(channels), ("channels_in",))

    def __call__(self, x: Array) -> Array:
        """Maps `x[B, H, W, C]`."""
        groups = x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        return standardize(groups, (1, 3)).reshape(x.shape) * self.scale[...] + self.bias[...]


class ResidualBlock(nnx.Module):
    r"""Two convolutions around a residual, optionally at another resolution, optionally followed by self-attention.

        h = Conv(SiLU(GN(x))),   h = Conv(SiLU(GN(h) (1 + scale) + shift)),   x = (h + Skip(x)) / sqrt(2)
        x = (Attention(GN(x)) + x) / sqrt(2)

    with `(scale, shift) = Linear(c)`. Resampling, by means or copies of 2 x 2 pixels, precedes the first convolution
    and the skip; the skip is a 1 x 1 convolution when channels or resolution change.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        condition: int,
        *,
        resample: str | None = None,
        attention: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters; `resample` is "down", "up" or None."""

        def conv(a: int, b: int, window: int = 3, gain: float = 1.0) -> Conv:
            return Conv(a, b, window=window, gain=gain, dtype=dtype, rngs=rngs)

        self.resample = resample
        self.norm_in, self.conv_in = GroupNorm(channels_in), conv(channels_in, channels_out)
        axes = ("embed",), (None, "channels_out")
        self.modulation = Dense((condition,), (2, channels_out), axes, dtype=dtype, rngs=rngs)
        self.norm_out, self.conv_out = GroupNorm(channels_out), conv(channels_out, channels_out, gain=_NEAR_ZERO)
        self.skip = conv(channels_in, channels_out, 1) if resample or channels_in != channels_out else None
        self.norm = GroupNorm(channels_out) if attention else None
        self.attention = SelfAttention(channels_out, 1, gain=_NEAR_ZERO, dtype=dtype, rngs=rngs) if attention else None

    def __call__(self, x: Array, condition: Array) -> Array:
        """Maps `x[B, H, W, channels_in]` under `condition[B, width]`."""
        scale, shift = (part[:, None] for part in jnp.split(self.modulation(condition), 2, axis=1))
        h = self.conv_in(_resample(jax.nn.silu(self.norm_in(x)), self.resample))
        h = self.conv_out(jax.nn.silu(self.norm_out(h) * (1 + scale) + shift))
        x = _resample(x, self.resample)
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention is None:
            return x
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return (self.attention(tokens).reshape(x.shape) + x) * math.sqrt(0.5)


def _resample(x: Array, how: str | None) -> Array:
    if how == "down":
        return reduce(x, "b (h 2) (w 2) c -> b h w c", "mean")
    return repeat(x, "b h w c -> b (h 2) (w 2) c") if how == "up" else x


class UNet(nnx.Module):
    """Class-conditional U-Net `(x, noise_level, label) -> [B, H, W, C]`, with the call of `dit.DiT`.

    Going down, the output of the first convolution and of every block is kept; going up, every block but those that
    enlarge the image first takes one of them, last in first out, as further channels. The output is zero at
    initialisation.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        channels: int = 1,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[int, ...] | None = None,
        classes: int = 10,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          image_size: height and width, a multiple of 2 per level below the first.
          channels: of the image, in and out.
          width: channels at the finest level, at least 4.
          multipliers: channels of each level from fine to coarse, in multiples of `width`.
          blocks: residual blocks per level going down; there is one more going up.
          attention: resolutions, of those of the levels, at which blocks end with self-attention; by default 8, if a
            level has it. The coarsest point of the network always does.
          classes: number of classes; label `classes` is the null class.
          dtype: of the arithmetic; parameters are float32.
          rngs: Flax's random streams.

        Raises:
          ValueError: sizes that are not positive integers (`classes` may be 0) or do not divide, a `width` below 4, no
            levels, an `attention` at a resolution that no level has, a `dtype` that is not floating.
        """
        check_sizes(image_size=image_size, channels=channels, blocks=blocks)
        check_sizes(4, width=width)
        check_sizes(0, classes=classes)
        _check_levels(image_size, multipliers, attention or ())
        attention = (8,) if attention is None else attention
        self.image_size, self.channels = image_size, channels
        self.conditioning = Conditioning(4 * width, classes, dtype=dtype, rngs=rngs)
        self.input = Conv(channels, width, dtype=dtype, rngs=rngs)
        self.down, self.middle, self.up = (
            nnx.List([ResidualBlock(condition=4 * width, dtype=dtype, rngs=rngs, **sizes) for sizes in part])
            for part in _layout(image_size, width, multipliers, blocks, attention)
        )
        finest = width * multipliers[0]
        self.norm, self.out = GroupNorm(finest), Conv(finest, channels, gain=0.0, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_level: Array, label: Array | None = None) -> Array:
        """Runs the network; arguments, value and errors as in `dit.DiT`."""
        check_images(x, (self.image_size, self.image_size, self.channels))
        condition = jax.nn.silu(self.conditioning(noise_level, label, x.shape[0]))
        h = self.input(x)
        kept = [h]
        for block in self.down:
            h = block(h, condition)
            kept.append(h)
        for block in self.middle:
            h = block(h, condition)
        for block in self.up:
            h = h if block.resample else jnp.concatenate([h, kept.pop()], axis=-1)
            h = block(h, condition)
        return self.out(jax.nn.silu(self.norm(h))).astype(x.dtype)


def _check_levels(image_size: int, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> None:
    for name, values in (("multipliers", multipliers), ("attention", attention)):
        if not isinstance(values, (tuple, list)):
            raise ValueError(f"{name} must be a tuple, got {values!r}")
    if not multipliers:
        raise ValueError("multipliers must have one entry per level, got none")
    check_sizes(**{f"multipliers[{level}]": multiplier for level, multiplier in enumerate(multipliers)})
    divisor = 2 ** (len(multipliers) - 1)
    if image_size % divisor:
        raise ValueError(f"image_size must be a multiple of {divisor}, got {image_size}")
    resolutions = tuple(image_size >> level for level in range(len(multipliers)))
    if not set(attention) <= set(resolutions):
        raise ValueError(f"attention must be at resolutions among {resolutions}, got {attention}")


def _layout(
    image_size: int, width: int, multipliers: tuple[int, ...], blocks: int, attention: tuple[int, ...]
) -> tuple[list[dict], list[dict], list[dict]]:
    """Arguments of the blocks going down, in the middle and going up."""
    down, up, kept, channels = [], [], [width], width

    def block(read: int, write: int, **kwargs: Any) -> dict:
        return {"channels_in": read, "channels_out": write} | kwargs

    levels = [(width * m, image_size >> level in attention) for level, m in enumerate(multipliers)]
    for level, (level_channels, attends) in enumerate(levels):
        if level > 0:
            down.append(block(channels, channels, resample="down"))
            kept.append(channels)
        for _ in range(blocks):
            down.append(block(channels, level_channels, attention=attends))
            channels = level_channels
            kept.append(channels)
    middle = [block(channels, channels, attention=True), block(channels, channels)]
    for level, (level_channels, attends) in reversed(list(enumerate(levels))):
        if level < len(levels) - 1:
            up.append(block(channels, channels, resample="up"))
        for i in range(blocks + 1):
            up.append(block(channels + kept.pop(), level_channels, attention=attends and i == blocks))
            channels = level_channels
    return down, middle, up

r"""The diffusion transformer with adaLN-zero conditioning: matrix products only, so it is fast on every device."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from esscher.models.functional import stack, unstack
from esscher.models.layers import Conditioning, Dense, SelfAttention, check_images, check_sizes, sinusoid, standardize

__all__ = ["Block", "DiT", "patchify", "positions", "unpatchify"]


class Block(nnx.Module):
    r"""One transformer block, the identity at initialisation.

        x += g1 Attention( LN(x) (1 + s1) + b1 )
        x += g2 MLP(       LN(x) (1 + s2) + b2 ),    (b1, s1, g1, b2, s2, g2) = Linear(SiLU(c))

    with GELU (tanh form) in the MLP, layer norms without parameters, and zero weights in the modulation.
    """

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Draws the parameters."""
        embed, mlp = ("embed",), ("mlp",)

        def dense(inputs, outputs, *axes, gain=1.0):
            return Dense(inputs, outputs, axes, gain=gain, dtype=dtype, rngs=rngs)

        self.modulation = dense((width,), (6, width), embed, (None, "modulation"), gain=0.0)
        self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
        self.hidden = dense((width,), (4 * width,), embed, mlp)
        self.out = dense((4 * width,), (width,), mlp, embed)

    def __call__(self, x: Array, condition: Array) -> Array:
        """Maps tokens `x[B, N, width]` under `SiLU(c) = condition[B, width]`."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulations(self.modulation, condition)
        x = x + gate_1 * self.attention(standardize(x) * (1 + scale_1) + shift_1)
        hidden = jax.nn.gelu(self.hidden(standardize(x) * (1 + scale_2) + shift_2), approximate=True)
        return x + gate_2 * self.out(hidden)


def _modulations(layer: Dense, condition: Array) -> list[Array]:
    return jnp.split(layer(condition), layer.outputs[0], axis=1)  # each [B, 1, width], the same for all tokens


class DiT(nnx.Module):
    """Class-conditional diffusion transformer `(x, noise_level, label) -> [B, H, W, C]`.

    Its output is zero at initialisation. With the defaults (handwritten digits of 8 x 8) it has 723,844 parameters.

    Reference: Scalable Diffusion Models with Transformers, arXiv:2212.09748.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        channels: int = 1,
        patch: int = 2,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          image_size: height and width, a multiple of `patch`.
          channels: of the image, in and out.
          patch: height and width of a token.
          width: of the residual stream, a multiple of 4 and of `heads`.
          depth: number of blocks.
          heads: of the attention.
          classes: number of classes; label `classes` is the null class.
          dtype: of the arithmetic; parameters are float32.
          rngs: Flax's random streams.

        Raises:
          ValueError: sizes that are not positive integers (`classes` may be 0) or do not divide, a `dtype` that is not
            floating.
        """
        check_sizes(image_size=image_size, channels=channels, patch=patch, width=width, depth=depth, heads=heads)
        check_sizes(0, classes=classes)
        for name, value, divisor in (("image_size", image_size, patch), ("width", width, 4)):
            if value % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        self.image_size, self.channels, self.patch = image_size, channels, patch
        pixels, embed = patch**2 * channels, ("embed",)
        self.patch_embedding = Dense((pixels,), (width,), (("patch",), embed), dtype=dtype, rngs=rngs)
        self.conditioning = Conditioning(width, classes, dtype=dtype, rngs=rngs)
        self.blocks = stack(functools.partial(Block, width, heads, dtype=dtype), depth, rngs)
        axes = (embed, (None, "modulation"))
        self.modulation = Dense((width,), (2, width), axes, gain=0.0, dtype=dtype, rngs=rngs)
        self.out = Dense((width,), (pixels,), (embed, ("patch",)), gain=0.0, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_level: Array, label: Array | None = None) -> Array:
        """Runs the network.

        Args:
          x: images, `[B, image_size, image_size, channels]`.
          noise_level: `[B]`, whatever scalar tells the levels apart; `log(sigma)/4` under EDM preconditioning.
          label: integers in `[0, classes]`, `[B]`; all null if absent. Any other integer gives NaN for its example.

        Returns:
          `[B, image_size, image_size, channels]` in the dtype of `x`.

        Raises:
          ValueError: wrong shapes, images that are not floating, or labels that are not integers.
        """
        check_images(x, (self.image_size, self.image_size, self.channels))
        condition = jax.nn.silu(self.conditioning(noise_level, label, x.shape[0]))
        tokens = self.patch_embedding(patchify(x, self.patch))
        tokens = tokens + positions(self.image_size // self.patch, tokens.shape[-1]).astype(tokens.dtype)
        return unpatchify(self.trunk(tokens, condition), self.patch, self.channels).astype(x.dtype)

    def trunk(self, tokens: Array, condition: Array) -> Array:
        """All that happens to tokens `[B, N, width]` once they know their position: blocks and the final layer."""
        for block in unstack(self.blocks):
            tokens = block(tokens, condition)
        shift, scale = _modulations(self.modulation, condition)
        return self.out(standardize(tokens) * (1 + scale) + shift)


def patchify(x: Array, patch: int) -> Array:
    """Cuts images `[B, H, W, C]` into tokens `[B, (H/p)(W/p), p p C]`, row by row."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Array, patch: int, channels: int) -> Array:
    """Puts the tokens of a square image together again, the inverse of `patchify`."""
    side = round(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=patch, q=patch, c=channels)


def positions(side: int, width: int) -> Array:
    """Fixed positions of a square of tokens, `[side side, width]`: sinusoids of the column, then of the row."""
    line = sinusoid(jnp.arange(side), width // 2)
    line = jnp.roll(line, width // 4, axis=-1)  # sine before cosine, unlike in the embedding of the noise level
    shape = (side, side, width // 2)
    columns, rows = jnp.broadcast_to(line, shape), jnp.broadcast_to(line[:, None], shape)
    return jnp.concatenate([columns, rows], -1).reshape(side**2, width)

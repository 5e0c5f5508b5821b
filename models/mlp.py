"""A small network for points in `R^D`, conditioned on noise level and class: toy problems, exact testbeds."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from esscher.core.arrays import check_floating
from esscher.models.layers import Conditioning, Dense, check_sizes

__all__ = ["MLP"]


class MLP(nnx.Module):
    r"""Multilayer perceptron `(x, noise_level, label) -> [B, D]`, zero at initialisation.

        h_0 = W_0 x,    h_i = SiLU(W_i h_{i-1} + V_i c),    output = W h_depth

    with `c` the vector of `layers.Conditioning`.
    """

    def __init__(
        self,
        *,
        dimension: int = 2,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          dimension: of the points.
          width: of the hidden layers.
          depth: number of hidden layers.
          classes: number of classes; label `classes` is the null class, the only one by default.
          dtype: of the arithmetic; parameters are float32.
          rngs: Flax's random streams.

        Raises:
          ValueError: sizes that are not positive integers (`classes` may be 0), or a `dtype` that is not floating.
        """
        check_sizes(dimension=dimension, width=width, depth=depth)
        check_sizes(0, classes=classes)

        def dense(inputs, outputs, *axes, gain=1.0):
            return Dense((inputs,), (outputs,), axes, gain=gain, dtype=dtype, rngs=rngs)

        point, embed, mlp = ("patch",), ("embed",), ("mlp",)
        self.dimension = dimension
        self.conditioning = Conditioning(width, classes, dtype=dtype, rngs=rngs)
        self.input = dense(dimension, width, point, embed)
        self.hidden = nnx.List([dense(width, width, embed, mlp) for _ in range(depth)])
        self.modulation = nnx.List([dense(width, width, embed, mlp) for _ in range(depth)])
        self.out = dense(width, dimension, embed, point, gain=0.0)

    def __call__(self, x: Array, noise_level: Array, label: Array | None = None) -> Array:
        """Runs the network.

        Args:
          x: points, `[B, dimension]`.
          noise_level: `[B]`, see `layers.Conditioning`.
          label: integers in `[0, classes]`, `[B]`; all null if absent. Any other integer gives NaN for its example.

        Returns:
          `[B, dimension]` in the dtype of `x`.

        Raises:
          ValueError: wrong shapes, points that are not floating, or labels that are not integers.
        """
        check_floating(x=x)
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x must have shape [B, {self.dimension}], got {x.shape}")
        condition = self.conditioning(noise_level, label, x.shape[0])
        h = self.input(x)
        for hidden, modulation in zip(self.hidden, self.modulation, strict=True):
            h = jax.nn.silu(hidden(h) + modulation(condition))
        return self.out(h).astype(x.dtype)

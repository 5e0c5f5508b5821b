r"""Rotary positions: each pair of coordinates of a query or key turns by an angle proportional to its position."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Rope", "angles", "frequencies", "rotate"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """How fast the pairs turn: `theta^(-2j/D)`, and how that is stretched to contexts longer than those of pretraining.

    Scalings: "linear" divides every frequency by `factor`. "llama3" does so for wavelengths beyond
    `original_length / low_frequency`, not below `original_length / high_frequency`, and blends between. "yarn" does so
    for pairs that turn fewer than `beta_slow` times in the original length, not for those that turn more than
    `beta_fast` times, blends between, and multiplies queries and keys by `attention_factor`.

    Reference: YaRN: Efficient Context Window Extension of Large Language Models, arXiv:2309.00071.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # of yarn; `0.1 log(factor) + 1` if absent


def frequencies(rope: Rope, dimension: int) -> np.ndarray:
    """Radians per position of each pair of coordinates, `[dimension / 2]`, float32."""
    exponents = np.arange(0, dimension, 2, dtype=np.float64) / dimension
    plain = rope.theta**-exponents
    stretched = plain / rope.factor
    match rope.scaling:
        case "none":
            chosen = plain
        case "linear":
            chosen = stretched
        case "llama3":
            turns = rope.original_length * plain / (2 * math.pi)
            blend = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
            chosen = (1 - blend) * stretched + blend * plain
        case "yarn":
            fast, slow = (
                dimension * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                for turns in (rope.beta_fast, rope.beta_slow)
            )
            low, high = max(math.floor(fast), 0), min(math.ceil(slow), dimension - 1)
            ramp = np.clip((np.arange(dimension // 2) - low) / max(high - low, 1e-3), 0, 1)
            chosen = ramp * stretched + (1 - ramp) * plain
        case _:
            raise ValueError(f'scaling must be "none", "linear", "llama3" or "yarn", got {rope.scaling!r}')
    return chosen.astype(np.float32)


def angles(rope: Rope, dimension: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of each pair's angle, `positions[B, T] -> [B, T, dimension / 2]` twice, float32."""
    turned = positions[..., None].astype(jnp.float32) * frequencies(rope, dimension)
    factor = 1.0
    if rope.scaling == "yarn":
        factor = rope.attention_factor or 0.1 * math.log(max(rope.factor, 1)) + 1
    return factor * jnp.cos(turned), factor * jnp.sin(turned)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Turns queries or keys: `[B, T, H, D]` by `[B, T, D/2]`; a pair is a coordinate of each half of `D`.

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
    """
    cosine, sine = (part[:, :, None].astype(x.dtype) for part in (cosine, sine))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

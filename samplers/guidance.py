"""Guidance: functions from predictors to a predictor; everywhere `w = 0` is unconditional and `w = 1` conditional."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from esscher.core.arrays import expand_like
from esscher.core.contracts import Prediction, Predictor
from jax import Array

__all__ = ["cfg"]

Weight = float | Array | Callable[[Array], Array]
"""A guidance weight: a scalar, one per example `[B]`, or a function of time `t[B] -> [B]`."""


def _weight(w: Weight, t: Array, x: Array) -> Array:
    w = jnp.asarray(w(t) if callable(w) else w)
    if w.shape not in ((), x.shape[:1]):
        raise ValueError(f"w must be a scalar or have shape {x.shape[:1]}, one weight per example, got {w.shape}")
    return expand_like(w, x)


def cfg(cond: Predictor, uncond: Predictor, w: Weight) -> Predictor:
    """Classifier-free guidance: `out = uncond + w (cond - uncond)`, on both terms of the prediction.

    With a weaker model in the place of `uncond` it is autoguidance; with a base and an aligned model it slides between
    them. It does not sample `p_uncond^(1-w) p_cond^w` (see `core.exact.gaussians.cfg_law` for what it samples).

    Args:
      cond: conditional predictor.
      uncond: unconditional (or weaker) predictor.
      w: guidance weight: a scalar, `[B]`, or a function of time such as `interval`.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`.

    Reference: Classifier-Free Diffusion Guidance, arXiv:2207.12598.
    """

    def predict(x: Array, t: Array) -> Prediction:
        weight = _weight(w, t, x)
        return jax.tree.map(lambda u, c: u + weight * (c - u), uncond(x, t), cond(x, t))

    return predict

r"""EDM preconditioning: a raw network becomes a denoiser, and one denoiser serves every noise schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_known, check_per_example, expand_like
from esscher.core.contracts import Prediction, Predictor
from esscher.core.schedules import Schedule

__all__ = ["Denoiser", "denoiser_predictor", "edm_denoiser"]

Denoiser = Callable[..., Array]
"""`(params, x[B, ...], sigma[B], *conditions) -> E[x_0 | x_0 + sigma eps = x]`."""


def edm_denoiser(apply: Callable[..., Array], sigma_data: float | Array = 0.5) -> Denoiser:
    r"""Wraps a network `F` so that its inputs and its training target have unit variance at every noise level.

        D(x, s) = c_skip x + c_out F(c_in x, log(s) / 4)
        c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2),  d = sigma_data

    At `sigma = 0` the denoiser is the identity, exactly, with finite derivatives.

    Args:
      apply: the network, `(params, x[B, ...], noise_level[B], *conditions) -> [B, ...]`.
      sigma_data: standard deviation of the data, positive.

    Returns:
      `denoise(params, x[B, ...], sigma, *conditions)`, of the shape and dtype of `x`; `sigma` is `[B]` or a scalar, any
      other shape raises a ValueError, as does an `x` that is not floating.

    Raises:
      ValueError: `sigma_data` is not above 0, where that is known.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """

    check_known(lambda d: d > 0, "above 0", sigma_data=sigma_data)

    def denoise(params: Any, x: Array, sigma: Array, *conditions: Any) -> Array:
        sigma = _one_per_example("sigma", sigma, x)
        variance = jnp.square(sigma) + jnp.square(sigma_data)
        scale = jax.lax.rsqrt(variance)
        # The network is not asked about zero noise: there its output counts for nothing, but must be finite.
        noise_level = jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)) / 4
        residual = apply(params, expand_like(scale, x) * x, noise_level, *conditions)
        skip, gain = jnp.square(sigma_data) / variance, sigma * sigma_data * scale
        return (expand_like(skip, x) * x + expand_like(gain, x) * residual).astype(x.dtype)

    return denoise


def denoiser_predictor(denoise: Callable[[Array, Array], Array], schedule: Schedule) -> Predictor:
    r"""Lets a denoiser of `x_0 + sigma eps` predict under any schedule, at the noise-to-signal ratio `sigma / alpha`.

        data = D(x / alpha, sigma / alpha),   noise = (x - alpha data) / sigma,   and noise = 0 where sigma = 0

    The ratio is at most 10,000: with it in place of the infinite one at `alpha = 0`, grids may begin at pure noise.
    There a denoiser is asked far beyond the levels that most are trained on, so it must know that it sees noise only.

    Args:
      denoise: `(x[B, ...], sigma[B]) -> E[x_0 | x]`, with parameters and conditions bound.
      schedule: the noise schedule of the states to predict from.

    Returns:
      A predictor of floating states; its time may be a scalar.
    """

    def predict(x: Array, t: Array) -> Prediction:
        t = _one_per_example("t", t, x)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        clipped = jnp.maximum(alpha, 1e-4 * sigma)
        data = denoise(x / expand_like(clipped, x).astype(x.dtype), sigma / clipped)
        # Two wheres: the first keeps the division, and with it the gradient, finite at sigma = 0.
        noise = (x - expand_like(alpha, x) * data) / expand_like(jnp.where(sigma > 0, sigma, 1), x)
        return Prediction(data, jnp.where(expand_like(sigma, x) > 0, noise, 0).astype(x.dtype))

    return predict


def _one_per_example(name: str, values: Array, x: Array) -> Array:
    check_floating(x=x)
    check_per_example(x, **{name: values})
    return jnp.broadcast_to(at_least_float32(values), x.shape[:1])

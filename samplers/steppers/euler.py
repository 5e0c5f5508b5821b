"""Solvers of the probability-flow ODE `dx/dt = alpha' D + sigma' eps` in time itself."""

import math

import jax
import jax.numpy as jnp
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from jax import Array

__all__ = ["edm_stochastic", "euler", "heun"]


def _velocity(prediction: Prediction, t: Array, schedule: Schedule) -> Array:
    return schedule.alpha_dot(t) * prediction.data + schedule.sigma_dot(t) * prediction.noise


def _heun_step(x: Array, prediction: Prediction, t: Array, s: Array, predictor: Predictor, schedule: Schedule) -> Array:
    slope = _velocity(prediction, t, schedule)
    euler = x + (s - t) * slope

    def correct(euler: Array) -> Array:
        end = predictor(euler.astype(x.dtype), jnp.broadcast_to(s, x.shape[:1]))
        return x + 0.5 * (s - t) * (slope + _velocity(end, s, schedule))

    return jax.lax.cond(schedule.sigma(s) > 0, correct, lambda euler: euler, euler)


def euler(schedule: Schedule) -> Stepper:
    """Euler's method in time, first order; on `ve`, `edm` and `rectified_flow` it is DDIM.

    Reference: Score-Based Generative Modeling through SDEs, arXiv:2011.13456.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        return x + (s - t) * _velocity(prediction, t, schedule), carry

    return Stepper(lambda x: (), step)


def heun(schedule: Schedule) -> Stepper:
    """Heun's method in time, second order, two evaluations a step and one in the last step to `sigma = 0`.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        return _heun_step(x, prediction, t, s, predictor, schedule), carry

    return Stepper(lambda x: (), step)


def edm_stochastic(
    schedule: Schedule,
    n: int,
    churn: float | Array = 40.0,
    sigma_low: float | Array = 0.05,
    sigma_high: float | Array = 50.0,
    noise_scale: float | Array = 1.003,
) -> Stepper:
    r"""EDM's stochastic sampler (Algorithm 2) on `ve` or `edm`: raise the noise a little, then take Heun's step down.

    `t^ = t (1 + min(churn / n, sqrt 2 - 1))` while `sigma_low <= t <= sigma_high`, else `t^ = t`;
    `x^ = x + sqrt(t^^2 - t^2) noise_scale z`. Without churn it is `heun`. The prediction at `(x, t)` is not used, and
    under `jit` not computed; two evaluations a step are.

    Args:
      schedule: `ve` or `edm`, where time is the noise level.
      n: number of steps of the grid.
      churn: total amount of added noise.
      sigma_low: no noise is added below this level.
      sigma_high: nor above this one.
      noise_scale: inflation of the added noise.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        active = (t >= sigma_low) & (t <= sigma_high)
        t_hat = t * (1 + jnp.where(active, jnp.minimum(churn / n, math.sqrt(2) - 1), 0.0))
        noise = noise_scale * jax.random.normal(key, x.shape, x.dtype)
        x_hat = (x + jnp.sqrt(t_hat**2 - t**2) * noise).astype(x.dtype)
        prediction = predictor(x_hat, jnp.broadcast_to(t_hat, x.shape[:1]))
        return _heun_step(x_hat, prediction, t_hat, s, predictor, schedule), carry

    return Stepper(lambda x: (), step)

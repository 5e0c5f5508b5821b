"""Solvers of the probability-flow ODE `dx/dt = alpha' D + sigma' eps` in time itself.

The state a step starts from is put together as `alpha_t D + sigma_t eps`: the state itself for a plain model, and what
makes CFG++ work, whose two terms do not add up to the state.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import check_known, is_known, safe_sqrt
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import standard_normal

__all__ = ["edm_stochastic", "euler", "heun"]


def _start(prediction: Prediction, t: Array, schedule: Schedule) -> Array:
    return schedule.alpha(t) * prediction.data + schedule.sigma(t) * prediction.noise


def _velocity(prediction: Prediction, t: Array, schedule: Schedule) -> Array:
    return schedule.alpha_dot(t) * prediction.data + schedule.sigma_dot(t) * prediction.noise


def _heun_step(x: Array, prediction: Prediction, t: Array, s: Array, predictor: Predictor, schedule: Schedule) -> Array:
    start, slope = _start(prediction, t, schedule), _velocity(prediction, t, schedule)
    euler = start + (s - t) * slope
    noisy = schedule.sigma(s) > 0
    end_time = jnp.where(noisy, s, t)  # under vmap over times both branches are computed, and sigma' may be inf at 0

    def correct(euler: Array) -> Array:
        end = predictor(euler.astype(x.dtype), jnp.broadcast_to(end_time, x.shape[:1]))
        return (start + 0.5 * (s - t) * (slope + _velocity(end, end_time, schedule))).astype(euler.dtype)

    return jax.lax.cond(noisy, correct, lambda euler: euler, euler)


def euler(schedule: Schedule) -> Stepper:
    """Euler's method in time, first order; on `ve`, `edm` and `rectified_flow` it is DDIM.

    `x_s = x + (s - t) (alpha' D + sigma' eps)`. One evaluation a step; it may start at `alpha = 0`.

    Reference: Score-Based Generative Modeling through SDEs, arXiv:2011.13456.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        return _start(prediction, t, schedule) + (s - t) * _velocity(prediction, t, schedule), carry

    return Stepper(lambda x: (), step)


def heun(schedule: Schedule) -> Stepper:
    """Heun's method in time, second order: the mean of the velocities at both ends of an Euler step.

    Two evaluations a step, one in the last step to `sigma = 0`. It may start at `alpha = 0`.

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
    not computed once compiled; two evaluations a step are, one in the last step to `sigma = 0`.

    Args:
      schedule: `ve` or `edm`, where time is the noise level.
      n: number of steps of the grid, at least 1.
      churn: total amount of added noise, at least 0.
      sigma_low: no noise is added below this level.
      sigma_high: nor above this one.
      noise_scale: inflation of the added noise.

    Raises:
      ValueError: where it is known, a schedule whose `alpha` is not 1, `n` below 1 or a negative `churn`.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    with jax.ensure_compile_time_eval():  # known under `jit` too, but for a schedule that is itself traced
        alpha = schedule.alpha(jnp.asarray(0.5))
    if is_known(alpha) and np.asarray(alpha) != 1:
        raise ValueError(f"schedule must be ve or edm, whose alpha is 1, got alpha(0.5) = {alpha}")
    check_known(lambda n: n >= 1, "at least 1", n=n)
    check_known(lambda churn: churn >= 0, "at least 0", churn=churn)

    def step(key, x, prediction, t, s, carry, predictor):
        active = (t >= sigma_low) & (t <= sigma_high)
        gamma = jnp.where(active, jnp.minimum(churn / n, math.sqrt(2) - 1), 0.0)
        t_hat = t * (1 + gamma)
        added = t * safe_sqrt(gamma * (2 + gamma))  # sqrt(t_hat^2 - t^2)
        x_hat = (x + added * noise_scale * standard_normal(key, x)).astype(x.dtype)
        prediction = predictor(x_hat, jnp.broadcast_to(t_hat, x.shape[:1]))
        return _heun_step(x_hat, prediction, t_hat, s, predictor, schedule), carry

    return Stepper(lambda x: (), step)

r"""DPM-Solver++(2M), deterministic and stochastic: second order at one evaluation a step, thanks to the previous one.

With CFG++ the previous data term is the one that goes with its noise term, the unconditional one.
"""

import jax.numpy as jnp

from esscher.core.contracts import Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import (
    History,
    first_order,
    implied_data,
    noise_levels,
    standard_normal,
    step_coefficients,
)

__all__ = ["dpm_solver_pp_2m", "sde_dpm_solver_pp_2m"]


def dpm_solver_pp_2m(schedule: Schedule) -> Stepper:
    r"""DPM-Solver++(2M): `x_s = alpha_s D + sigma_s eps + alpha_s (1 - e^(-h)) (D - D_prev) / (2 r)`, `r = h_prev / h`.

    First order in the first step, after a step from `alpha = 0`, and in the last step to `sigma = 0`. One evaluation a
    step; it may start at `alpha = 0`.

    Reference: DPM-Solver++, arXiv:2211.01095.
    """
    return _two_step(schedule, stochastic=False)


def sde_dpm_solver_pp_2m(schedule: Schedule) -> Stepper:
    r"""SDE-DPM-Solver++(2M): the reverse SDE, its first-order part being `ancestral`.

    `x_s = alpha_s D + sigma_s (e^(-h) eps + sqrt(1 - e^(-2h)) z) + alpha_s (1 - e^(-2h)) (D - D_prev) / (2 r)`,
    `r = h_prev / h`, without the last term in the steps that `dpm_solver_pp_2m` takes at first order. One evaluation a
    step; it may start at `alpha = 0`.

    Reference: DPM-Solver++, arXiv:2211.01095.
    """
    return _two_step(schedule, stochastic=True)


def _two_step(schedule: Schedule, *, stochastic: bool) -> Stepper:
    def step(key, x, prediction, t, s, history, predictor):
        c = step_coefficients(schedule, t, s)
        usable = (history.count > 0) & c.regular
        inverse_r = jnp.where(usable, c.finite_h / jnp.where(usable, c.lam - history.lam[0], 1.0), 0.0)
        decay = -jnp.expm1(-(2 if stochastic else 1) * c.h)
        x_s = c.alpha_s * decay * 0.5 * inverse_r * (prediction.data - history.data[0])
        if stochastic:
            kept, fresh = noise_levels(c, 1.0)
            noise = standard_normal(key, x)
            x_s += c.alpha_s * prediction.data + kept * prediction.noise + fresh * noise
        else:
            x_s += first_order(prediction, c)
        return x_s, history.push(implied_data(x, prediction, c), c)

    return Stepper(lambda x: History.empty(x, 1), step)

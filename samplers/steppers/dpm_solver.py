r"""DPM-Solver, single-step: exponential integrators in `lam = log(alpha / sigma)` of the noise term.

They solve `x_s = (alpha_s / alpha_t) x_t - alpha_s int e^(-lam) eps(x_lam) dlam` with the noise term expanded around
`t`. Where `alpha_t = 0` or `sigma_s = 0` the step in `lam` is infinite; there the first-order step is taken, so that
all may start at `alpha = 0` and end at `sigma = 0`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import check_known
from esscher.core.contracts import Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import StepCoefficients, first_order, phis, step_coefficients
from esscher.samplers.steppers.ddim import ddim

__all__ = ["dpm_solver_1", "dpm_solver_2", "dpm_solver_3"]


def dpm_solver_1(schedule: Schedule) -> Stepper:
    """DPM-Solver-1, which is deterministic DDIM: `x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps`.

    DPM-Solver++(1) is the same step too.

    Reference: DPM-Solver, arXiv:2206.00927.
    """
    return ddim(schedule)


def dpm_solver_2(schedule: Schedule, r1: float | Array = 0.5) -> Stepper:
    r"""DPM-Solver-2, second order: `x_s = DDIM - sigma_s (e^h - 1) (eps_1 - eps) / (2 r1)`, `eps_1` at `lam + r1 h`.

    Two evaluations a step, one in a step from `alpha = 0` or to `sigma = 0`.

    Args:
      schedule: the noise schedule.
      r1: where in the step the second evaluation is made, in `(0, 1]`.

    Raises:
      ValueError: `r1` is not, where it is known.

    Reference: DPM-Solver, arXiv:2206.00927.
    """
    check_known(lambda r: (r > 0) & (r <= 1), "in (0, 1]", r1=r1)

    def correction(c: StepCoefficients, change_at: Callable) -> Array:
        return jnp.expm1(c.finite_h) / (2 * r1) * change_at(r1, 0.0)

    return _single_step(schedule, correction)


def dpm_solver_3(schedule: Schedule, r1: float | Array = 1 / 3, r2: float | Array = 2 / 3) -> Stepper:
    r"""DPM-Solver-3, third order: `x_s = DDIM - (sigma_s / r2) ((e^h - 1)/h - 1) (eps_2 - eps)`.

    `eps_1` is taken at `lam + r1 h` after a first-order step, `eps_2` at `lam + r2 h` after a step corrected with it:
    `x_2 = DDIM - sigma_2 (r2 / r1) ((e^(r2 h) - 1)/(r2 h) - 1) (eps_1 - eps)`. Three evaluations a step, one in a step
    from `alpha = 0` or to `sigma = 0`.

    Args:
      schedule: the noise schedule.
      r1: where the second evaluation is made, in `(0, 1)`.
      r2: where the third is made, in `(0, 1)`; other values than 2/3 lower the order to 2.

    Raises:
      ValueError: `r1` or `r2` is outside `(0, 1)`, where it is known.

    Reference: DPM-Solver, arXiv:2206.00927.
    """
    check_known(lambda r: (r > 0) & (r < 1), "in (0, 1)", r1=r1, r2=r2)

    def correction(c: StepCoefficients, change_at: Callable) -> Array:
        z = r2 * c.finite_h
        inner = z * phis(2, z)[1] * (r2 / r1) * change_at(r1, 0.0)
        return c.finite_h * phis(2, c.finite_h)[1] / r2 * change_at(r2, inner)

    return _single_step(schedule, correction)


def _single_step(schedule: Schedule, correction: Callable) -> Stepper:
    """`DDIM - sigma_s correction`, where the correction asks for changes of the noise term inside the step."""

    def step(key, x, prediction, t, s, carry, predictor):
        c = step_coefficients(schedule, t, s)

        def change_at(r: float | Array, inner: float | Array) -> Array:
            """`eps - eps_t` at `lam + r h`, evaluated in the state `DDIM - sigma inner`."""
            middle = schedule.inverse_log_snr_half(c.lam + r * c.finite_h)
            alpha, sigma = schedule.alpha(middle), schedule.sigma(middle)
            state = alpha * prediction.data + sigma * (prediction.noise - inner)
            return predictor(state.astype(x.dtype), jnp.broadcast_to(middle, x.shape[:1])).noise - prediction.noise

        base = first_order(prediction, c)
        corrected = lambda base: (base - c.sigma_s * correction(c, change_at)).astype(base.dtype)  # noqa: E731
        return jax.lax.cond(c.regular, corrected, lambda base: base, base), carry

    return Stepper(lambda x: (), step)

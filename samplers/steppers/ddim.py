"""DDIM and its stochastic relatives: exact when the prediction does not change over the step."""

from jax import Array

from esscher.core.arrays import check_known
from esscher.core.contracts import Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import first_order, noise_levels, standard_normal, step_coefficients

__all__ = ["ancestral", "ddim"]


def ddim(schedule: Schedule, eta: float | Array | None = None) -> Stepper:
    r"""First-order step with noise `eta`: `x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z`.

    `c^2 = eta^2 sigma_s^2 (1 - e^(-2h))` is `eta^2` times the variance of `x_s` given `x_t` and `x_0`: 0 is the
    deterministic solver, 1 the ancestral sampler of DDPM. One evaluation a step; it may start at `alpha = 0`.

    Args:
      schedule: the noise schedule.
      eta: noise, in `[0, 1]`; None is 0 without the cost of drawing noise that is not used.

    Raises:
      ValueError: `eta` is outside `[0, 1]`, where it is known.

    Reference: Denoising Diffusion Implicit Models, arXiv:2010.02502.
    """
    if eta is not None:
        check_known(lambda eta: (eta >= 0) & (eta <= 1), "in [0, 1]", eta=eta)

    def step(key, x, prediction, t, s, carry, predictor):
        c = step_coefficients(schedule, t, s)
        if eta is None:
            return first_order(prediction, c), carry
        kept, fresh = noise_levels(c, eta)
        mean = c.alpha_s * prediction.data + kept * prediction.noise
        return mean + fresh * standard_normal(key, x), carry

    return Stepper(lambda x: (), step)


def ancestral(schedule: Schedule) -> Stepper:
    """DDPM's sampler: draws `x_s` from its law given `x_t` and `x_0 = D`, `ddim` with `eta = 1`.

    Exact in the limit of small steps, or of a posterior of `x_0` that is a point. One evaluation a step; it may start
    at `alpha = 0`.

    Reference: Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    """
    return ddim(schedule, eta=1.0)

"""DDIM and its stochastic relatives: exact when the prediction does not change over the step."""

import jax
import jax.numpy as jnp
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from jax import Array

__all__ = ["ancestral", "ddim"]


def ddim(schedule: Schedule, eta: float | Array = 0.0) -> Stepper:
    r"""First-order step with noise `eta`: `x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z`.

    `c^2 = eta^2 sigma_s^2 (1 - e^(-2h))` is `eta^2` times the variance of `x_s` given `x_t` and `x_0`: 0 is the
    deterministic solver, 1 the ancestral sampler of DDPM.

    Args:
      schedule: the noise schedule.
      eta: noise, in `[0, 1]`.

    Reference: Denoising Diffusion Implicit Models, arXiv:2010.02502.
    """

    def step(
        key: Array, x: Array, prediction: Prediction, t: Array, s: Array, carry: tuple, predictor: Predictor
    ) -> tuple[Array, tuple]:
        h = schedule.log_snr_half(s) - schedule.log_snr_half(t)
        variance = -(eta**2) * schedule.sigma(s) ** 2 * jnp.expm1(-2 * h)
        noise_scale = jnp.sqrt(jnp.maximum(schedule.sigma(s) ** 2 - variance, 0))
        mean = schedule.alpha(s) * prediction.data + noise_scale * prediction.noise
        return mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape, x.dtype), carry

    return Stepper(lambda x: (), step)


def ancestral(schedule: Schedule) -> Stepper:
    """DDPM's sampler: draws `x_s` from its law given `x_t` and `x_0 = D`, `ddim` with `eta = 1`.

    Exact in the limit of small steps, or of a posterior of `x_0` that is a point.

    Reference: Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    """
    return ddim(schedule, eta=1.0)

"""The way back: from data up to the noise that a deterministic sampler would turn into it."""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.contracts import Predictor
from esscher.core.schedules import Schedule
from esscher.samplers.integration import check_inputs, check_prediction

__all__ = ["invert"]


def invert(predictor: Predictor, x: Array, times: Array, schedule: Schedule, *, unroll: int | bool = 1) -> Array:
    r"""DDIM inversion: carries `x` at `times[-1]` up to `times[0]`, against `steppers.ddim` on the same grid.

    The step from `s` up to `t` evaluates the predictor once, at the state that is known and the time that is not yet
    reached, `(x_s, t)`, and swaps the roles of the two terms: noise comes off with the noise term and goes back on with
    the noise that belongs to the data term,

        x_t = alpha_t (x_s - sigma_s eps) / alpha_s + sigma_t eps_D,    eps_D = (x_s - alpha_t D) / sigma_t.

    For a plain model `eps_D = eps`. With CFG++ it is the guided noise, as its inversion wants. If the noise terms do
    not depend on the state, sampling from the result gives `x` back exactly, otherwise to first order in the steps.
    The grid may begin at `alpha = 0`: the step up to there leaves the state as it is, also right to first order.

    Args:
      predictor: `(x_t[B, ...], t[B]) -> Prediction`.
      x: the state at `times[-1]`, data if that is 0, `[B, ...]`, of a floating type.
      times: `[N + 1]`, strictly decreasing: the grid that the sampler takes down.
      schedule: the noise schedule.
      unroll: passed to `lax.scan`.

    Returns:
      The state at `times[0]`, `[B, ...]`.

    Raises:
      ValueError: as `integrate`.

    Reference: Denoising Diffusion Implicit Models, arXiv:2010.02502.
    """
    x, times = check_inputs(x, times)

    def body(x, step):
        t, s = step
        prediction = check_prediction(predictor(x, jnp.broadcast_to(t, x.shape[:1])))
        data = (x - schedule.sigma(s) * prediction.noise) / schedule.alpha(s)
        scaled_noise = x - schedule.alpha(t) * prediction.data  # sigma_t eps_D
        return (schedule.alpha(t) * data + scaled_noise).astype(x.dtype), None

    return jax.lax.scan(body, x, (times[:-1], times[1:]), reverse=True, unroll=unroll)[0]

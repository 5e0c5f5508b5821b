r"""Forecasts of time series from a model that was trained without conditions, TSDiff: guided by what was observed.

A series is one example, `[L, C]` or any shape, and `S` samples of its forecast are `S` rows of the batch. Given
`quantile_levels` each row is drawn to its own quantile of the observations, so that together they spread as a forecast
should; without, each is drawn to the observations themselves. Errors are summed over entries: a mean would mean another
scale.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    check_floating,
    check_per_example,
    check_same_shape,
    expand_like,
    normal,
    one_per_example,
    reduce_events,
    squared_norm,
)
from esscher.core.contracts import Predictor, Stepper
from esscher.core.schedules import Schedule, add_noise
from esscher.samplers.diffusion.energy import energy_correction, energy_guidance, step_variance
from esscher.samplers.guidance import Weight

__all__ = [
    "langevin_refine",
    "observation_energy",
    "pinball",
    "quantile_levels",
    "refine_energy",
    "self_guidance",
    "self_guided_step",
]


def quantile_levels(samples: int, series: int = 1) -> Array:
    """`q_i = i / (S + 1)`, `i = 1 ... S`, once for each series, `[series S]`: rows of a series follow one another.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    return jnp.tile(jnp.arange(1, samples + 1) / (samples + 1), series)


def pinball(error: Array, level: float | Array) -> Array:
    """`max(q e, (q - 1) e)` of `e = y - prediction`, elementwise; in the mean least at the `q`-quantile of `y`.

    Reference: Regression Quantiles (Koenker, Bassett 1978).
    """
    check_floating(error=error)
    return jnp.maximum(level * error, (level - 1) * error)


def observation_energy(data: Array, y: Array, mask: Array, levels: Array | None = None) -> Array:
    r"""What separates a series from its observations: the sum over observed entries of `e^2`, or of pinball losses.

    `e = y - data`. With squares, times `1 / (2 (noise^2 + r^2))`, it is a Gaussian likelihood, see `energy.pigdm`.

    Args:
      data: the series, `[B, ...]`.
      y: the observations, `[B, ...]`; what stands at masked entries does not matter.
      mask: 1 or True where observed, `[B, ...]`.
      levels: `[B]`, the quantile that each row stands for; by default squares are taken.

    Returns:
      The energy, `[B]`.

    Raises:
      ValueError: not one shape, data that are not floating, or levels that are not `[B]`.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    check_floating(data=data, y=y)
    check_same_shape(data=data, y=y, mask=mask)
    seen = mask.astype(bool)
    error = at_least_float32(jnp.where(seen, y, 0.0)) - at_least_float32(jnp.where(seen, data, 0.0))
    if levels is None:
        return squared_norm(error)
    check_per_example(data, levels=levels)
    return reduce_events(pinball(error, expand_like(levels, error)), "sum")


def self_guidance(
    predictor: Predictor, y: Array, mask: Array, schedule: Schedule, scale: Weight = 1.0, levels: Array | None = None
) -> Predictor:
    r"""Self-guidance of the prediction: `eps' = eps + scale sigma grad_x E(D(x))`, `E` the `observation_energy`.

    Any stepper and `ddim_kernel` take it. With squares it samples the posterior of a Gaussian series where `H P(t) H'`,
    the covariance of what is observed given `x_t`, is `r^2(t) I`, as it is for one observation: by the scale
    `t -> 1 / (2 (noise^2 + r^2(t)))`. Otherwise it has no law in closed form, and at scale 0 that of the model.

    Args:
      predictor: of the unconditional model.
      y: as in `observation_energy`; so are `mask` and `levels`.
      mask: see above.
      schedule: the noise schedule.
      scale: a scalar, `[B]`, or a function of time; 1 to 8 with quantiles, set on other data.
      levels: see above.

    Raises:
      ValueError: as `observation_energy` and `energy.energy_guidance`.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    return energy_guidance(predictor, lambda data, t: observation_energy(data, y, mask, levels), schedule, scale)


def self_guided_step(
    stepper: Stepper,
    y: Array,
    mask: Array,
    schedule: Schedule,
    scale: float | Array = 1.0,
    levels: Array | None = None,
) -> Stepper:
    r"""Self-guidance of the step: `x_s <- x_s - scale v grad E(D(x_s, t))`, `v` the variance of DDPM's step.

    The model looks once more, at the new state under the old time. The last step, to `sigma = 0`, is not guided. It has
    the law of the stepper at scale 0, and none in closed form elsewhere; arguments and errors as `self_guidance`, with
    a scale that is a scalar or `[B]`.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    check_per_example(y, scale=scale)
    variance = step_variance(schedule)
    energy = lambda data, t: observation_energy(data, y, mask, levels)  # noqa: E731
    return energy_correction(stepper, energy, lambda t, s: scale * variance(t, s), at="end")


def refine_energy(
    key: Array,
    x: Array,
    predictor: Predictor,
    t: float | Array,
    base: Array,
    mask: Array,
    schedule: Schedule,
    scale: float | Array = 1.0,
    levels: Array | None = None,
) -> Array:
    r"""How unlikely a series is to the model, and how far from a base forecast: `|eps - eps_theta|^2 + scale E`.

    `eps_theta` is the model's at `alpha x + sigma eps` and the one time `t`, with fresh noise in each call; `E` is the
    `observation_energy` towards the base. For a Gaussian series `N(m, S)`, and `C = alpha^2 S + sigma^2 I`, the first
    term has the mean `tr (I - sigma^2 C^-1)^2 + alpha^2 sigma^2 |C^-1 (x - m)|^2`: its least is the series' mean, but
    its curvature is not that of `-log p`, and depends on `t`.

    Args:
      key: typed random key.
      x: the series, `[B, ...]`.
      predictor: of the unconditional model.
      t: the representative time, a scalar; 20 of 100 steps in the paper.
      base: the forecast to refine, `[B, ...]`; rows sorted, if there are levels.
      mask: where it counts, `[B, ...]`.
      schedule: the noise schedule.
      scale: of the energy, a scalar or `[B]`.
      levels: as in `observation_energy`.

    Returns:
      The energy, `[B]`.

    Raises:
      ValueError: as `observation_energy`, or a scale of another shape.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    check_floating(x=x, base=base)
    check_same_shape(x=x, base=base, mask=mask)
    held = observation_energy(x, base, mask, levels)
    check_per_example(x, scale=scale)
    times, noise = jnp.full(x.shape[:1], t), normal(key, x.shape, x.dtype).astype(x.dtype)
    found = predictor(add_noise(x, noise, times, schedule).astype(x.dtype), times).noise
    return squared_norm(noise - found) + scale * held


def langevin_refine(
    key: Array,
    x: Array,
    energy: Callable[[Array, Array], Array],
    n: int,
    rate: float | Array = 0.1,
    noise: float | Array = 0.1,
) -> Array:
    r"""`n` steps of `x <- x - rate grad U(key, x) + noise sqrt(2 rate) z`: Langevin refinement of a forecast.

    `noise` multiplies the noise, so the temperature is its square: for a smooth `U` without a key, and as the rate
    falls and `n rate` grows, the law tends to `exp(-U / noise^2)`. On `U = k x^2 / 2` the variance of the limit is
    `noise^2 / (k (1 - rate k / 2))`. At `noise = 0` it is gradient descent, refinement by maximum likelihood.

    Args:
      key: typed random key.
      x: where to start, such as a base forecast, `[B, ...]`.
      energy: `U`, `(key, x) -> [B]`, such as `refine_energy`, with a key of its own in every step.
      n: how many steps.
      rate: their size.
      noise: see above.

    Returns:
      The refined series, `[B, ...]`.

    Raises:
      ValueError: `x` is not floating, or the energy does not return `[B]`.

    Reference: Predict, Refine, Synthesize: Self-Guiding Diffusion Models, arXiv:2307.11494.
    """
    check_floating(x=x)

    def total(x: Array, key: Array) -> Array:
        return one_per_example(x, energy=energy(key, x)).sum()

    def body(x: Array, key: Array) -> tuple[Array, None]:
        energy_key, noise_key = jax.random.split(key)
        kick = noise * jnp.sqrt(2 * rate) * normal(noise_key, x.shape, x.dtype)
        return (x - rate * jax.grad(total)(x, energy_key) + kick).astype(x.dtype), None

    return jax.lax.scan(body, x, jax.random.split(key, n))[0]

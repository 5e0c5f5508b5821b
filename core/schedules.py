r"""Noise schedules `x_t = alpha(t) x_0 + sigma(t) eps`, time grids, and conversion between predictions.

Time runs from noise (`t_max`: 1, or the noise level for `edm`, or pi/2 for `trig_flow`) to data (`t = 0`).
"""

import math
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import check_known, check_per_example, expand_like, is_known, safe_sqrt
from esscher.core.contracts import Prediction

__all__ = [
    "Parameterization",
    "Schedule",
    "add_noise",
    "as_prediction",
    "coefficients",
    "convert",
    "cosine",
    "edm",
    "edm_times",
    "log_snr_times",
    "rectified_flow",
    "shift_time",
    "trig_flow",
    "uniform_times",
    "ve",
    "vp_linear",
]

Parameterization = Literal["data", "noise", "v", "score", "velocity"]


class Schedule(NamedTuple):
    """A noise schedule. Every field but `t_max` is an elementwise function of time.

    The forward process is `dx = f(t) x dt + sqrt(g2(t)) dW` with `f = d log(alpha)/dt` and
    `g2 = d(sigma^2)/dt - 2 f sigma^2`; all are closed forms, exact at both ends.
    """

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    alpha_dot: Callable[[Array], Array]  # d alpha / dt
    sigma_dot: Callable[[Array], Array]  # d sigma / dt
    log_snr_half: Callable[[Array], Array]  # log(alpha / sigma): HALF the log signal-to-noise ratio, decreasing in t
    inverse_log_snr_half: Callable[[Array], Array]
    f: Callable[[Array], Array]
    g2: Callable[[Array], Array]
    t_max: float | Array  # the time of (almost) pure noise


def vp_linear(beta_min: float | Array = 0.1, beta_max: float | Array = 20.0) -> Schedule:
    """Variance preserving, rate linear in time: `log alpha = -b0 t/2 - (b1 - b0) t^2/4`, `sigma^2 = 1 - alpha^2`.

    `sigma_dot` is infinite at `t = 0`, so the velocity is not defined there. Differentiating `sigma` gives 0 in its
    place, so that the gradients in all else (the two rates, the state) are right on grids that end there.

    Reference: Score-Based Generative Modeling through SDEs, arXiv:2011.13456.
    """
    slope = beta_max - beta_min

    def rate(t):
        return beta_min + slope * t

    def integral(t):  # of the rate; -2 log(alpha)
        return t * (beta_min + 0.5 * slope * t)

    def alpha(t):
        return jnp.exp(-0.5 * integral(t))

    def sigma(t):
        return safe_sqrt(-jnp.expm1(-integral(t)))

    def inverse_log_snr_half(log_snr):
        total = jax.nn.softplus(-2 * log_snr)
        return 2 * total / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * total))

    return Schedule(
        alpha=alpha,
        sigma=sigma,
        alpha_dot=lambda t: -0.5 * rate(t) * alpha(t),
        sigma_dot=lambda t: 0.5 * rate(t) * alpha(t) ** 2 / sigma(t),
        log_snr_half=lambda t: -0.5 * jnp.log(jnp.expm1(integral(t))),
        inverse_log_snr_half=inverse_log_snr_half,
        f=lambda t: -0.5 * rate(t),
        g2=rate,
        t_max=1.0,
    )


def cosine() -> Schedule:
    """Variance preserving on a quarter circle: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`.

    Reference: Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672.
    """
    return _circle(math.pi / 2, 1.0)


def trig_flow(sigma_data: float | Array = 1.0) -> Schedule:
    """TrigFlow: `alpha = cos t`, `sigma = sigma_data sin t`, `t` in `[0, pi/2]`; `eps` has unit variance.

    Reference: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv:2410.11081.
    """
    return _circle(1.0, sigma_data)


def _circle(rate: float, radius: float | Array) -> Schedule:
    t_max = math.pi / 2 / rate

    def sine(t):
        return jnp.sin(rate * t)

    def cosine(t):  # written so that it is exactly zero at t_max
        return jnp.sin(rate * (t_max - t))

    return Schedule(
        alpha=cosine,
        sigma=lambda t: radius * sine(t),
        alpha_dot=lambda t: -rate * sine(t),
        sigma_dot=lambda t: radius * rate * cosine(t),
        log_snr_half=lambda t: jnp.log(cosine(t)) - jnp.log(radius * sine(t)),
        inverse_log_snr_half=lambda log_snr: jnp.arctan2(jnp.exp(-log_snr), radius) / rate,
        f=lambda t: -rate * sine(t) / cosine(t),
        g2=lambda t: 2 * rate * radius**2 * sine(t) / cosine(t),
        t_max=t_max,
    )


def ve(t_max: float | Array = 50.0) -> Schedule:
    """Variance exploding, time is the noise level: `alpha = 1`, `sigma = t`, up to 50 as the paper has it for CIFAR-10.

    Geometric noise levels are a grid for this schedule, not another schedule: see `log_snr_times`.

    Reference: Score-Based Generative Modeling through SDEs, arXiv:2011.13456.
    """
    return Schedule(
        alpha=jnp.ones_like,
        sigma=lambda t: t,
        alpha_dot=jnp.zeros_like,
        sigma_dot=jnp.ones_like,
        log_snr_half=lambda t: -jnp.log(t),
        inverse_log_snr_half=lambda log_snr: jnp.exp(-log_snr),
        f=jnp.zeros_like,
        g2=lambda t: 2 * t,
        t_max=t_max,
    )


def edm() -> Schedule:
    """EDM's schedule: `alpha = 1`, `sigma = t`, with noise levels up to 80 (see `edm_times`).

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    return ve(t_max=80.0)


def rectified_flow() -> Schedule:
    """Straight paths: `alpha = 1 - t`, `sigma = t`; the velocity is `eps - x_0`.

    Reference: Flow Straight and Fast, arXiv:2209.03003.
    """
    return Schedule(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        alpha_dot=lambda t: -jnp.ones_like(t),
        sigma_dot=jnp.ones_like,
        log_snr_half=lambda t: jnp.log1p(-t) - jnp.log(t),
        inverse_log_snr_half=lambda log_snr: jax.nn.sigmoid(-log_snr),
        f=lambda t: -1 / (1 - t),
        g2=lambda t: 2 * t / (1 - t),
        t_max=1.0,
    )


# --- predictions ------------------------------------------------------------------------------------------------------


def add_noise(data: Array, noise: Array, t: Array, schedule: Schedule) -> Array:
    """The noisy state `x_t = alpha(t) x_0 + sigma(t) eps`.

    Args:
      data: `x_0[B, ...]`.
      noise: `eps[B, ...]`, standard normal.
      t: times, `[B]` or scalar.
      schedule: gives `alpha` and `sigma`.

    Returns:
      `x_t[B, ...]`.
    """
    if data.shape != noise.shape:
        raise ValueError(f"noise must have the shape of data {data.shape}, got {noise.shape}")
    check_per_example(data, t=t)
    return expand_like(schedule.alpha(t), data) * data + expand_like(schedule.sigma(t), data) * noise


def coefficients(kind: Parameterization, t: Array, schedule: Schedule) -> tuple[Array, Array]:
    """The pair `(p, q)` with which a prediction is `p x_0 + q eps`; a score is taken as `-sigma score = eps`.

    Raises:
      ValueError: `kind` is not one of the parameterizations.
    """
    t = jnp.asarray(t)
    if kind == "data":
        return jnp.ones_like(t), jnp.zeros_like(t)
    if kind in ("noise", "score"):
        return jnp.zeros_like(t), jnp.ones_like(t)
    if kind == "v":
        return -schedule.sigma(t), schedule.alpha(t)
    if kind == "velocity":
        return schedule.alpha_dot(t), schedule.sigma_dot(t)
    raise ValueError(f"a prediction is one of {get_args(Parameterization)}, got {kind!r}")


def convert(
    prediction: Array,
    x: Array,
    t: Array,
    schedule: Schedule,
    *,
    source: Parameterization,
    target: Parameterization,
) -> Array:
    r"""Rewrites a prediction made at `(x, t)` in another parameterization.

    With `y = p x_0 + q eps` and `x = alpha x_0 + sigma eps` any other `y' = p' x_0 + q' eps` is
    `y' = ((p' q - q' p) x + (alpha q' - sigma p') y) / (alpha q - sigma p)`, where

        data      x_0                          v         alpha eps - sigma x_0
        noise     eps                          velocity  alpha' x_0 + sigma' eps
        score     -eps / sigma

    Undefined, and then not finite, where `x` and the source do not fix the target: from "data" at `sigma = 0`, from
    "noise" and "score" at `alpha = 0`, to "score" at `sigma = 0`; "velocity" also where the schedule's derivatives are
    infinite (`vp_linear` at 0). From "v" and from a finite "velocity" every target but "score" is defined at both ends.

    Args:
      prediction: in the parameterization `source`, `[B, ...]`.
      x: the noisy state, `[B, ...]`.
      t: times, `[B]` or scalar.
      schedule: the noise schedule of `x`.
      source: what `prediction` is.
      target: what to return.

    Returns:
      The same prediction as `target`, `[B, ...]`.

    Raises:
      ValueError: an unknown parameterization, `prediction` and `x` of different shapes, or times of another.
    """
    if prediction.shape != x.shape:
        raise ValueError(f"prediction must have the shape of x {x.shape}, got {prediction.shape}")
    check_per_example(x, t=t)
    p, q = coefficients(source, t, schedule)
    p_target, q_target = coefficients(target, t, schedule)
    if source == target:
        return prediction
    alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
    if source == "score":
        prediction = -expand_like(sigma, x) * prediction
    determinant = alpha * q - sigma * p
    from_x = (p_target * q - q_target * p) / determinant
    from_prediction = (alpha * q_target - sigma * p_target) / determinant
    out = expand_like(from_x, x) * x + expand_like(from_prediction, x) * prediction
    return -out / expand_like(sigma, x) if target == "score" else out


def as_prediction(prediction: Array, x: Array, t: Array, schedule: Schedule, *, source: Parameterization) -> Prediction:
    """Both terms, data and noise, of a model's output in any parameterization; arguments as in `convert`."""
    return Prediction(*(convert(prediction, x, t, schedule, source=source, target=kind) for kind in ("data", "noise")))


# --- time grids: n steps, n + 1 decreasing times ----------------------------------------------------------------------


def _check_steps(n: int) -> None:
    if operator.index(n) < 1:
        raise ValueError(f"the number of steps must be at least 1, got {n}")


def uniform_times(n: int, t_max: float | Array = 1.0, t_min: float | Array = 0.0) -> Array:
    """`n + 1` equally spaced times from `t_max` down to `t_min`.

    >>> uniform_times(4)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    _check_steps(n)
    return jnp.linspace(t_max, t_min, n + 1)


def log_snr_times(n: int, schedule: Schedule, t_max: float | Array, t_min: float | Array) -> Array:
    """`n + 1` times with equally spaced log signal-to-noise ratio from `t_max` to `t_min`, both with `0 < SNR < inf`.

    On `ve` and `edm` these are geometric noise levels.

    Reference: DPM-Solver, arXiv:2206.00927.
    """
    _check_steps(n)
    ends = schedule.log_snr_half(jnp.asarray(t_max)), schedule.log_snr_half(jnp.asarray(t_min))
    for name, t, end in (("t_max", t_max, ends[0]), ("t_min", t_min, ends[1])):
        if is_known(end) and not np.isfinite(end):
            raise ValueError(f"{name} must be a time with a signal-to-noise ratio above 0 and below inf, got {t}")
    inner = schedule.inverse_log_snr_half(jnp.linspace(*ends, n + 1))
    return inner.at[0].set(t_max).at[-1].set(t_min)


def edm_times(
    n: int, sigma_max: float | Array = 80.0, sigma_min: float | Array = 0.002, rho: float | Array = 7.0
) -> Array:
    """EDM's noise levels: `n` of them, equally spaced in `sigma^(1/rho)`, then 0.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    _check_steps(n)
    check_known(lambda sigma: sigma > 0, "above 0", sigma_max=sigma_max, sigma_min=sigma_min)
    roots = jnp.linspace(jnp.power(sigma_max, 1 / rho), jnp.power(sigma_min, 1 / rho), n)
    return jnp.append(roots**rho, 0.0)


def shift_time(t: Array, shift: float | Array) -> Array:
    """Moves times in `[0, 1]` towards noise: `shift t / (1 + (shift - 1) t)`; a grid stays a grid.

    On `rectified_flow` this multiplies the noise-to-signal ratio by `shift`.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206.
    """
    return shift * t / (1 + (shift - 1) * t)

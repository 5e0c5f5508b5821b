r"""Flow matching and stochastic interpolants: regression on the velocity of random paths between data and noise.

Time runs as everywhere: `t = 0` is data, `t = 1` the other end. Papers with `t = 1` at the data have the velocity
with the other sign.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import schedules
from esscher.core.arrays import (
    Reduce,
    at_least_float32,
    check_floating,
    check_per_example,
    check_same_shape,
    expand_like,
)
from esscher.core.schedules import Schedule
from esscher.objectives.score import denoising_loss, regression_loss

__all__ = [
    "Interpolant",
    "flow_matching_loss",
    "interpolant_score_loss",
    "interpolant_velocity_loss",
    "interpolate",
    "linear_interpolant",
    "logit_normal_times",
    "trigonometric_interpolant",
]

_STRAIGHT = schedules.rectified_flow()


def flow_matching_loss(
    velocity: Array,
    data: Array,
    noise: Array,
    t: Array,
    schedule: Schedule = _STRAIGHT,
    *,
    weight: float | Array = 1.0,
    reduce: Reduce = "mean",
) -> Array:
    r"""Conditional flow matching, `weight |u - (alpha' x_0 + sigma' eps)|^2` per example.

    On the default straight paths the target is `eps - x_0`, at every `t`. The minimiser is the velocity whose ODE
    carries the law of `x_t` along. It is `denoising_loss` in the velocity parameterization.

    Args:
      velocity: the model's output at `(x_t, t)`, `[B, ...]`.
      data: `x_0[B, ...]`.
      noise: `eps[B, ...]`, standard normal, or any law to start from.
      t: times, `[B]` or scalar, for instance `logit_normal_times`.
      schedule: of the path `x_t = alpha x_0 + sigma eps`, see `core.schedules.add_noise`.
      weight: scalar or `[B]`.
      reduce: mean or sum over the axes of an example.

    Returns:
      The losses, `[B]`, in float32 at least.

    Raises:
      ValueError: shapes that differ, or arrays that are not floating.

    Reference: Flow Matching for Generative Modeling, arXiv:2210.02747.
    """
    _check(t, velocity=velocity, data=data, noise=noise)
    return denoising_loss(velocity, data, noise, t, schedule, parameterization="velocity", weight=weight, reduce=reduce)


def logit_normal_times(
    key: Array, shape: tuple[int, ...], mean: float | Array = 0.0, std: float | Array = 1.0
) -> Array:
    """Training times `sigmoid(mean + std n)` with `n` standard normal: most of them in the middle of the path.

    Args:
      key: typed random key.
      shape: of the result.
      mean: of the logit; positive means more noise.
      std: of the logit.

    Returns:
      Times in `(0, 1)`, of the given shape; `core.schedules.shift_time` moves them towards noise.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206.
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


# --- stochastic interpolants: between any two laws --------------------------------------------------------------------


class Interpolant(NamedTuple):
    """Random paths `x_t = alpha(t) x_0 + beta(t) x_1 + gamma(t) z`; every field is an elementwise function of time.

    `alpha` falls from 1 to 0, `beta` rises from 0 to 1, and `gamma`, the noise in between, is 0 at both ends.
    """

    alpha: Callable[[Array], Array]
    beta: Callable[[Array], Array]
    gamma: Callable[[Array], Array]
    alpha_dot: Callable[[Array], Array]
    beta_dot: Callable[[Array], Array]
    gamma_dot: Callable[[Array], Array]  # infinite at both ends, unless there is no noise


def linear_interpolant(scale: float | Array = 1.0) -> Interpolant:
    """Straight paths with noise: `alpha = 1 - t`, `beta = t`, `gamma = scale sqrt(2 t (1 - t))`.

    Without noise (`scale = 0`) and with standard normal `x_1` this is rectified flow.

    Reference: Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.
    """
    return Interpolant(
        alpha=lambda t: 1 - t,
        beta=lambda t: t,
        alpha_dot=lambda t: -jnp.ones_like(t),
        beta_dot=jnp.ones_like,
        **_bridge(scale),
    )


def trigonometric_interpolant(scale: float | Array = 1.0) -> Interpolant:
    """Quarter circles with noise: `alpha = cos(pi t/2)`, `beta = sin(pi t/2)`, `gamma = scale sqrt(2 t (1 - t))`.

    Without noise, between laws of one covariance the covariance stays what it is.

    Reference: Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.
    """
    circle = schedules.cosine()
    return Interpolant(
        alpha=circle.alpha,
        beta=circle.sigma,
        alpha_dot=circle.alpha_dot,
        beta_dot=circle.sigma_dot,
        **_bridge(scale),
    )


def _bridge(scale: float | Array) -> dict[str, Callable[[Array], Array]]:
    def gamma_dot(t: Array) -> Array:
        root = jnp.sqrt(2 * t * (1 - t))
        # Without noise the derivative is 0 at the ends too, where the general formula says 0 times infinity.
        silent_end = (root == 0) & (jnp.asarray(scale) == 0)
        return scale * (1 - 2 * t) / jnp.where(silent_end, 1.0, root)

    return {"gamma": lambda t: scale * jnp.sqrt(2 * t * (1 - t)), "gamma_dot": gamma_dot}


def interpolate(start: Array, end: Array, noise: Array, t: Array, interpolant: Interpolant) -> Array:
    """The point of a random path, `x_t = alpha(t) x_0 + beta(t) x_1 + gamma(t) z`.

    Args:
      start: `x_0[B, ...]`, data.
      end: `x_1[B, ...]`: noise, or data of another law, drawn with `x_0` from any coupling.
      noise: `z[B, ...]`, standard normal, independent of both.
      t: times, `[B]` or scalar.
      interpolant: `linear_interpolant` or `trigonometric_interpolant`.

    Returns:
      `x_t[B, ...]`.

    Raises:
      ValueError: shapes that differ, or arrays that are not floating.
    """
    _check(t, start=start, end=end, noise=noise)
    return _combine(interpolant[:3], start, end, noise, t)


def interpolant_velocity_loss(
    velocity: Array,
    start: Array,
    end: Array,
    noise: Array,
    t: Array,
    interpolant: Interpolant,
    *,
    weight: float | Array = 1.0,
    reduce: Reduce = "mean",
) -> Array:
    r"""Regression on an interpolant's velocity, `weight |u - (alpha' x_0 + beta' x_1 + gamma' z)|^2` per example.

    The minimiser is `E[d x_t / dt | x_t]`, whose ODE carries the law of `x_0` to that of `x_1`. With noise the target
    is infinite at both ends: draw times inside.

    Args:
      velocity: the model's output at `(x_t, t)`, `[B, ...]`.
      start: `x_0[B, ...]`; it, `end`, `noise`, `t` and `interpolant` as in `interpolate`.
      end: `x_1[B, ...]`.
      noise: `z[B, ...]`.
      t: times, `[B]` or scalar.
      interpolant: the path.
      weight: scalar or `[B]`.
      reduce: mean or sum over the axes of an example.

    Returns:
      The losses, `[B]`, in float32 at least.

    Raises:
      ValueError: shapes that differ, or arrays that are not floating.

    Reference: Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.
    """
    _check(t, velocity=velocity, start=start, end=end, noise=noise)
    start, end, noise, t = map(at_least_float32, (start, end, noise, t))
    target = _combine(interpolant[3:], start, end, noise, t)
    return regression_loss(velocity, target, weight=weight, reduce=reduce)


def interpolant_score_loss(
    prediction: Array, noise: Array, *, weight: float | Array = 1.0, reduce: Reduce = "mean"
) -> Array:
    """Regression on an interpolant's noise, `weight |prediction - z|^2` per example: the score in its bounded form.

    The minimiser is `E[z | x_t]`, and `grad log p_t(x) = -E[z | x_t = x] / gamma(t)` where there is noise.

    Args:
      prediction: the model's output at `(x_t, t)`, `[B, ...]`.
      noise: `z[B, ...]` of `interpolate`.
      weight: scalar or `[B]`.
      reduce: mean or sum over the axes of an example.

    Returns:
      The losses, `[B]`, in float32 at least.

    Raises:
      ValueError: shapes that differ, or arrays that are not floating.

    Reference: Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.
    """
    _check(0.0, prediction=prediction, noise=noise)
    return regression_loss(prediction, noise, weight=weight, reduce=reduce)


def _combine(functions: tuple[Callable, ...], start: Array, end: Array, noise: Array, t: Array) -> Array:
    a, b, c = (expand_like(function(jnp.asarray(t)), start) for function in functions)
    return a * start + b * end + c * noise


def _check(t: float | Array, **arrays: Array) -> None:
    check_floating(**arrays, t=jnp.asarray(t))
    check_same_shape(**arrays)
    check_per_example(next(iter(arrays.values())), t=t)

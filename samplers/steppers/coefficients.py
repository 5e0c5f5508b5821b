"""What the solvers share: the scalars of one step, the first-order step, the history of multistep solvers."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import normal, safe_sqrt
from esscher.core.contracts import Prediction
from esscher.core.schedules import Schedule

__all__ = [
    "History",
    "StepCoefficients",
    "first_order",
    "implied_data",
    "noise_levels",
    "phis",
    "shift_score",
    "standard_normal",
    "step_coefficients",
    "tweedie_ratio",
]


class StepCoefficients(NamedTuple):
    """The scalars of a step from `t` to `s < t`, with `lam = log(alpha / sigma)`."""

    alpha_t: Array
    sigma_t: Array
    alpha_s: Array
    sigma_s: Array
    lam: Array  # lam(t); where that is -inf, the one in the middle of the step
    h: Array  # lam(s) - lam(t) > 0; inf where alpha(t) = 0 or sigma(s) = 0
    finite_h: Array  # h, or 1 where h is infinite: safe in the branch of a `where` that is not taken

    @property
    def regular(self) -> Array:
        """Whether `h` is finite. If not, only the first-order step exists."""
        return jnp.isfinite(self.h)


def step_coefficients(schedule: Schedule, t: Array, s: Array) -> StepCoefficients:
    """The scalars of the step from `t` to `s`; neither values nor gradients are NaN at the two ends of a schedule.

    They are exact there too, but for one that does not exist: under `vp_linear` the derivative of `sigma` in time is
    infinite at 0, and 0 is taken in its place.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (f(u) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    # A `where` around a logarithm of zero still has a NaN gradient, so its argument is moved inside the step first.
    middle = 0.5 * (t + s)
    lam = schedule.log_snr_half(jnp.where(alpha_t > 0, t, middle))
    h = schedule.log_snr_half(jnp.where(sigma_s > 0, s, middle)) - lam
    regular = (alpha_t > 0) & (sigma_s > 0)
    return StepCoefficients(
        alpha_t, sigma_t, alpha_s, sigma_s, lam, jnp.where(regular, h, jnp.inf), jnp.where(regular, h, 1.0)
    )


def first_order(prediction: Prediction, c: StepCoefficients) -> Array:
    """DDIM's `alpha_s D + sigma_s eps`, the first term of every solver; the two terms may disagree (CFG++)."""
    return c.alpha_s * prediction.data + c.sigma_s * prediction.noise


def noise_levels(c: StepCoefficients, eta: float | Array) -> tuple[Array, Array]:
    """Standard deviations of the noise kept and of the noise drawn anew, whose squares add up to `sigma_s^2`.

    `fresh = eta sigma_s sqrt(1 - e^(-2h))` and `kept = sigma_s sqrt(1 - eta^2 (1 - e^(-2h)))`.
    """
    fresh = eta * c.sigma_s * jnp.sqrt(-jnp.expm1(-2 * c.h))
    kept = (1 - eta) * (1 + eta) + eta**2 * jnp.exp(-2 * c.h)
    return c.sigma_s * safe_sqrt(kept), fresh


def standard_normal(key: Array, x: Array) -> Array:
    """Noise in the shape of `x`, in float32 at least."""
    return normal(key, x.shape, x.dtype)


def implied_data(x: Array, prediction: Prediction, c: StepCoefficients) -> Array:
    """The data term `(x - sigma_t eps) / alpha_t` that goes with the noise term; `prediction.data` where `alpha_t = 0`.

    For a plain model it is `prediction.data`, for CFG++ the unconditional data term.
    """
    started = c.alpha_t > 0
    return jnp.where(started, (x - c.sigma_t * prediction.noise) / jnp.where(started, c.alpha_t, 1.0), prediction.data)


def tweedie_ratio(alpha: Array, sigma: Array) -> Array:
    """`sigma^2 / alpha`, by which a change of the score moves the data term; 0 where `alpha = 0`."""
    return jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)


def shift_score(prediction: Prediction, change: Array, alpha: Array, sigma: Array) -> Prediction:
    """The prediction whose score is larger by `change`, `D + sigma^2/alpha change` and `eps - sigma change`.

    Both terms still put `x` together, but where `alpha = 0`: there the data term stays.
    """
    data = prediction.data + tweedie_ratio(alpha, sigma) * change
    return Prediction(data, prediction.noise - sigma * change)


def phis(n: int, z: Array) -> list[Array]:
    """The functions `phi_k(z) = sum_i z^i / (i + k)!` of exponential integrators, `[phi_1(z), ..., phi_n(z)]`.

    `phi_1 = (e^z - 1) / z` and `phi_k = z phi_(k+1) + 1 / k!`: this recursion is used upwards from `phi_1`, but where
    `|z| < 1`, as it cancels there, downwards from the series of `phi_n`.
    """
    small = jnp.abs(z) < 1
    inner, outer = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)
    powers = jnp.arange(18)
    series = [jnp.sum(inner**powers / np.array([math.factorial(i + n) for i in range(18)], float))]
    closed = [jnp.expm1(outer) / outer]
    for k in range(1, n):
        series.insert(0, inner * series[0] + 1 / math.factorial(n - k))
        closed.append((closed[-1] - 1 / math.factorial(k)) / outer)
    return [jnp.where(small, *pair) for pair in zip(series, closed, strict=True)]


class History(NamedTuple):
    """Data terms of the latest evaluations, the newest first, as arrays of fixed size."""

    data: Array  # [K, B, ...]
    lam: Array  # [K], in the default float type: times may be finer than the state
    count: Array  # how many are valid

    @staticmethod
    def empty(x: Array, size: int) -> "History":
        """No valid entry; made of `x`, so that it lies (and, in `shard_map`, varies) over devices as `x` does."""
        return History(jnp.broadcast_to(x, (size, *x.shape)), jnp.zeros(size), jnp.zeros((), jnp.int32))

    def push(self, data: Array, c: StepCoefficients) -> "History":
        """With the evaluation at `t` in front; one made where `alpha_t = 0` has no finite `lam` and does not count."""
        size = self.data.shape[0]
        return History(
            jnp.concatenate([data.astype(self.data.dtype)[None], self.data])[:size],
            jnp.concatenate([c.lam[None].astype(self.lam.dtype), self.lam])[:size],
            jnp.where(c.alpha_t > 0, self.count + 1, 0),
        )

r"""Score matching: denoising losses in every parameterization, their weights, and losses without noise.

A denoising loss is `weight(t) |prediction - truth|^2` per example. One weight on the error of the data term, spelled in
the five parameterizations, is one and the same loss: with `x_t` fixed, errors are proportional, `err = c err_data`, so
each weight here is `w_data / c^2`, and

    noise     c = a / s              v         c = (a^2 + s^2) / s
    score     c = a / s^2            velocity  c = (a' s - a s') / s
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import autodiff, schedules
from esscher.core.arrays import (
    Reduce,
    at_least_float32,
    check_floating,
    check_known,
    check_per_example,
    check_same_shape,
    expand_like,
    reduce_events,
    squared_norm,
)
from esscher.core.schedules import Parameterization, Schedule

__all__ = [
    "denoising_loss",
    "edm_loss",
    "edm_weight",
    "implicit_score_matching_loss",
    "likelihood_weight",
    "log_normal_noise_levels",
    "min_snr_weight",
    "multiplicative_denoising_loss",
    "multiplicative_noise",
    "nonnegative_score_matching_loss",
    "p2_weight",
    "regression_loss",
    "sigmoid_weight",
    "sliced_score_matching_loss",
]

# --- denoising --------------------------------------------------------------------------------------------------------


def regression_loss(prediction: Array, target: Array, *, weight: float | Array = 1.0, reduce: Reduce = "mean") -> Array:
    """Weighted squared error of each example, `weight |prediction - target|^2`.

    Nothing is stopped from gradient: stop the target yourself if it comes from a model that this loss must not train.

    Args:
      prediction: `[B, ...]`.
      target: `[B, ...]`.
      weight: scalar or `[B]`.
      reduce: mean or sum over the axes of an example.

    Returns:
      The losses, `[B]`, in float32 at least.

    Raises:
      ValueError: shapes that differ, arrays that are not floating, `weight` neither scalar nor `[B]`.
    """
    check_floating(prediction=prediction, target=target)
    check_same_shape(prediction=prediction, target=target)
    check_per_example(prediction, weight=weight)
    return weight * squared_norm(at_least_float32(prediction) - at_least_float32(target), reduce)


def denoising_loss(
    prediction: Array,
    data: Array,
    noise: Array,
    t: Array,
    schedule: Schedule,
    *,
    parameterization: Parameterization,
    weight: float | Array = 1.0,
    reduce: Reduce = "mean",
) -> Array:
    r"""Denoising score matching: `weight |prediction - truth|^2` per example, in the prediction's own parameterization.

    The minimiser is the conditional mean of the truth given `x_t`, from which `convert` makes the score. Nothing is
    stopped from gradient: it flows into `prediction`, and into `data` and `noise` too, so that an encoder can learn.

    Args:
      prediction: the model's output at `(x_t, t)`, `[B, ...]`.
      data: `x_0[B, ...]`.
      noise: `eps[B, ...]`, standard normal, of which `x_t = alpha x_0 + sigma eps` was made (`schedules.add_noise`).
      t: times, `[B]` or scalar; with `sigma > 0` for "score", and for "velocity" under `vp_linear`.
      schedule: the noise schedule.
      parameterization: what `prediction` is: "data", "noise", "v", "score" or "velocity".
      weight: scalar or `[B]`, for instance `min_snr_weight(t, schedule, parameterization=...)`.
      reduce: as in `regression_loss`, as are result and errors.

    Reference: Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    """
    check_floating(prediction=prediction, data=data, noise=noise, t=jnp.asarray(t))
    check_same_shape(prediction=prediction, data=data, noise=noise)
    check_per_example(data, t=t)
    t = at_least_float32(t)
    p, q = schedules.coefficients(parameterization, t, schedule)
    if parameterization == "score":
        q = -q / schedule.sigma(t)
    truth = expand_like(p, data) * at_least_float32(data) + expand_like(q, data) * at_least_float32(noise)
    return regression_loss(prediction, truth, weight=weight, reduce=reduce)


def edm_loss(
    denoised: Array, data: Array, sigma: Array, *, sigma_data: float | Array = 0.5, reduce: Reduce = "mean"
) -> Array:
    """EDM's loss `(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(x_0 + sigma eps; sigma) - x_0|^2` per example.

    Args:
      denoised: the preconditioned denoiser's output, `[B, ...]`.
      data: `x_0[B, ...]`.
      sigma: noise levels, `[B]` or scalar, positive, as `log_normal_noise_levels` draws them.
      sigma_data: standard deviation of the data, positive.
      reduce: as in `regression_loss`, as are result and errors; known values that are not positive are refused too.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    check_floating(denoised=denoised, data=data, sigma=jnp.asarray(sigma))
    check_same_shape(denoised=denoised, data=data)
    check_per_example(data, sigma=sigma)
    check_known(lambda sigma: sigma > 0, "above 0", sigma=sigma)
    weight = edm_weight(sigma, schedules.edm(), parameterization="data", sigma_data=sigma_data)
    return regression_loss(denoised, data, weight=weight, reduce=reduce)


def log_normal_noise_levels(
    key: Array, shape: tuple[int, ...], mean: float | Array = -1.2, std: float | Array = 1.2
) -> Array:
    """EDM's training noise levels, `exp(mean + std n)` with `n` standard normal.

    `mean` and `std` are those of the log noise level; `shape` is the result's.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    return jnp.exp(mean + std * jax.random.normal(key, shape))


# --- weights: on the squared error of the parameterization they are asked for -----------------------------------------

_LARGEST_LOG_SNR = 60.0  # beyond it weights are taken at their limit; e^60 is still far from overflow in float32


def edm_weight(
    t: Array, schedule: Schedule, *, parameterization: Parameterization, sigma_data: float | Array = 0.5
) -> Array:
    """EDM's weight, `snr + 1 / sigma_data^2` on the data error: it gives every noise level the same initial loss.

    With `rho = sigma/alpha` it is `(rho^2 + sigma_data^2) / (rho sigma_data)^2`.

    Args:
      t: times, any shape.
      schedule: the noise schedule.
      parameterization: whose squared error is to be weighted.
      sigma_data: standard deviation of the data, positive.

    Returns:
      The weights, of the shape of `t`, in float32 at least.

    Raises:
      ValueError: an unknown parameterization, or a known hyperparameter that should be positive and is not.

    Reference: Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
    """
    check_known(lambda sigma_data: sigma_data > 0, "above 0", sigma_data=sigma_data)
    logs = _logs(t, schedule)
    return _weight(jnp.logaddexp(logs.snr, -2 * jnp.log(sigma_data)), logs, parameterization)


def min_snr_weight(
    t: Array, schedule: Schedule, *, parameterization: Parameterization, gamma: float | Array = 5.0
) -> Array:
    """Min-SNR, `min(snr, gamma)` on the data error, so that low noise does not dominate.

    On the noise error that is `min(snr, gamma) / snr`, and 1 at `snr = 0`.

    Args:
      t: and `schedule`, `parameterization`, the result and errors as in `edm_weight`.
      gamma: the largest weight on the data error, positive.

    Reference: Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv:2303.09556.
    """
    check_known(lambda gamma: gamma > 0, "above 0", gamma=gamma)
    logs = _logs(t, schedule)
    return _weight(jnp.minimum(logs.snr, jnp.log(gamma)), logs, parameterization)


def p2_weight(
    t: Array,
    schedule: Schedule,
    *,
    parameterization: Parameterization,
    k: float | Array = 1.0,
    gamma: float | Array = 1.0,
) -> Array:
    """Perception-prioritised weight, `1 / (k + snr)^gamma` on the noise error.

    Args:
      t: and `schedule`, `parameterization`, the result and errors as in `edm_weight`.
      k: keeps the weight finite at `snr = 0`, positive.
      gamma: how strongly low noise is weighted down; 0 is the plain noise loss.

    Reference: Perception Prioritized Training of Diffusion Models, arXiv:2204.00227.
    """
    check_known(lambda k: k > 0, "above 0", k=k)
    logs = _logs(t, schedule)
    return _weight(logs.snr - gamma * jnp.logaddexp(jnp.log(k), logs.snr), logs, parameterization)


def likelihood_weight(t: Array, schedule: Schedule, *, parameterization: Parameterization) -> Array:
    r"""The weight of the variational bound, `-snr'(t) / 2` on the data error; use it with `reduce="sum"`.

    The time integral of the loss, in nats, exceeds that of the exact denoiser by `KL(p || q)` at the clean end minus
    that at the noisy end, where `q` is the law whose denoiser the model is. At the ends of time it is infinite, 0 or
    undefined, as the parameterization has it: integrate over times in between.

    Arguments and result as in `edm_weight`.

    Reference: Variational Diffusion Models, arXiv:2107.00630.
    """
    logs = _logs(t, schedule)
    return _weight(logs.snr + logs.rate, logs, parameterization)


def sigmoid_weight(
    t: Array, schedule: Schedule, *, parameterization: Parameterization, bias: float | Array = 0.0
) -> Array:
    """Sigmoid weight, `-logsnr'(t) e^bias sigmoid(logsnr - bias)` on the data error.

    It is twice the likelihood weight times `sigmoid(bias - logsnr)`: detail that only low noise shows counts for less.

    Args:
      t: and `schedule`, `parameterization` and the result as in `edm_weight`.
      bias: the log signal-to-noise ratio at which the weight has halved.

    Reference: Simpler Diffusion (SiD2), arXiv:2410.19324.
    """
    logs = _logs(t, schedule)
    return _weight(bias + jax.nn.log_sigmoid(logs.snr - bias) + jnp.log(2.0) + logs.rate, logs, parameterization)


class _Logs(NamedTuple):
    # Logarithms, because snr is 0 or infinite at the ends, where most weights have finite limits; snr is clipped, and
    # shares of a^2 and s^2 in the scale follow from it.
    snr: Array
    scale: Array  # a^2 + s^2
    wronskian: Array  # a s' - a' s
    rate: Array  # -logsnr'(t) / 2 = (a s' - a' s) / (a s)


def _logs(t: Array, schedule: Schedule) -> _Logs:
    t = at_least_float32(t)
    a, s, a_dot, s_dot = (f(t) for f in (schedule.alpha, schedule.sigma, schedule.alpha_dot, schedule.sigma_dot))
    snr = jnp.clip(2 * schedule.log_snr_half(t), -_LARGEST_LOG_SNR, _LARGEST_LOG_SNR)
    scale, wronskian = jnp.log(a**2 + s**2), jnp.log(a * s_dot - a_dot * s)
    shares = jax.nn.log_sigmoid(snr) + jax.nn.log_sigmoid(-snr)
    return _Logs(snr, scale, wronskian, wronskian - scale - 0.5 * shares)


def _weight(log_data_weight: Array, logs: _Logs, parameterization: Parameterization) -> Array:
    """`w_data / c^2`, where the squared error in the parameterization is `c^2` times that of the data."""
    log_variance = logs.scale + jax.nn.log_sigmoid(-logs.snr)
    log_ratios = {
        "data": 0.0,
        "noise": logs.snr,
        "score": logs.snr - log_variance,
        "v": 2 * logs.scale - log_variance,
        "velocity": 2 * logs.wronskian - log_variance,
    }
    if parameterization not in log_ratios:
        raise ValueError(f"parameterization must be one of {tuple(log_ratios)}, got {parameterization!r}")
    return jnp.exp(log_data_weight - log_ratios[parameterization])


# --- without noise ----------------------------------------------------------------------------------------------------


def implicit_score_matching_loss(score_fn: Callable[[Array], Array], x: Array) -> Array:
    """Hyvärinen's loss `tr(d psi / dx) + |psi|^2 / 2`: half the squared score error, up to a constant of the data.

    Args:
      score_fn: the model `psi` of `grad log p`, `[B, D] -> [B, D]`, each example by itself.
      x: data, `[B, ...]`, whose density vanishes at infinity.

    Returns:
      The losses, `[B]`, summed over the axes of an example; one forward-mode product per coordinate.

    Raises:
      ValueError: `score_fn` changes the shape, or `x` is not floating.

    Reference: Estimation of Non-Normalized Statistical Models by Score Matching, JMLR 6 (2005).
    """
    return autodiff.divergence(score_fn, x) + 0.5 * squared_norm(score_fn(x))


def sliced_score_matching_loss(
    key: Array,
    score_fn: Callable[[Array], Array],
    x: Array,
    *,
    n_projections: int = 1,
    variance_reduced: bool = True,
) -> Array:
    """Sliced score matching: the implicit loss with its trace, and its norm, seen through random sign vectors.

    `mean_v [v' (d psi / dx) v + |psi|^2 / 2]`; without variance reduction the last term is `(v' psi)^2 / 2`. The mean
    over `v` is `implicit_score_matching_loss`, at the cost of one forward-mode product per projection.

    Args:
      key: typed random key.
      score_fn: and `x`, the result and errors as in `implicit_score_matching_loss`.
      n_projections: directions per example, at least 1.
      variance_reduced: whether the norm is taken exactly.

    Reference: Sliced Score Matching, arXiv:1905.07088.
    """

    def one(v: Array) -> Array:
        score, curvature = autodiff.value_and_quadratic_form(score_fn, x, v)
        norm = squared_norm(score) if variance_reduced else reduce_events(v * at_least_float32(score), "sum") ** 2
        return curvature + 0.5 * norm

    return jax.vmap(one)(autodiff.draw_probes(key, x, n_projections)).mean(0)


def nonnegative_score_matching_loss(score_fn: Callable[[Array], Array], x: Array) -> Array:
    """Implicit score matching of positive data, `sum_i 2 x_i psi_i + x_i^2 d_i psi_i + x_i^2 psi_i^2 / 2`.

    Up to a constant of the data it is `sum_i x_i^2 (psi_i - d_i log p)^2 / 2`: the factor `x^2` makes the boundary term
    at 0 vanish, which plain score matching needs a density that is zero there for.

    `x[B, ...]` is positive, known values below 0 are refused; otherwise arguments, result and errors as in
    `implicit_score_matching_loss`. The loss is Hyvärinen's (Some Extensions of Score Matching, 2007).

    Reference: Dale meets Langevin: A Multiplicative Denoising Diffusion Model, arXiv:2510.02730.
    """
    check_known(lambda least: least >= 0, "at least 0", x=jnp.min(x, initial=0.0))
    # The first two terms are the divergence of x^2 psi.
    return autodiff.divergence(lambda x: x**2 * score_fn(x), x) + 0.5 * squared_norm(x * score_fn(x))


def multiplicative_noise(
    data: Array, noise: Array, t: Array, mu: float | Array = 0.5, sigma: float | Array = 1.0
) -> Array:
    """Geometric Brownian motion, `x_t = x_0 exp((mu - sigma^2/2) t + sigma sqrt(t) z)`, which keeps signs.

    Args:
      data: `x_0[B, ...]`, positive.
      noise: `z[B, ...]`, standard normal.
      t: times, `[B]` or scalar, at least 0.
      mu: growth rate; at `sigma^2 / 2` the logarithm has no drift.
      sigma: volatility.

    Reference: Dale meets Langevin: A Multiplicative Denoising Diffusion Model, arXiv:2510.02730.
    """
    check_floating(data=data, noise=noise)
    check_same_shape(data=data, noise=noise)
    check_per_example(data, t=t)
    drift = expand_like((mu - 0.5 * sigma**2) * t, data)
    return data * jnp.exp(drift + expand_like(sigma * jnp.sqrt(t), data) * noise)


def multiplicative_denoising_loss(
    prediction: Array, noise: Array, t: Array, sigma: float | Array = 1.0, *, reduce: Reduce = "mean"
) -> Array:
    r"""Denoising loss of `multiplicative_noise`, `sigma^2 t |H + 1 + z / (sigma sqrt t)|^2` per example.

    The minimiser is `H = x grad log p_t(x)`, elementwise; in the logarithm `y = log x` the score is `H + 1`.

    Args:
      prediction: the model's `H(x_t, t)`, `[B, ...]`.
      noise: the `z` that made `x_t`, `[B, ...]`.
      t: times, `[B]` or scalar, at least 0.
      sigma: volatility.
      reduce: mean or sum over the axes of an example.

    Returns:
      The losses, `[B]`, in float32 at least; the factor `sigma^2 t` keeps them finite at `t = 0`.

    Reference: Dale meets Langevin: A Multiplicative Denoising Diffusion Model, arXiv:2510.02730.
    """
    check_floating(prediction=prediction, noise=noise)
    check_same_shape(prediction=prediction, noise=noise)
    check_per_example(prediction, t=t)
    spread = expand_like(sigma * jnp.sqrt(at_least_float32(t)), prediction)
    return squared_norm(spread * (at_least_float32(prediction) + 1) + at_least_float32(noise), reduce)

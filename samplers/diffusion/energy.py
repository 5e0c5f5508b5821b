r"""Guidance by the gradient of an energy of the data that a model expects: likelihoods, rewards, classifiers.

An energy `E(D, t)`, in nats, is low where the data is wanted: `E = -r / beta` asks for the tilt `p(x_0) exp(r / beta)`.
All methods here are one, with three switches:

    through   the gradient is taken in `x`, through the model, or only in its data term `D`
    where     it moves the prediction before a step (`energy_guidance`, a predictor that any sampler takes), or the
              state after it (`energy_correction`, a stepper)
    scale     the weight: a number, a function of time such as `posterior_variance`, and `shape`, such as
              `normalized_guidance`, which makes the gradient's length that of the state

Since `dD / dx = (alpha / sigma^2) Cov(x_0 | x_t)` for a perfect model, the two gradients agree where that covariance is
`v I` and the weight of the one in `D` is `v`. None of this samples the tilt but in special cases, which are named:
`steering` has samplers that do.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    check_floating,
    check_per_example,
    check_same_shape,
    check_targets,
    expand_like,
    one_per_example,
    safe_sqrt,
    squared_norm,
)
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.guidance import Weight, mix
from esscher.samplers.steppers.coefficients import noise_levels, shift_score, step_coefficients, tweedie_ratio

__all__ = [
    "Energy",
    "StepWeight",
    "dps",
    "energy_correction",
    "energy_guidance",
    "normalized_guidance",
    "pigdm",
    "posterior_variance",
    "sine_boost",
    "step_variance",
    "tempered_classifier",
    "tempered_log_ratio",
]

Energy = Callable[[Array, Array], Array]
"""`(data[B, ...], t[B]) -> [B]`, in nats, low where the data is wanted."""

StepWeight = float | Array | Callable[[Array, Array], Array]
"""The weight of a correction: a scalar, one per example `[B]`, or a function of the step's `(t, s)`."""


# --- the two places where an energy can act ---------------------------------------------------------------------------


def energy_guidance(
    predictor: Predictor,
    energy: Energy,
    schedule: Schedule,
    w: Weight = 1.0,
    *,
    through: bool = True,
    shape: Callable[[Array, Array], Array] | None = None,
) -> Predictor:
    r"""Guidance before the step: `w` times the gradient of the energy is taken off the prediction.

        through       score' = score - w grad_x E(D(x, t), t),   D' = D - w (sigma^2 / alpha) grad_x E
        not through   D' = D - w grad_D E(D, t)

    and the noise term follows, so that both still put `x` together; `sigma(t) > 0`. Through the model it costs a
    backward pass. It is guidance by a reward (`E = -r / beta`), and the forward half of universal guidance. The law is
    not the tilt, since `E(D)` is not the energy of `x_t`, but where `r` is linear and the data one Gaussian: at `w = 1`
    or, not through the model and for `N(m, v I)`, at `posterior_variance`. Where `alpha = 0` the gradient in `x` is 0,
    and the data term stays.

    Args:
      predictor: of the model.
      energy: of the data term.
      schedule: the noise schedule.
      w: weight: a scalar, `[B]`, or a function of time, such as `posterior_variance` if not through the model.
      through: whether gradients go through the model.
      shape: what is done to the gradient first, `(gradient[B, ...], x[B, ...]) -> gradient`; nothing by default.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`, or the energy does not return `[B]`.

    Reference: Universal Guidance for Diffusion Models, arXiv:2302.07121; Elucidating The Design Space of
      Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """

    def predict(x: Array, t: Array) -> Prediction:
        out, slope = _slope(predictor, energy, x, t, through)
        slope = slope if shape is None else shape(slope, x)
        alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
        if through:
            moved = shift_score(out, -slope, alpha, sigma)
        else:
            moved = Prediction(out.data - slope, out.noise + alpha / sigma * slope)
        return mix((lambda x, t: out, lambda x, t: moved), (w,))(x, t)

    return predict


def energy_correction(
    stepper: Stepper,
    energy: Energy,
    w: StepWeight = 1.0,
    *,
    at: Literal["start", "end"] = "start",
    through: bool = True,
    shape: Callable[[Array, Array], Array] | None = None,
) -> Stepper:
    r"""Guidance after the step: `x_s = step(x_t) - w grad E`, the gradient taken at the state of either end.

    At the start it is `grad E(D(x_t, t), t)`, and the step takes what the predictor said there, so that one evaluation
    serves both; at the end the model looks again, at `(x_s, t)`, the new state under the old time. With `ancestral`
    steps, `at="start"` and `w = (alpha_s / alpha_t) (sigma_t^2 - sigma_s^2 alpha_t^2 / alpha_s^2)` it is
    `energy_guidance` at 1. The law is not the tilt; with a constant `w` it depends on the number of steps.

    Args:
      stepper: takes the step, with the predictor that it is integrated with.
      energy: of the data term.
      w: weight: a scalar, `[B]`, or a function of `(t, s)` such as `step_variance`.
      at: the state in which the gradient is taken.
      through: whether gradients go through the model, `grad_x E(D(x))`; if not `grad_D E(D)`.
      shape: what is done to the gradient first, `(gradient[B, ...], x[B, ...]) -> gradient`; nothing by default.

    Raises:
      ValueError: an unknown `at`; a weight or an energy of a wrong shape.

    Reference: Diffusion Posterior Sampling for General Noisy Inverse Problems, arXiv:2209.14687.
    """
    if at not in ("start", "end"):
        raise ValueError(f'at must be "start" or "end", got {at!r}')

    def step(key, x, prediction, t, s, carry, predictor):
        look = lambda x: _slope(predictor, energy, x, jnp.broadcast_to(t, x.shape[:1]), through)  # noqa: E731
        place = x
        if at == "start":
            prediction, slope = look(x)  # the same as was given, which is then never computed
        new, carry = stepper.step(key, x, prediction, t, s, carry, predictor)
        if at == "end":
            place = new.astype(x.dtype)
            _, slope = look(place)
        size = w(t, s) if callable(w) else w
        check_per_example(x, w=size)
        return new - expand_like(size, x) * (slope if shape is None else shape(slope, place)), carry

    return Stepper(stepper.init, step)


def _slope(predictor: Predictor, energy: Energy, x: Array, t: Array, through: bool) -> tuple[Prediction, Array]:
    def total(data: Array) -> Array:
        return one_per_example(x, energy=energy(data, t)).sum()

    def looked(x: Array) -> tuple[Array, Prediction]:
        prediction = predictor(x, t)
        return total(prediction.data), prediction

    if through:
        return jax.grad(looked, has_aux=True)(x)[::-1]
    prediction = predictor(x, t)
    return prediction, jax.grad(total)(prediction.data)


def posterior_variance(schedule: Schedule, variance: float | Array = 1.0) -> Callable[[Array], Array]:
    """`Var(x_0 | x_t) = v sigma^2 / (alpha^2 v + sigma^2)` of data `N(m, v I)`, a function of time.

    Reference: Pseudoinverse-Guided Diffusion Models for Inverse Problems (ICLR 2023).
    """

    def weight(t: Array) -> Array:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return variance * sigma**2 / (alpha**2 * variance + sigma**2)

    return weight


def step_variance(schedule: Schedule, w: float | Array = 1.0) -> Callable[[Array, Array], Array]:
    """`w` times the variance of DDPM's step, `sigma_s^2 (1 - e^(-2h))`, a function of `(t, s)`; 0 at `sigma(s) = 0`.

    Reference: Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    """
    return lambda t, s: w * jnp.square(noise_levels(step_coefficients(schedule, t, s), 1.0)[1])


def normalized_guidance(slope: Array, x: Array, scale: float | Array = 1.0) -> Array:
    """`scale rms(x) slope / rms(slope)`, each example by its own root mean square; 0 where the slope is.

    The gradient and the state are `[B, ...]`, the scale, such as `sine_boost`, a scalar or `[B]`; else a ValueError.

    Reference: Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """
    check_floating(slope=slope, x=x)
    check_same_shape(slope=slope, x=x)
    check_per_example(x, scale=scale)
    power = squared_norm(slope, "mean")
    none = power == 0
    size = jnp.where(none, 0.0, safe_sqrt(squared_norm(x, "mean") / jnp.where(none, 1.0, power)))
    return (expand_like(scale * size, x) * slope).astype(slope.dtype)


def sine_boost(i: Array, n: int, base: float | Array, factor: float | Array) -> Array:
    """EluCD's strengths on a grid of `n` times: `max(base (1 - i / n), 1e-5) + base factor sin(pi i / (n - 1))`.

    Args:
      i: which of the times, the noisiest is 0 and the clean end `n - 1`; fractions too, for a function of time.
      base: the strength at the start, 0.004 with normalised gradients.
      factor: of the sine, 0.3.

    Raises:
      ValueError: `n` below 2.

    Reference: Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    return jnp.maximum(base * (1 - i / n), 1e-5) + base * factor * jnp.sin(np.pi * i / (n - 1))


def dps(stepper: Stepper, observe: Callable[[Array], Array], y: Array, zeta: float | Array = 1.0) -> Stepper:
    r"""Diffusion posterior sampling: `x_s = step(x_t) - zeta grad_x |y - A(D(x_t))|`, through the model.

    The norm is not squared; at a residual of 0 nothing moves. It does not sample the posterior: as a likelihood it
    takes the data to be `D` for certain. With the square over `2 noise^2` in the place of `zeta` times the norm
    (`pigdm` with `spread=jnp.zeros_like`) the pull on a Gaussian is `1 + H P H' / noise^2` times the right one, `P` the
    covariance of `x_0` given `x_t`: far too sure while there is noise.

    Args:
      stepper: takes the step.
      observe: `A`, `[B, ...] -> [B, M]`, differentiable.
      y: what was measured, `[B, M]`.
      zeta: the strength, from 0.3 to 1; a scalar or `[B]`.

    Raises:
      ValueError: `y` is not of the shape of `A(D)`; as `energy_correction`.

    Reference: Diffusion Posterior Sampling for General Noisy Inverse Problems, arXiv:2209.14687.
    """
    return energy_correction(stepper, lambda data, t: safe_sqrt(squared_norm(_residual(data, observe, y))), zeta)


def pigdm(
    predictor: Predictor,
    observe: Callable[[Array], Array],
    y: Array,
    noise: float | Array,
    schedule: Schedule,
    spread: Callable[[Array], Array] | None = None,
    w: Weight = 1.0,
) -> Predictor:
    r"""Pseudoinverse guidance: the score of `N(y; H D(x), r^2 H H' + noise^2 I)`, of a linear `H`, through the model.

    `score' = score + w (dD/dx)' H' (r^2 H H' + noise^2 I)^-1 (y - H D)`. The covariance of what is seen of the data,
    `spread`, makes it right for one Gaussian of any covariance: with `H Cov(x_0 | x_t) H'` it is the conditional model
    of `y = H x_0 + noise eps`, exactly. By default it is `posterior_variance`, right for data `N(m, I)` if the rows of
    `H` are orthonormal. For any other data the law is not the posterior.

    Args:
      predictor: of the model.
      observe: `H`, `[B, ...] -> [B, M]`.
      y: what was measured, `[B, M]`.
      noise: standard deviation of the measurement, a scalar.
      schedule: the noise schedule.
      spread: `t[B] -> [B]`, `r^2` for orthonormal rows, or `[B, M, M]`.
      w: weight, as in `energy_guidance`.

    Raises:
      ValueError: `y` is not of the shape of `H D`; as `energy_guidance`.

    Reference: Pseudoinverse-Guided Diffusion Models for Inverse Problems (ICLR 2023).
    """
    spread = spread or posterior_variance(schedule)

    def energy(data: Array, t: Array) -> Array:
        error, cov = _residual(data, observe, y), spread(t)
        if cov.ndim == 3:
            cov = cov + noise**2 * jnp.eye(cov.shape[-1], dtype=cov.dtype)
            return 0.5 * jnp.sum(error * jnp.linalg.solve(cov, error[..., None])[..., 0], -1)
        return 0.5 * squared_norm(error) / (cov + noise**2)

    return energy_guidance(predictor, energy, schedule, w)


def _residual(data: Array, observe: Callable[[Array], Array], y: Array) -> Array:
    seen = observe(data)
    check_same_shape(y=y, observed=seen)
    return at_least_float32(y - seen)


# --- classifiers of clean data ----------------------------------------------------------------------------------------


def tempered_classifier(
    predictor: Predictor,
    logits: Callable[[Array], Array],
    targets: Array,
    schedule: Schedule,
    w: Weight = 1.0,
    *,
    joint: float | Array = 1.0,
    marginal: float | Array = 0.5,
    shape: Callable[[Array, Array], Array] | None = None,
) -> Predictor:
    r"""EluCD: guidance by a classifier of clean data, shown `D`: `score' = score + w grad_D l`, not through the model.

    `l` is `tempered_log_ratio`. The gradient in `D` stands for that in `x`, without the factor `dD / dx`: so the law is
    not that of the class, even for a perfect classifier, but compare `energy_guidance` with `posterior_variance`.

    Args:
      predictor: unconditional predictor; the schedule, `w` and `shape` are as in `energy_guidance`.
      logits: of the classifier, `[B, ...] -> [B, K]`.
      targets: the classes asked for, `[B]`; `joint` and `marginal` are as in `tempered_log_ratio`.

    Raises:
      ValueError: as `energy_guidance` and `tempered_log_ratio`.

    Reference: Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """

    def energy(data: Array, t: Array) -> Array:
        return -tempered_log_ratio(logits(data), targets, joint, marginal)

    def weight(t: Array) -> Array:
        return (w(t) if callable(w) else w) * tweedie_ratio(schedule.alpha(t), schedule.sigma(t))

    return energy_guidance(predictor, energy, schedule, weight, through=False, shape=shape)


def tempered_log_ratio(
    logits: Array, targets: Array, joint: float | Array = 1.0, marginal: float | Array = 0.5
) -> Array:
    """`joint z_y - logsumexp_k(marginal z_k)`, `[B]`: the log-probability of a class, its two parts tempered apart.

    At 1 and 1 it is the log-softmax; at `marginal = 0` the gradient is that of the logit alone.

    Args:
      logits: `z`, `[B, K]`.
      targets: `y`, `[B]`, integers.
      joint: inverse temperature of `z_y`, a scalar or `[B]`.
      marginal: inverse temperature of the normaliser, likewise.

    Raises:
      ValueError: targets that are no integers `[B]`, logits that are not floating `[B, K]`, a temperature of another
        shape.

    Reference: Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """
    logits = _checked(targets, logits=logits)
    check_per_example(logits, joint=joint, marginal=marginal)
    picked = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return joint * picked - jax.nn.logsumexp(expand_like(marginal, logits) * logits, -1)


def _checked(targets: Array, **scored: Array) -> Array:
    ((name, values),) = scored.items()
    if values.ndim != 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, of shape [B, K], got {values.dtype}{list(values.shape)}")
    check_targets(targets, **scored)
    return at_least_float32(values)

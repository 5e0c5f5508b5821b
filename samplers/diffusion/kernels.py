"""Reverse steps that have a density, which is what particles, tree search and policy gradients need of a sampler."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import cast_like, check_known, check_same_shape, normal, reduce_events
from esscher.core.contracts import Prediction, Predictor, ReverseKernel
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import noise_levels, step_coefficients

__all__ = [
    "Seen",
    "check_kernel",
    "check_noise",
    "ddim_kernel",
    "ddim_moments",
    "normal_log_prob",
    "remembered_value",
    "remembering_kernel",
]

Model = Callable[[Array, Array], Any]
"""`(x[N, ...], t[N]) -> ` what it says of `x`, leaves `[N, ...]`: a predictor, or a denoiser of tokens."""


def ddim_moments(
    x: Array, prediction: Prediction, t: Array, s: Array, schedule: Schedule, eta: float | Array = 1.0
) -> tuple[Array, Array]:
    """Mean, `[B, ...]`, and standard deviation, `[]`, of the step of `steppers.ddim` with noise `eta`.

    With `eta = 1` it is the law of `x_s` given `x_t` and `x_0 = D`, that of DDPM. At `sigma(s) = 0` the deviation is 0.

    Reference: Denoising Diffusion Implicit Models, arXiv:2010.02502.
    """
    c = step_coefficients(schedule, t, s)
    kept, fresh = noise_levels(c, eta)
    return (c.alpha_s * prediction.data + kept * prediction.noise).astype(x.dtype), fresh


def ddim_kernel(predictor: Predictor, schedule: Schedule, eta: float | Array = 1.0) -> ReverseKernel:
    """The Gaussian step of DDIM with noise, as a `ReverseKernel`; `eta = 1` is DDPM's ancestral step.

    One evaluation of the model each. A step to `sigma = 0` has no noise, so its `log_prob` is NaN: end the grid of what
    needs it a little above, or leave the last step out.

    Args:
      predictor: of the model, guided or not.
      schedule: the noise schedule.
      eta: noise, above 0: without it there is no density.

    Raises:
      ValueError: `eta` is known and not above 0.

    Reference: Denoising Diffusion Implicit Models, arXiv:2010.02502.
    """
    check_noise(eta=eta)

    def moments(x: Array, t: Array, s: Array) -> tuple[Array, Array]:
        return ddim_moments(x, predictor(x, jnp.broadcast_to(t, x.shape[:1])), t, s, schedule, eta)

    def sample(key: Array, x: Array, t: Array, s: Array) -> Array:
        mean, std = moments(x, t, s)
        return (mean + std * normal(key, x.shape, x.dtype)).astype(x.dtype)

    def log_prob(x_s: Array, x: Array, t: Array, s: Array) -> Array:
        check_same_shape(x_s=x_s, x=x)
        return normal_log_prob(x_s, *moments(x, t, s))

    return ReverseKernel(sample, log_prob)


# --- kernels that look once -------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A state with what the model said of it."""

    x: Array  # [N, ...]
    said: Any  # leaves [N, ...]


def remembering_kernel(
    build: Callable[[Model], ReverseKernel], model: Model, last: Callable[[Array], Array] | None = None
) -> tuple[Callable[[Array, Array], Seen], ReverseKernel]:
    """A kernel on `Seen` states, which keeps what the model said of a state for all who ask about it.

    The value of a state and the step from it are functions of the same evaluation. A plain kernel and a value of
    `x` make it twice, and `svdd` the former for each candidate; with states that remember, each new state is looked at
    once, and copies of it not at all. The law, and the samples of a key, are those of `build(model)`.

    Args:
      build: makes the kernel of a model, such as `lambda model: ddim_kernel(model, schedule)`.
      model: evaluated on every new state.
      last: of a time `s`, whether nothing will be asked of the model there, such as
        `lambda s: schedule.sigma(s) == 0`; it then does not look.

    Returns:
      `look(x, t)`, the state to start with, and the kernel.

    Reference: A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """

    def look(x: Array, t: Array) -> Seen:
        return Seen(x, model(x, jnp.broadcast_to(t, x.shape[:1])))

    def sample(key: Array, state: Seen, t: Array, s: Array) -> Seen:
        new = cast_like(build(lambda x, t: state.said).sample(key, state.x, t, s), state.x)
        looked = lambda: cast_like(look(new, s), state)  # noqa: E731
        return looked() if last is None else jax.lax.cond(last(s), lambda: Seen(new, state.said), looked)

    def log_prob(new: Seen, state: Seen, t: Array, s: Array) -> Array:
        return build(lambda x, t: state.said).log_prob(new.x, state.x, t, s)

    return look, ReverseKernel(sample, log_prob)


def remembered_value(
    build: Callable[[Model], Callable[[Array, Array], Array]],
) -> Callable[[Seen, Array], Array]:
    """A value or twist of `Seen` states, from one of states: `build(model)(x, t)` for the model's remembered word.

    Such as `remembered_value(lambda model: posterior_mean_value(model, reward, schedule))`, or with `fill_in_value`.

    Reference: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
      arXiv:2408.08252.
    """
    return lambda state, t: build(lambda x, t: state.said)(state.x, t)


# --- shared -----------------------------------------------------------------------------------------------------------


def normal_log_prob(x: Array, mean: Array, std: Array) -> Array:
    """`sum log N(x; mean, std^2)` over the event axes, in nats, `[B, ...] -> [B]`; `std` is a scalar."""
    return reduce_events(-0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi), "sum")


def check_noise(**levels: float | Array) -> None:
    """Raises a ValueError that names the argument if a level of noise is known and not above 0."""
    check_known(lambda level: level > 0, "above 0, since a step without noise has no density", **levels)


def check_kernel(**kernels: ReverseKernel) -> None:
    """Raises a ValueError that names the argument unless each is a `ReverseKernel`."""
    for name, kernel in kernels.items():
        if not isinstance(kernel, ReverseKernel):
            raise ValueError(
                f"{name} must be a ReverseKernel, a stochastic step with a density (as ddim_kernel makes one), "
                f"got {type(kernel).__name__}"
            )

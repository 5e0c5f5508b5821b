r"""Steering by weights: particles of a diffusion model carried to the tilt `p(x_0) exp(r(x_0) / beta)`.

Everything here is a start and a `propose` for `smc.run`, whose inputs are pairs of times, `steps(times)`. A twist
`psi_t(x)`, in logarithm, guesses how much a state is worth, `log E[exp(r(x_0) / beta) | x_t = x]` if it is right, and
is `r / beta` itself at the end. Particles at `t` then have the target `p_t(x) psi_t(x)`, whatever the twist: a bad one
costs variance, and no bias beyond that of the kernel's own steps.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, normal
from esscher.core.contracts import Prediction, Predictor, ReverseKernel
from esscher.core.schedules import Schedule
from esscher.samplers import smc
from esscher.samplers.diffusion.kernels import check_kernel, ddim_moments, normal_log_prob
from esscher.samplers.integration import check_times
from esscher.samplers.steppers.coefficients import shift_score, step_coefficients

__all__ = ["Looked", "Potential", "fk_steering", "steps", "tds", "twisted"]

Twist = Callable[[Array, Array], Array]
"""`(x[B, ...], t) -> [B]`, in nats; `t` is a scalar."""

Potential = Literal["difference", "max", "sum"]


def steps(times: Array) -> tuple[Array, Array]:
    """The pairs `(t, s)` of a decreasing grid, `[N + 1] -> ([N], [N])`: the inputs of `smc.run`.

    Raises:
      ValueError: as `integrate`.
    """
    check_times(times)
    return times[:-1], times[1:]


def twisted(
    kernel: ReverseKernel, log_twist: Twist, proposal: ReverseKernel | None = None
) -> tuple[Callable[[Array, Array], smc.Particles], smc.Propose]:
    r"""SMC for any kernel and any twist, continuous or discrete, with proposals of its own if asked for.

    `log w += log p(x_s | x_t) + log psi_s(x_s) - log psi_t(x_t) - log q(x_s | x_t)`

    Without a proposal the kernel proposes and its density cancels. With the optimal twist and the proposal
    `p(x_s | x_t) psi_s(x_s) / psi_t(x_t)` all increments are 0. The law of the weighted particles at the end is
    `p(x_0) exp(r / beta)` with `p` the law that the kernel's own steps reach.

    Args:
      kernel: of the model.
      log_twist: `(x, s) -> [B]`, the log of the reward's exponential at the last time; evaluated once a step. With a
        `kernels.remembering_kernel` states are its `Seen` ones, and the model looks once a step for twist and kernel.
      proposal: where particles go; wherever the kernel goes and the twist is above 0.

    Returns:
      `start(x, t)`, which weighs states at the first time, and `propose` over `steps(times)`.

    Raises:
      ValueError: a kernel that is no `ReverseKernel`.

    Reference: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775; A General
      Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    check_kernel(kernel=kernel, proposal=proposal or kernel)

    def start(x: Array, t: Array) -> smc.Particles:
        value = log_twist(x, t)
        return smc.begin((x, value), value)

    def propose(key: Array, state: tuple[Array, Array], ends: tuple[Array, Array]) -> tuple[Any, Array]:
        (x, value), (t, s) = state, ends
        new = (proposal or kernel).sample(key, x, t, s)
        found = log_twist(new, s)
        delta = found - value
        if proposal is not None:
            delta += kernel.log_prob(new, x, t, s) - proposal.log_prob(new, x, t, s)
        return (new, found), delta

    return start, propose


# --- twists from what the model says of the data: one evaluation of it a step -----------------------------------------


class Looked(NamedTuple):
    """A state, and what was found of it when the model looked."""

    x: Array  # [N, ...]
    prediction: Prediction
    pull: Array  # [N, ...] gradient of the log-reward of the data term in x; zeros where it is not asked for
    reach: Array  # [N] the running maximum or sum of the log-reward
    paid: Array  # [N] what has been counted of it in the weights


def tds(
    predictor: Predictor, log_reward: Callable[[Array], Array], schedule: Schedule, *, eta: float | Array = 1.0
) -> tuple[Callable[[Array, Array], smc.Particles], smc.Propose]:
    r"""The twisted diffusion sampler: twist `r(D(x_t)) / beta`, and proposals that follow its gradient.

    The step's data term is moved by `(sigma^2 / alpha) grad_x r(D(x)) / beta`, as by classifier guidance, and the
    weights make up for it. So the target is that of `twisted`, at any number of steps; gradients go through the model.

    Args:
      predictor: of the model; one evaluation, and its gradient, a step.
      log_reward: `r / beta` of clean data, `[N, ...] -> [N]`.
      schedule: the noise schedule.
      eta: noise of the steps, see `kernels.ddim_moments`.

    Returns:
      As `twisted`.

    Reference: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775.
    """
    return _looking(predictor, log_reward, schedule, eta, "difference", True)


def fk_steering(
    predictor: Predictor,
    log_reward: Callable[[Array], Array],
    schedule: Schedule,
    *,
    potential: Potential = "difference",
    eta: float | Array = 1.0,
) -> tuple[Callable[[Array, Array], smc.Particles], smc.Propose]:
    r"""Feynman-Kac steering: the model's own steps, weighted by what its data term is worth, `R_t = r(D(x_t)) / beta`.

    The grid must end at `sigma = 0`. The log-potential of a step is `R_s - R_t` ("difference"), the largest `R` so far
    ("max") or the sum of all ("sum"); the last step divides by all that was counted, so that each multiplies to
    `exp(r(x_0) / beta)` and has the target of `twisted`. The reward needs no gradient.

    Args:
      predictor: of the model; one evaluation a step.
      log_reward: `r / beta` of clean data, `[N, ...] -> [N]`.
      schedule: the noise schedule.
      potential: see above.
      eta: noise of the steps, see `kernels.ddim_moments`.

    Returns:
      As `twisted`.

    Raises:
      ValueError: an unknown potential.

    Reference: A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    if potential not in ("difference", "max", "sum"):
        raise ValueError(f'potential must be "difference", "max" or "sum", got {potential!r}')
    return _looking(predictor, log_reward, schedule, eta, potential, False)


def _looking(
    predictor: Predictor,
    log_reward: Callable[[Array], Array],
    schedule: Schedule,
    eta: float | Array,
    potential: Potential,
    follow: bool,
) -> tuple[Callable[[Array, Array], smc.Particles], smc.Propose]:
    def look(x: Array, t: Array) -> tuple[Prediction, Array, Array]:
        def total(x: Array) -> tuple[Array, tuple[Prediction, Array]]:
            prediction = predictor(x, jnp.broadcast_to(t, x.shape[:1]))
            value = at_least_float32(log_reward(prediction.data))
            return value.sum(), (prediction, value)

        if not follow:
            return *total(x)[1], jnp.zeros_like(x)
        pull, found = jax.grad(total, has_aux=True)(x)
        return *found, pull

    def start(x: Array, t: Array) -> smc.Particles:
        prediction, value, pull = look(x, t)
        return smc.begin(Looked(x, prediction, pull, value, value), value)

    def propose(key: Array, state: Looked, ends: tuple[Array, Array]) -> tuple[Looked, Array]:
        x, (t, s) = state.x, ends
        c = step_coefficients(schedule, t, s)
        mean, std = ddim_moments(x, state.prediction, t, s, schedule, eta)
        noise, delta = normal(key, x.shape, x.dtype), 0.0
        if follow:
            # The last step has no noise to be moved by, and so no density to make up for it with.
            noisy = std > 0
            moved = shift_score(state.prediction, state.pull, c.alpha_t, c.sigma_t)
            moved_mean = jnp.where(noisy, ddim_moments(x, moved, t, s, schedule, eta)[0], mean)
            safe = jnp.where(noisy, std, 1.0)
            new = moved_mean + std * noise
            delta = normal_log_prob(new, mean, safe) - normal_log_prob(new, moved_mean, safe)
        else:
            new = mean + std * noise
        new = new.astype(x.dtype)

        def at_the_end() -> tuple[Prediction, Array, Array]:
            return state.prediction, at_least_float32(log_reward(new)), state.pull

        last = schedule.sigma(s) == 0
        prediction, value, pull = jax.lax.cond(last, at_the_end, lambda: look(new, s))
        reach = {"difference": value, "max": jnp.maximum(state.reach, value), "sum": state.reach + value}[potential]
        gain = jnp.where(last | (potential == "difference"), value - state.paid, reach)
        return Looked(new, prediction, pull, reach, state.paid + gain), delta + gain

    return start, propose

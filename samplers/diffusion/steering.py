r"""Steering by weights: particles of a diffusion model carried to the tilt `p(x_0) exp(r(x_0) / beta)`.

Everything here is a start and a `propose` for `smc.run`, whose inputs are pairs of times, `steps(times)`. A twist
`psi_t(x)`, in logarithm, guesses how much a state is worth, `log E[exp(r(x_0) / beta) | x_t = x]` if it is right, and
is `r / beta` itself at the end. Particles at `t` then have the target `p_t(x) psi_t(x)`, whatever the twist above 0: a
bad one costs variance, and no bias beyond that of the kernel's own steps. A twist of 0 is final. So a reward that
forbids some data, `-inf`, must not be asked of what the model expects on the way, which may yet become allowed.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, cast_like, normal, one_per_example
from esscher.core.contracts import Prediction, Predictor, ReverseKernel
from esscher.core.schedules import Schedule
from esscher.samplers import smc
from esscher.samplers.diffusion.kernels import check_kernel, check_noise, ddim_moments, normal_log_prob
from esscher.samplers.integration import check_times
from esscher.samplers.steppers.coefficients import shift_score, step_coefficients

__all__ = ["Looked", "Potential", "check_ends", "fk_steering", "steps", "tds", "twisted"]

Twist = Callable[[Array, Array], Array]
"""`(x[B, ...], t) -> [B]`, in nats; `t` is a scalar."""

Potential = Literal["difference", "max", "sum"]


def steps(times: Array) -> tuple[Array, Array]:
    """The pairs `(t, s)` of a decreasing grid, `[N + 1] -> ([N], [N])`: the inputs of `smc.run`.

    Raises:
      ValueError: as `integrate`.
    """
    times = check_times(times)
    return times[:-1], times[1:]


def check_ends(ends: Any) -> tuple[Array, Array]:
    """The two ends of a step, as `smc.run` hands them on; a ValueError if its inputs were not those of `steps`."""
    try:
        t, s = ends
    except (TypeError, ValueError) as error:
        raise ValueError("inputs must be steering.steps(times), the pairs of a grid") from error
    return t, s


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
      log_twist: `(x, s) -> [N]`, the log of the reward's exponential at the last time; evaluated once a step. With a
        `kernels.remembering_kernel` states are its `Seen` ones, and the model looks once a step for twist and kernel.
      proposal: where particles go; wherever the kernel goes and the twist is above 0.

    Returns:
      `start(x, t)`, which weighs states at the first time, and `propose` over `steps(times)`.

    Raises:
      ValueError: a kernel that is no `ReverseKernel`, a twist that is not `[N]`.

    Reference: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775; A General
      Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    check_kernel(kernel=kernel, proposal=proposal or kernel)

    def twist(x: Any, t: Array) -> Array:
        return at_least_float32(one_per_example(jax.tree.leaves(x)[0], log_twist=log_twist(x, t)))

    def start(x: Array, t: Array) -> smc.Particles:
        value = twist(x, t)
        return smc.begin((x, value), value)

    def propose(key: Array, state: tuple[Array, Array], ends: tuple[Array, Array]) -> tuple[Any, Array]:
        (x, value), (t, s) = state, check_ends(ends)
        new = (proposal or kernel).sample(key, x, t, s)
        found = twist(new, s)
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
    weights make up for it. So the target is that of `twisted`, at any number of steps, if the grid ends at
    `sigma = 0`; gradients go through the model.

    Args:
      predictor: of the model; one evaluation, and its gradient, a step.
      log_reward: `r / beta` of clean data, `[N, ...] -> [N]`.
      schedule: the noise schedule.
      eta: noise of the steps, see `kernels.ddim_moments`.

    Returns:
      As `twisted`.

    Raises:
      ValueError: a known `eta` that is not above 0, a reward that is not `[N]`.

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
      ValueError: an unknown potential; as `tds`.

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
    """Particles that look once a step, and follow the gradient of what they see or do not."""
    check_noise(eta=eta)

    def worth(x: Array) -> Array:
        return at_least_float32(one_per_example(x, log_reward=log_reward(x)))

    def look(x: Array, t: Array) -> tuple[Prediction, Array, Array]:
        def total(x: Array) -> tuple[Array, tuple[Prediction, Array]]:
            prediction = predictor(x, jnp.broadcast_to(t, x.shape[:1]))
            value = worth(prediction.data)
            return value.sum(), (prediction, value)

        if not follow:
            return *total(x)[1], jnp.zeros_like(x)
        pull, found = jax.grad(total, has_aux=True)(x)
        return *found, pull

    def start(x: Array, t: Array) -> smc.Particles:
        prediction, value, pull = look(x, t)
        return smc.begin(Looked(x, prediction, pull, value, value), value)

    def propose(key: Array, state: Looked, ends: tuple[Array, Array]) -> tuple[Looked, Array]:
        t, s = check_ends(ends)
        new, delta = _moved(key, state, t, s, schedule, eta, follow)
        last = schedule.sigma(s) == 0
        before = state.prediction, state.paid, state.pull
        at_the_end = lambda: (state.prediction, worth(new).astype(state.paid.dtype), state.pull)  # noqa: E731
        # Times may be finer than states, and a model may answer in their precision.
        looked = lambda: cast_like(look(new, s), before)  # noqa: E731
        prediction, value, pull = jax.lax.cond(last, at_the_end, looked)
        reach = {"difference": value, "max": jnp.maximum(state.reach, value), "sum": state.reach + value}[potential]
        gain = jnp.where(last | (potential == "difference"), value - state.paid, reach)
        return Looked(new, prediction, pull, reach, state.paid + gain), delta + gain

    return start, propose


def _moved(
    key: Array, state: Looked, t: Array, s: Array, schedule: Schedule, eta: float | Array, follow: bool
) -> tuple[Array, Array | float]:
    """The model's step, or one that follows the pull with `log p - log q` of it."""
    x, c = state.x, step_coefficients(schedule, t, s)
    mean, std = ddim_moments(x, state.prediction, t, s, schedule, eta)
    noise = normal(key, x.shape, x.dtype)
    if not follow:
        return (mean + std * noise).astype(x.dtype), 0.0
    # The last step has no noise to be moved by, and so no density to make up for it with.
    noisy = std > 0
    shifted = shift_score(state.prediction, state.pull, c.alpha_t, c.sigma_t)
    moved = jnp.where(noisy, ddim_moments(x, shifted, t, s, schedule, eta)[0], mean)
    safe = jnp.where(noisy, std, 1.0)
    new = moved + std * noise
    return new.astype(x.dtype), normal_log_prob(new, mean, safe) - normal_log_prob(new, moved, safe)

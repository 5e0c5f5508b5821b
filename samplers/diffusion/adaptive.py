r"""Guidance that depends on how sampling goes: when to stop guiding, how strongly to guide, by what, from where.

What must be remembered from step to step makes these steppers that wrap a stepper; `integrate` drives them with the
conditional model as its predictor, or `integration.carried`, which also tells what they remembered.

Two more methods need no function: reinforcement learning guidance is `guidance.cfg(tuned, base, w)`, and shielding
from a prompt is `guidance.mix((uncond, rewritten, original), (w (1 - m), w m))`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr

from esscher.core.arrays import (
    at_least_float32,
    cast_like,
    check_floating,
    check_per_example,
    check_same_shape,
    expand_like,
    reduce_events,
    safe_sqrt,
    squared_norm,
)
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.guidance import Weight, cfg
from esscher.samplers.steppers.coefficients import implied_data, step_coefficients

__all__ = [
    "Greedy",
    "Latch",
    "LinearGuidance",
    "Recorded",
    "adaptive_cfg",
    "black_scholes_call",
    "combine_evaluators",
    "diffier",
    "fit_linear_guidance",
    "greedy_cfg",
    "inner_optimize",
    "linear_cfg",
    "linear_guidance",
    "switch_condition",
]


def _cfg(cond: Prediction, uncond: Prediction, w: Weight, x: Array, t: Array) -> Prediction:
    """`guidance.cfg` of predictions that are known, in the types of the conditional one."""
    return cast_like(cfg(lambda x, t: cond, lambda x, t: uncond, w)(x, t), cond)


class Latch(NamedTuple):
    """What `adaptive_cfg` remembers."""

    latched: Array  # [B] whether guidance is over
    evaluations: Array  # [] steps that have begun with a look at the unconditional model
    carry: Any  # of the stepper


def adaptive_cfg(stepper: Stepper, uncond: Predictor, w: Weight, threshold: Weight = 0.991) -> Stepper:
    r"""Classifier-free guidance until both models point the same way; from then on the conditional model alone.

    An example is guided while `cos(eps_cond, eps_uncond) <= threshold`, and never again after the first step in which
    that is not so. Once no example is guided the unconditional model is not evaluated: the saving is that of the
    slowest of the batch, and none under `vmap`, where both branches run. The law is that of `guidance.cfg` whose weight
    falls to 1 on the way; at a threshold of 1 it is `guidance.cfg`, below -1 the conditional model.

    Args:
      stepper: takes the steps; where it evaluates within a step, examples are guided as at its start.
      uncond: unconditional predictor; that of the integration is the conditional one.
      w: guidance weight: a scalar, `[B]`, or a function of time.
      threshold: a cosine of noise terms, likewise. Where all is noise perfect models agree too: there let it be 1.

    Raises:
      ValueError: `w` or `threshold` is neither a scalar nor `[B]`.

    Reference: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487.
    """

    def guide(cond: Prediction, x: Array, t: Array, latched: Array, level: float | Array) -> tuple[Prediction, Array]:
        def both() -> tuple[Prediction, Array]:
            free = uncond(x, t)
            done = latched | (_cosine(cond.noise, free.noise) > level)
            guided = _cfg(cond, free, w, x, t)
            return jax.tree.map(lambda c, g: jnp.where(expand_like(done, c), c, g), cond, guided), done

        return jax.lax.cond(latched.all(), lambda: (cond, latched), both)

    def step(key, x, prediction, t, s, carry, predictor):
        times = jnp.broadcast_to(t, x.shape[:1])
        level = threshold(times) if callable(threshold) else threshold
        check_per_example(x, threshold=level)
        out, latched = guide(prediction, x, times, carry.latched, level)
        within = lambda x, t: guide(predictor(x, t), x, t, latched, 1.0)[0]  # noqa: E731
        x, inner = stepper.step(key, x, out, t, s, carry.carry, within)
        return x, Latch(latched, carry.evaluations + ~carry.latched.all(), inner)

    return Stepper(lambda x: Latch(jnp.zeros(len(x), bool), jnp.zeros((), jnp.int32), stepper.init(x)), step)


def _cosine(a: Array, b: Array) -> Array:
    """Cosine of each pair, `[B, ...] -> [B]`, at most 1 in spite of rounding; 0 where one of them is 0."""
    a, b = at_least_float32(a), at_least_float32(b)
    norms = safe_sqrt(squared_norm(a)) * safe_sqrt(squared_norm(b))
    return jnp.minimum(reduce_events(a * b, "sum") / jnp.where(norms == 0, 1.0, norms), 1.0)


class LinearGuidance(NamedTuple):
    """Coefficients of the unconditional noise term at step `i` (row) in what is known by then, from step `j`."""

    cond: Array  # [T, T], lower triangular
    uncond: Array  # [T, T], strictly lower triangular


class Recorded(NamedTuple):
    """What `linear_cfg` remembers: the noise terms of all steps so far, and zeros."""

    step: Array  # []
    cond: Array  # [T, B, ...]
    uncond: Array  # [T, B, ...] evaluated or estimated
    carry: Any  # of the stepper


def fit_linear_guidance(cond: Array, uncond: Array, evaluated: Array | None = None) -> LinearGuidance:
    r"""Least squares for `eps_uncond(x_i) ~ sum_(j <= i) a_ij eps_cond(x_j) + sum_(j < i) b_ij eps_uncond(x_j)`.

    One number for each pair of steps; where they are not determined, those of least norm. No gradient flows.

    Args:
      cond: conditional noise terms on recorded paths, `[T, N, ...]`, as `linear_cfg` carries them.
      uncond: unconditional ones, in the same shape.
      evaluated: `[T]`, the steps to which the second sum is restricted; by default all.

    Raises:
      ValueError: histories of different shapes or not floating, or `evaluated` that is not `[T]`.

    Reference: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487.
    """
    check_floating(cond=cond, uncond=uncond)
    check_same_shape(cond=cond, uncond=uncond)
    count = len(cond)
    known = jnp.ones(count, bool) if evaluated is None else evaluated
    _check_steps(count, evaluated=known)
    columns = jnp.concatenate([cond, uncond]).reshape(2 * count, -1).T
    # The triangle has the same solutions, and the condition of the histories, which is bad, not its square.
    triangle = jnp.linalg.qr(at_least_float32(jax.lax.stop_gradient(columns)), mode="r")

    def fit(i: Array) -> Array:
        steps = jnp.arange(count)
        usable = jnp.concatenate([steps <= i, (steps < i) & known])
        return jnp.where(usable, jnp.linalg.lstsq(triangle * usable, triangle[:, count + i])[0], 0.0)

    return LinearGuidance(*jnp.split(jax.lax.map(fit, jnp.arange(count)), 2, axis=1))


def linear_guidance(coefficients: LinearGuidance, i: Array, cond: Array, uncond: Array) -> Array:
    """The unconditional noise term of step `i` from those of this and earlier steps, `[T, B, ...] -> [B, ...]`.

    Histories hold the noise terms of all steps; what stands for later ones is multiplied by 0.

    Raises:
      ValueError: histories of different shapes or not floating, or of another number of steps than the coefficients.

    Reference: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487.
    """
    check_floating(cond=cond, uncond=uncond)
    check_same_shape(cond=cond, uncond=uncond)
    _check_steps(len(cond), coefficients=coefficients.cond[0])
    parts = ((coefficients.cond, cond), (coefficients.uncond, uncond))
    return sum(jnp.tensordot(rows[i], history, 1) for rows, history in parts)


def linear_cfg(
    stepper: Stepper, uncond: Predictor, w: Weight, coefficients: LinearGuidance, evaluated: Array, schedule: Schedule
) -> Stepper:
    r"""Classifier-free guidance whose unconditional term is `linear_guidance` in the steps that are not evaluated.

    With all steps evaluated it is `guidance.cfg`, and `carried` returns the histories that `fit_linear_guidance` wants.
    Where it is not evaluated the unconditional data term follows from the noise term; at `alpha = 0` it is taken to be
    the conditional one.

    Args:
      stepper: takes the steps, of one evaluation each; `uncond` and `w` are as in `adaptive_cfg`.
      uncond: see above.
      w: see above.
      coefficients: for grids of `T` steps.
      evaluated: `[T]`, in which steps the unconditional model is evaluated, as in the fit. The paper alternates in the
        first half of the steps.
      schedule: the noise schedule.

    Raises:
      ValueError: `evaluated` that is not `[T]`, or a stepper that evaluates within a step.

    Reference: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487.
    """
    count = len(coefficients.cond)
    _check_steps(count, evaluated=evaluated)

    def step(key, x, prediction, t, s, carry, predictor):
        i, times = carry.step, jnp.broadcast_to(t, x.shape[:1])
        record = lambda past, noise: past.at[i].set(noise.astype(past.dtype))  # noqa: E731
        history = record(carry.cond, prediction.noise)

        def estimate() -> Prediction:
            guess = prediction._replace(noise=linear_guidance(coefficients, i, history, carry.uncond))
            data = implied_data(x, guess, step_coefficients(schedule, t, s))
            return cast_like(guess._replace(data=data), prediction)

        look = lambda: cast_like(uncond(x, times), prediction)  # noqa: E731
        free = jax.lax.cond(jnp.asarray(evaluated, bool)[i], look, estimate)
        x, inner = stepper.step(key, x, _cfg(prediction, free, w, x, times), t, s, carry.carry, _no_second_look)
        return x, Recorded(i + 1, history, record(carry.uncond, free.noise), inner)

    def init(x: Array) -> Recorded:
        empty = jnp.zeros_like(x, shape=(count, *x.shape))
        return Recorded(jnp.zeros((), jnp.int32), empty, empty, stepper.init(x))

    return Stepper(init, step)


def _no_second_look(x: Array, t: Array) -> Prediction:
    raise ValueError("stepper must evaluate the model once a step, got one that evaluates it within a step")


def _check_steps(count: int, **values: Array) -> None:
    ((name, value),) = values.items()
    if jnp.shape(value) != (count,):
        raise ValueError(f"{name} must have one entry for each of {count} steps, got shape {jnp.shape(value)}")


class Greedy(NamedTuple):
    """What `greedy_cfg` remembers of the last step."""

    w: Array  # [B] the weights taken
    scores: Array  # [K, B] of all
    carry: Any  # of the stepper


def greedy_cfg(
    stepper: Stepper, uncond: Predictor, scales: Array, score: Callable[[Array, Array, Array], Array]
) -> Stepper:
    r"""Dynamic guidance: each step with the weight, of several, whose outcome scores best, for each example.

    The models are evaluated once, and candidates share the noise of the step, so that weights alone tell them apart. Of
    equal scores the smallest weight wins; NaN never beats a number. With one weight it is `guidance.cfg`; choices that
    look at the outcome have no law in closed form.

    Args:
      stepper: takes each step `K + 1` times, for the price of one if it evaluates the model once.
      uncond: unconditional predictor; that of the integration is the conditional one.
      scales: weights to choose from, `[K]`.
      score: `(x_s[K, B, ...], data[K, B, ...], s) -> [K, B]` of the outcomes and the guided data terms they come from,
        high where liked; see `combine_evaluators`.

    Raises:
      ValueError: scales that are not `[K]`, or scores that are not `[K, B]`.

    Reference: Dynamic Classifier-Free Diffusion Guidance via Online Feedback, arXiv:2509.16131.
    """
    if jnp.ndim(scales) != 1 or not len(scales):
        raise ValueError(f"scales must be a vector of at least one weight, got shape {jnp.shape(scales)}")

    def step(key, x, prediction, t, s, carry, predictor):
        times = jnp.broadcast_to(t, x.shape[:1])
        free = uncond(x, times)

        def go(w: Array) -> tuple[Array, Any, Array]:
            out = _cfg(prediction, free, w, x, times)
            return *stepper.step(key, x, out, t, s, carry.carry, cfg(predictor, uncond, w)), out.data

        candidates, _, data = jax.vmap(go)(scales)
        scores = score(candidates, data, s)
        if scores.shape != (len(scales), len(x)):
            raise ValueError(f"score must return shape {(len(scales), len(x))}, got {scores.shape}")
        order, liked = jnp.argsort(scales), jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        best = scales[order][jnp.argmax(liked[order], 0)]
        # Taken again, so that what the stepper remembers is that of the choice too; no model is evaluated for it.
        new, inner, _ = go(best)
        return new, Greedy(best, scores, inner)

    zeros = lambda *shape: jnp.zeros_like(scales, shape=shape)  # noqa: E731
    return Stepper(lambda x: Greedy(zeros(len(x)), zeros(len(scales), len(x)), stepper.init(x)), step)


def combine_evaluators(scores: Array, weights: Array) -> Array:
    """`sum_e weights_e z_e`, with scores standardised over the candidates: `[E, K, B] -> [K, B]`.

    `z = (score - mean) / std` over `K`, 0 where an evaluator tells no candidates apart: so units do not matter, and a
    weight of 0 is for an evaluator that cannot yet judge at a noise level.

    Raises:
      ValueError: scores that are not floating `[E, K, B]`, of `E` evaluators, or weights that are not `[E]`.

    Reference: Dynamic Classifier-Free Diffusion Guidance via Online Feedback, arXiv:2509.16131.
    """
    check_floating(scores=scores)
    if scores.ndim != 3 or jnp.shape(weights) != scores.shape[:1]:
        raise ValueError(f"scores must be [E, K, B] and weights [E], got {scores.shape} and {jnp.shape(weights)}")
    scores = at_least_float32(scores)
    centered = scores - scores.mean(1, keepdims=True)
    std = safe_sqrt(jnp.square(centered).mean(1, keepdims=True))
    apart = std > 8 * jnp.finfo(std.dtype).eps * jnp.abs(scores).max(1, keepdims=True)
    return jnp.tensordot(weights, jnp.where(apart, centered / jnp.where(apart, std, 1.0), 0.0), 1)


def switch_condition(prices: Array) -> Array:
    """The condition to take the next step under, that of the lowest price, the first of equals: `[K, B] -> [B]`.

    Prices are those of this step's data term under each condition, such as `black_scholes_call` of scores. The result
    blends conditions, and has no law in closed form.

    Reference: Prompt Mixing in Diffusion Models using the Black Scholes Algorithm, arXiv:2405.13685.
    """
    if jnp.ndim(prices) != 2:
        raise ValueError(f"prices must have shape [K, B], got {jnp.shape(prices)}")
    return jnp.argmin(prices, 0).astype(jnp.int32)


def black_scholes_call(spot: Array, strike: Array, rate: Array, volatility: Array, time: Array) -> Array:
    r"""`S Phi(d_1) - K e^(-r T) Phi(d_2)`, `d_(1,2) = (log(S / K) + r T) / (v sqrt T) +- v sqrt(T) / 2`, a call.

    Elementwise; without volatility or time it is `max(S - K e^(-r T), 0)`. Spot and strike are positive.

    Reference: Prompt Mixing in Diffusion Models using the Black Scholes Algorithm, arXiv:2405.13685.
    """
    spread = volatility * safe_sqrt(jnp.asarray(time))
    paid = strike * jnp.exp(-rate * time)
    safe = jnp.where(spread > 0, spread, 1.0)
    d = jnp.log(spot / paid) / safe
    price = spot * ndtr(d + 0.5 * safe) - paid * ndtr(d - 0.5 * safe)
    return jnp.where(spread > 0, price, jnp.maximum(spot - paid, 0.0))


def inner_optimize(x: Array, loss: Callable[[Array], Array], n: int, rate: float | Array) -> Array:
    """`n` steps of gradient descent, `x - rate grad loss(x)`, with a loss for each example; the rate may be `[B]`.

    Reference: Optimizing Diffusion Models with Iterative Error Reduction, arXiv:2508.13628.
    """
    check_floating(x=x)
    slope = jax.grad(lambda x: loss(x).sum())
    return jax.lax.fori_loop(0, n, lambda _, x: x - (expand_like(rate, x) * slope(x)).astype(x.dtype), x)


def diffier(stepper: Stepper, schedule: Schedule, n: int, rate: float | Array) -> Stepper:
    r"""Iterative error reduction: before a step the state is moved to where the model agrees with its last data term.

    `n` steps of descent on `|eps(x, t) - (x - alpha D_prev) / sigma|^2 = (alpha / sigma)^2 |D(x, t) - D_prev|^2`, from
    the second step on, through the model. So paths are straightened, and as steps shrink nothing moves. With `n = 0` it
    is the stepper; with guidance there is no law in closed form.

    Reference: Optimizing Diffusion Models with Iterative Error Reduction, arXiv:2508.13628.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        (before, started, inner), times = carry, jnp.broadcast_to(t, x.shape[:1])
        odds = (schedule.alpha(t) / schedule.sigma(t)) ** 2
        if n:
            error = lambda x: odds * squared_norm(predictor(x, times).data - before)  # noqa: E731
            x = jnp.where(started, inner_optimize(x, error, n, rate), x)
            prediction = predictor(x, times)
        x, inner = stepper.step(key, x, prediction, t, s, inner, predictor)
        return x, (prediction.data, jnp.ones_like(started), inner)

    return Stepper(lambda x: (x, jnp.zeros((), bool), stepper.init(x)), step)

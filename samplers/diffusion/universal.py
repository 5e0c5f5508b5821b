r"""Universal guidance, and what else is done about a step so that an energy is met: before it, within it, once more.

The published algorithm is `self_recurrence(stepper, schedule, k)`, driven with `energy_guidance`, its forward half,
inside `backward_guidance`. `noisy_energy_guidance` takes an energy, or a classifier, of the noisy state itself, so that
the model need not look first. None of this samples the tilt but in special cases, which are named: `steering` has
samplers that do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import check_per_example, expand_like, one_per_example, safe_sqrt, squared_norm
from esscher.core.contracts import Prediction, Predictor, Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.diffusion.adaptive import inner_optimize
from esscher.samplers.diffusion.energy import Energy, StepWeight, normalized_guidance, tempered_log_ratio
from esscher.samplers.steppers.coefficients import standard_normal, step_coefficients

__all__ = ["backward_guidance", "noisy_energy_guidance", "self_recurrence", "tempered_classifier_step"]


def backward_guidance(
    predictor: Predictor, energy: Energy, schedule: Schedule, n: int, rate: float | Array
) -> Predictor:
    r"""Backward universal guidance: `D' = D + Delta`, `eps' = eps - (alpha / sigma) Delta`, `Delta` low in energy.

    `Delta` is where `n` steps of gradient descent on `E(D + Delta, t)` end that start at 0; the model looks once, and
    is not differentiated. One step is `energy_guidance` in the data term with the weight `rate`; for
    `E = |D - y|^2 / 2` `n` steps are that with the weight `1 - (1 - rate)^n`. The law is not the tilt:
    as `n` grows every data term becomes a minimum of the energy, however unlikely it is to the model. Around
    `energy_guidance` the descent starts at the guided data term; so does the published code, where the paper's
    algorithm has the unguided one.

    Args:
      predictor: of the model, guided or not.
      energy: of the data term.
      schedule: the noise schedule; `sigma(t) > 0`.
      n: how many steps; with none it is the predictor.
      rate: their size, a scalar or `[B]`.

    Raises:
      ValueError: `rate` is neither a scalar nor `[B]`, or the energy does not return `[B]`.

    Reference: Universal Guidance for Diffusion Models, arXiv:2302.07121.
    """

    def predict(x: Array, t: Array) -> Prediction:
        check_per_example(x, rate=rate)
        out = predictor(x, t)
        data = inner_optimize(out.data, lambda data: one_per_example(x, energy=energy(data, t)), n, rate)
        alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
        return Prediction(data, out.noise - alpha / sigma * (data - out.data))

    return predict


def self_recurrence(stepper: Stepper, schedule: Schedule, k: int) -> Stepper:
    r"""Takes each step `k` times: between two the noise is put back, `x_t = (alpha_t / alpha_s) x_s + tau z`.

    `tau^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2`: that is the forward process from `s` to `t`. With exact draws
    from `p(x_s | x_t)` it is Gibbs sampling of the pair, so that the law of `x_s` stays right where it was right, and
    tends to it where not. Any other step, coarse or guided, has a limit of its own, in closed form where it is affine.
    Each repetition starts from the history that the step was given, and looks at the new `x_t`.

    Args:
      stepper: takes the steps.
      schedule: the noise schedule.
      k: how often; once is the stepper.

    Raises:
      ValueError: `k` below 1.

    Reference: Universal Guidance for Diffusion Models, arXiv:2302.07121; RePaint: Inpainting using Denoising Diffusion
      Probabilistic Models, arXiv:2201.09865.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k == 1:
        return stepper

    def step(key, x, prediction, t, s, carry, predictor):
        c, times = step_coefficients(schedule, t, s), jnp.broadcast_to(t, x.shape[:1])
        shrink, tau = c.alpha_t / c.alpha_s, c.sigma_t * jnp.sqrt(-jnp.expm1(-2 * c.h))

        def go(key, x, prediction):
            new = stepper.step(key, x, prediction, t, s, carry, predictor)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, (x, carry))

        def again(done, key):
            noise_key, step_key = jax.random.split(key)
            noisy = (shrink * done[0] + tau * standard_normal(noise_key, x)).astype(x.dtype)
            return go(step_key, noisy, predictor(noisy, times)), None

        keys = jax.random.split(key, k)
        return jax.lax.scan(again, go(keys[0], x, prediction), keys[1:])[0]

    return Stepper(stepper.init, step)


# --- energies of noisy states -----------------------------------------------------------------------------------------


def noisy_energy_guidance(
    stepper: Stepper,
    energy: Energy,
    w: StepWeight = 1.0,
    *,
    seen: Callable[[Array], Array] | None = None,
    shape: Callable[[Array, Array], Array] | None = None,
) -> Stepper:
    r"""Moves the state before each step, `x^ = x - w grad E(x, t)`, and steps from there, where the model looks.

    With the exact `E = -log p(y | x_t)` and `w = (t - s) g2(t) / 2` a solver of the flow samples `p(x_0 | y)` in the
    limit of small steps, as `guidance.classifier` does at 1; ancestral steps do with twice that weight. Any other
    weight has no law in closed form, and a constant one depends on the number of steps. The prediction at `(x, t)` is
    not used, and not computed once compiled.

    Args:
      stepper: takes the step.
      energy: of the noisy state, `(x[B, ...], t[B]) -> [B]`.
      w: weight: a scalar, `[B]`, or a function of `(t, s)`.
      seen: what the energy is shown of the state, `x[B, ...] -> [B, ...]`; the gradient is taken in that, and not in
        the state. The state itself by default.
      shape: what is done to the gradient first, `(gradient[B, ...], x[B, ...]) -> gradient`; nothing by default.

    Raises:
      ValueError: a weight or an energy of a wrong shape.

    Reference: Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233; Elucidating The Design Space of
      Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """

    def step(key, x, prediction, t, s, carry, predictor):
        size, times = w(t, s) if callable(w) else w, jnp.broadcast_to(t, x.shape[:1])
        check_per_example(x, w=size)
        slope = jax.grad(lambda x: one_per_example(x, energy=energy(x, times)).sum())(x if seen is None else seen(x))
        slope = slope if shape is None else shape(slope, x)
        moved = (x - expand_like(size, x) * slope).astype(x.dtype)
        return stepper.step(key, moved, predictor(moved, times), t, s, carry, predictor)

    return Stepper(stepper.init, step)


def tempered_classifier_step(
    stepper: Stepper,
    logits: Callable[[Array], Array],
    targets: Array,
    w: StepWeight,
    *,
    joint: float | Array = 1.0,
    marginal: float | Array = 0.0,
) -> Stepper:
    r"""EluCD on noisy states: `x^ = x + w rms(x) g / rms(g)`, `g = grad_z l(z)` at `z = x / max(1, rms(x))`.

    `l` is `tempered_log_ratio` of a classifier of clean data, which is shown the state on the scale of data; the model
    is not asked for its data term, compare `tempered_classifier`. The published sampler wraps `edm_stochastic`, and on
    a grid `times` its `w` is `lambda t, s: sine_boost(jnp.sum(times > t), len(times), 0.004, 0.3)`. There is no law in
    closed form; at `w = 0` it is the stepper's.

    Args:
      stepper: takes the step.
      logits: of the classifier, `[B, ...] -> [B, K]`.
      targets: the classes asked for, `[B]`; `joint` and `marginal` are as in `tempered_log_ratio`.
      w: how far to go, in units of the state: a scalar, `[B]`, or a function of `(t, s)`.

    Raises:
      ValueError: as `noisy_energy_guidance` and `tempered_log_ratio`.

    Reference: Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.
    """

    def energy(x: Array, t: Array) -> Array:
        return -tempered_log_ratio(logits(x), targets, joint, marginal)

    def on_the_scale_of_data(x: Array) -> Array:
        size = jnp.maximum(1.0, safe_sqrt(squared_norm(x, "mean")))
        return (x / expand_like(size, x)).astype(x.dtype)

    return noisy_energy_guidance(stepper, energy, w, seen=on_the_scale_of_data, shape=normalized_guidance)

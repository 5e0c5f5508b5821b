"""Guidance: functions from predictors to a predictor; everywhere `w = 0` is unconditional and `w = 1` conditional."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import check_known, check_per_example, expand_like, is_known, one_per_example, reduce_events
from esscher.core.contracts import Prediction, Predictor
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import shift_score

__all__ = ["Weight", "autoguidance", "cfg", "cfg_plus_plus", "classifier", "interval", "mix", "rescale"]

Weight = float | Array | Callable[[Array], Array]
"""A guidance weight: a scalar, one per example `[B]`, or a function of time `t[B] -> [B]`."""


def _weight(w: Weight, t: Array, x: Array, name: str = "w") -> Array:
    w = w(t) if callable(w) else w
    check_per_example(x, **{name: w})
    return expand_like(w, x)


def mix(predictors: Sequence[Predictor], weights: Sequence[Weight]) -> Predictor:
    """Linear mix of predictors: `out = p_0 + sum_k w_k (p_k - p_0)`, on both terms of the prediction.

    The first predictor is the base and gets what the others leave, `1 - sum_k w_k`: so the mix still puts `x` together.
    `cfg` is `(uncond, cond)`, `autoguidance` `(weak, strong)`, guidance towards one prompt and away
    from another `(uncond, wanted, unwanted)` with weights `(w, -v)`.

    Args:
      predictors: the base and the others.
      weights: one for each of the others: a scalar, `[B]`, or a function of time.

    Raises:
      ValueError: the number of weights is not one less than that of predictors, or a weight `w` is neither a scalar
        nor `[B]`.

    Reference: Composable Diffusion, arXiv:2206.01714.
    """
    if len(weights) != len(predictors) - 1:
        raise ValueError(
            f"weights must have one w for each predictor but the first, got {len(weights)} for {len(predictors)}"
        )

    def predict(x: Array, t: Array) -> Prediction:
        base, *others = (predictor(x, t) for predictor in predictors)
        out = base
        for w, other in zip((_weight(w, t, x) for w in weights), others, strict=True):
            out = jax.tree.map(lambda out, other, base: out + w * (other - base), out, other, base)
        return out

    return predict


def cfg(cond: Predictor, uncond: Predictor, w: Weight) -> Predictor:
    """Classifier-free guidance: `out = uncond + w (cond - uncond)`, on both terms of the prediction.

    With a weaker model in the place of `uncond` it is `autoguidance`; with a base and an aligned model it slides
    between them. It does not sample `p_uncond^(1-w) p_cond^w` (see `core.exact.gaussians.cfg_law` for what it samples).

    Args:
      cond: conditional predictor.
      uncond: unconditional (or weaker) predictor.
      w: guidance weight: a scalar, `[B]`, or a function of time such as `interval`.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`.

    Reference: Classifier-Free Diffusion Guidance, arXiv:2207.12598.
    """
    return mix((uncond, cond), (w,))


def autoguidance(strong: Predictor, weak: Predictor, w: Weight) -> Predictor:
    """Autoguidance: `out = weak + w (strong - weak)`, away from what a bad version of the model gets wrong.

    Both models have the same condition, or none, so that their difference is their errors' and not a class's.

    Args:
      strong: the model.
      weak: a smaller or less trained model of the same law, the worse for the same reasons.
      w: guidance weight: a scalar, `[B]`, or a function of time; 1 is the strong model.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`.

    Reference: Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507.
    """
    return cfg(strong, weak, w)


def interval(w: Weight, low: float | Array, high: float | Array) -> Callable[[Array], Array]:
    """A weight for `cfg` that guides only while `low <= t <= high`: `w` there, and 1 (the conditional model) elsewhere.

    Args:
      w: weight inside: a scalar, `[B]`, or a function of time.
      low: lower end, in the schedule's time, a scalar or `[B]`.
      high: upper end, likewise, not below `low`.

    Returns:
      The function `t[B] -> [B]`.

    Raises:
      ValueError: `high` is below `low`, where both are known; once called, a value that is neither a scalar nor `[B]`.

    Reference: Applying Guidance in a Limited Interval Improves Sample and Distribution Quality, arXiv:2404.07724.
    """
    if is_known(low):
        check_known(lambda high: high >= np.asarray(low), f"at least low={low}", high=high)

    def weight(t: Array) -> Array:
        t = jnp.asarray(t)
        check_per_example(t, low=low, high=high)
        return jnp.where((t >= low) & (t <= high), _weight(w, t, t), 1.0)

    return weight


def cfg_plus_plus(cond: Predictor, uncond: Predictor, w: Weight) -> Predictor:
    r"""CFG++: the data term is guided, `uncond + w (cond - uncond)`, and the noise term stays unconditional.

    The two terms no longer put `x` together, on purpose: a stepper clears `x` of noise with the guided model and adds
    noise with the unconditional one. A DDIM step with it is a DDIM step with `cfg` at weight `w / (1 - e^(-h))`, so the
    guidance of a whole path grows with the number of steps; `w` in `[0, 1]` is usual, 0.6 in 50 steps comparable to
    7.5 with `cfg`. `w = 1` is not the conditional sampler.

    Args:
      cond: conditional predictor.
      uncond: unconditional predictor.
      w: guidance weight: a scalar, `[B]`, or a function of time.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`.

    Reference: CFG++, arXiv:2406.08070.
    """

    def predict(x: Array, t: Array) -> Prediction:
        free = uncond(x, t)
        return Prediction(free.data + _weight(w, t, x) * (cond(x, t).data - free.data), free.noise)

    return predict


def rescale(guided: Predictor, cond: Predictor, phi: Weight, schedule: Schedule) -> Predictor:
    r"""Pulls the contrast of the guided data term back: `D' = (phi std(D_cond) / std(D) + 1 - phi) D`.

    The standard deviation is that of each example over its event axes. The paper rescales whatever its network puts
    out, a `v`, which is the data term at the noise end, where contrast is decided; here it is the data term always, and
    the noise term follows it, `eps' = (x - alpha D') / sigma`, so the parameterisation of the model does not matter.

    That undoes CFG++, whose noise term is to stay unconditional: write
    `cfg_plus_plus(rescale(cfg(cond, uncond, w), cond, phi, schedule), uncond, 1.0)`.

    Args:
      guided: the guided predictor, whose two terms put `x` together, such as `cfg(...)`.
      cond: conditional predictor, whose contrast is wanted.
      phi: share of the pull, in `[0, 1]`, 0.7 in the paper: a scalar, `[B]`, or a function of time.
      schedule: the noise schedule of `x`; `sigma(t) > 0`.

    Raises:
      ValueError: `phi` is neither a scalar nor `[B]`.

    Reference: Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891.
    """

    def variance(data: Array) -> Array:
        centered = data - expand_like(reduce_events(data, "mean"), data)
        return reduce_events(jnp.square(centered), "mean")

    def predict(x: Array, t: Array) -> Prediction:
        out, wanted = guided(x, t), variance(cond(x, t).data)
        actual = variance(out.data)
        flat = (actual == 0) | (wanted == 0)  # a constant image has no contrast to restore; its gradient would be NaN
        ratio = jnp.where(flat, 1.0, jnp.sqrt(jnp.where(flat, 1.0, wanted) / jnp.where(flat, 1.0, actual)))
        change = _weight(phi, t, x, "phi") * (expand_like(ratio, x) - 1) * out.data
        alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
        return Prediction(out.data + change, out.noise - alpha / sigma * change)

    return predict


def classifier(
    predictor: Predictor, log_prob: Callable[[Array, Array], Array], w: Weight, schedule: Schedule
) -> Predictor:
    r"""Classifier guidance: adds `w grad_x log p(y | x_t)` to the score.

    `eps' = eps - w sigma grad` and `D' = D + w (sigma^2 / alpha) grad`, which still put `x` together. At `w = 1`, with
    the exact `p(y | x_t)`, it is the conditional model. Where `alpha = 0` the state says nothing of `y`, the gradient
    is 0 and the data term stays. For CFG++, whose noise term is to stay unconditional, write
    `cfg_plus_plus(classifier(uncond, log_prob, w, schedule), uncond, 1.0)`.

    Args:
      predictor: unconditional predictor, whose two terms put `x` together.
      log_prob: `(x_t[B, ...], t[B]) -> [B]`, log-probability of the class asked for, of a classifier of noisy states.
      w: guidance weight: a scalar, `[B]`, or a function of time.
      schedule: the noise schedule of `x`.

    Raises:
      ValueError: `w` is neither a scalar nor `[B]`, or `log_prob` does not return `[B]`.

    Reference: Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233.
    """

    def total(x: Array, t: Array) -> Array:
        return one_per_example(x, log_prob=log_prob(x, t)).sum()

    def predict(x: Array, t: Array) -> Prediction:
        out, pull = predictor(x, t), _weight(w, t, x) * jax.grad(total)(x, t)
        alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
        return shift_score(out, pull, alpha, sigma)

    return predict

"""Guidance beyond that by a fixed weight: energies, what adapts on the way, forecasts; on predictors affine in `x`."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.samplers import integration, steppers
from esscher.samplers.diffusion import adaptive, energy, forecasting, universal

COSINE = schedules.cosine()
X = jax.random.normal(jax.random.key(0), (8, 2))
KEY = jax.random.key(1)
TIMES = jnp.array([0.9, 0.6, 0.3, 0.05])
LOGITS = jax.random.normal(jax.random.key(2), (8, 3))
TARGETS = jnp.arange(8) % 3
HISTORY = jax.random.normal(jax.random.key(3), (2, 3, 8, 2))
MASK = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]] * 2)
DDIM = steppers.ddim(COSINE)


def affine(slope, offset):
    """A plain predictor whose data term is affine in the state, cheap to compile."""

    def predict(x, t):
        data = slope * x + offset * t[:, None]
        return Prediction(data, (x - COSINE.alpha(t)[:, None] * data) / COSINE.sigma(t)[:, None])

    return predict


COND, UNCOND = affine(0.8, 1.0), affine(0.3, -0.5)
FIT = adaptive.LinearGuidance(jnp.tril(HISTORY[0, :, :3, 0]), jnp.tril(HISTORY[1, :, :3, 0], -1))


def square(data, t):
    return 0.5 * jnp.sum((data - 1) ** 2, -1)


def sampled(predictor, x, stepper=DDIM):
    return integration.carried(KEY, stepper, predictor, x, TIMES)[0]


def guided(*covers, function, **hyper):
    """A sampler, as a function of the state and scalars."""
    return Example(
        name=covers[0].__name__,
        function=function,
        arguments={"x": X, **{name: jnp.asarray(value) for name, value in hyper.items()}},
        covers=covers,
        hyperparameters=tuple(hyper),
        differentiable=("x", *hyper),
        batch=("x",),
        bf16_tolerance=0.05,  # the state is rounded after each step
    )


def both_gradients(x, w, variance):
    direct = energy.posterior_variance(COSINE, variance)
    return (
        sampled(energy.energy_guidance(COND, square, COSINE, w), x),
        sampled(energy.energy_guidance(COND, square, COSINE, direct, through=False), x),
    )


def first(x):
    return x[:, :1]


def constant(x, value):
    return jnp.full_like(x, value)


EXAMPLES = [
    guided(energy.energy_guidance, energy.posterior_variance, function=both_gradients, w=0.7, variance=0.8),
    guided(
        energy.energy_correction,
        energy.step_variance,
        function=lambda x, w: sampled(
            COND, x, energy.energy_correction(DDIM, square, energy.step_variance(COSINE, w), at="end")
        ),
        w=0.7,
    ),
    guided(
        energy.dps,
        function=lambda x, zeta: sampled(COND, x, energy.dps(DDIM, first, constant(first(x), 2.5), zeta)),
        zeta=0.3,
    ),
    guided(
        energy.pigdm,
        function=lambda x, noise, w: sampled(energy.pigdm(COND, first, constant(first(x), 0.5), noise, COSINE, w=w), x),
        noise=0.6,
        w=0.9,
    ),
    guided(
        energy.tempered_classifier,
        function=lambda x, w, joint, marginal: sampled(
            energy.tempered_classifier(
                UNCOND, lambda d: d @ LOGITS[:2], jnp.zeros(len(x), int), COSINE, w, joint=joint, marginal=marginal
            ),
            x,
        ),
        w=0.4,
        joint=1.1,
        marginal=0.6,
    ),
    Example(
        name="tempered_log_ratio",
        function=energy.tempered_log_ratio,
        arguments={
            "logits": LOGITS,
            "targets": TARGETS,
            "joint": jnp.asarray(1.2),
            "marginal": jnp.asarray(0.5),
        },
        covers=(energy.tempered_log_ratio,),
        hyperparameters=("joint", "marginal"),
        differentiable=("logits", "joint", "marginal"),
        batch=("logits", "targets"),
    ),
    Example(
        name="sine_boost",
        function=lambda i, base, factor: energy.sine_boost(i, 8, base, factor),
        arguments={"i": jnp.arange(8.0), "base": jnp.asarray(0.01), "factor": jnp.asarray(0.3)},
        covers=(energy.sine_boost,),
        hyperparameters=("base", "factor"),
        differentiable=("base", "factor"),
        batch=("i",),
    ),
    Example(
        name="normalized_guidance",
        function=energy.normalized_guidance,
        arguments={"slope": X[::-1], "x": X, "scale": jnp.asarray(0.7)},
        covers=(energy.normalized_guidance,),
        hyperparameters=("scale",),
        differentiable=("slope", "x", "scale"),
        batch=("slope", "x"),
        bad={"a scale of another batch": ("scale", jnp.ones(5))},
    ),
    guided(
        universal.backward_guidance,
        function=lambda x, rate: sampled(universal.backward_guidance(COND, square, COSINE, 2, rate), x),
        rate=0.2,
    ),
    Example(
        name="self_recurrence",
        function=lambda key, x: integration.integrate(key, universal.self_recurrence(DDIM, COSINE, 3), COND, x, TIMES),
        arguments={"key": KEY, "x": X},
        covers=(universal.self_recurrence,),
        differentiable=("x",),
        batch=("x",),
        bf16_tolerance=0.05,
    ),
    guided(
        universal.noisy_energy_guidance,
        function=lambda x, w: sampled(
            COND, x, universal.noisy_energy_guidance(DDIM, square, lambda t, s: w * (t - s) * COSINE.g2(t))
        ),
        w=0.4,
    ),
    guided(
        universal.tempered_classifier_step,
        function=lambda x, w, joint, marginal: sampled(
            UNCOND,
            x,
            universal.tempered_classifier_step(
                DDIM, lambda z: z @ LOGITS[:2], jnp.zeros(len(x), int), w, joint=joint, marginal=marginal
            ),
        ),
        w=0.2,
        joint=1.1,
        marginal=0.6,
    ),
    guided(
        adaptive.adaptive_cfg,
        function=lambda x, w, threshold: sampled(COND, x, adaptive.adaptive_cfg(DDIM, UNCOND, w, threshold)),
        w=2.5,
        threshold=0.9,
    ),
    Example(
        name="fit_linear_guidance",
        function=adaptive.fit_linear_guidance,
        arguments={"cond": HISTORY[0], "uncond": HISTORY[1]},
        covers=(adaptive.fit_linear_guidance,),
        constants=("cond", "uncond"),
        batch={"cond": 1, "uncond": 1},
        output_axis=None,
        independent=False,
    ),
    Example(
        name="linear_guidance",
        function=lambda cond, uncond: adaptive.linear_guidance(FIT, 2, cond, uncond),
        arguments={"cond": HISTORY[0], "uncond": HISTORY[1]},
        covers=(adaptive.linear_guidance,),
        differentiable=("cond", "uncond"),
        batch={"cond": 1, "uncond": 1},
    ),
    guided(
        adaptive.linear_cfg,
        function=lambda x, w: sampled(
            COND, x, adaptive.linear_cfg(DDIM, UNCOND, w, FIT, jnp.array([True, False, True]), COSINE)
        ),
        w=1.5,
    ),
    guided(
        adaptive.greedy_cfg,
        function=lambda x, scales: sampled(
            COND, x, adaptive.greedy_cfg(DDIM, UNCOND, scales, lambda x, data, s: x[..., 0] - square(data, s))
        ),
        scales=[0.5, 2.0, 4.0],
    ),
    Example(
        name="combine_evaluators",
        function=adaptive.combine_evaluators,
        arguments={
            "scores": jax.random.normal(KEY, (3, 4, 8)),
            "weights": jnp.array([0.2, 0.5, 0.3]),
        },
        covers=(adaptive.combine_evaluators,),
        hyperparameters=("weights",),
        differentiable=("scores", "weights"),
        batch={"scores": 2},
        output_axis=1,
    ),
    Example(
        name="switch_condition",
        function=adaptive.switch_condition,
        arguments={"prices": LOGITS.T},
        covers=(adaptive.switch_condition,),
        batch={"prices": 1},
        bad={"prices of one condition's rows": ("prices", jnp.ones(8))},
    ),
    Example(
        name="black_scholes_call",
        function=adaptive.black_scholes_call,
        arguments={
            "spot": jnp.linspace(0.5, 2.0, 8),
            "strike": jnp.asarray(1.1),
            "rate": jnp.asarray(0.03),
            "volatility": jnp.asarray(0.4),
            "time": jnp.asarray(1.5),
        },
        covers=(adaptive.black_scholes_call,),
        hyperparameters=("spot", "strike", "rate", "volatility", "time"),
        differentiable=("spot", "strike", "rate", "volatility", "time"),
    ),
    guided(
        adaptive.inner_optimize,
        function=lambda x, rate: adaptive.inner_optimize(x, lambda x: square(x, None), 3, rate),
        rate=0.2,
    ),
    Example(
        name="diffier",
        function=lambda x, rate: sampled(COND, x, adaptive.diffier(DDIM, COSINE, 2, rate)),
        arguments={"x": X, "rate": jnp.asarray(0.02)},
        covers=(adaptive.diffier,),
        hyperparameters=("rate",),
        differentiable=("x",),  # the rate's gradient adds up data terms that nearly cancel, which bfloat16 rounds
        batch=("x",),
        bf16_tolerance=0.05,
    ),
    Example(
        name="pinball",
        function=forecasting.pinball,
        arguments={"error": X, "level": jnp.asarray(0.3)},
        covers=(forecasting.pinball,),
        hyperparameters=("level",),
        differentiable=("error", "level"),
        batch=("error",),
    ),
    Example(
        name="observation_energy",
        function=lambda data, y, mask, levels: (
            forecasting.observation_energy(data, y, mask),
            forecasting.observation_energy(data, y, mask, levels),
        ),
        arguments={"data": X, "y": X[::-1] + 0.3, "mask": MASK, "levels": forecasting.quantile_levels(4, 2)},
        covers=(forecasting.observation_energy, forecasting.quantile_levels),
        differentiable=("data", "y"),
        masks={"mask": ("data", "y")},
        batch=("data", "y", "mask", "levels"),
    ),
    guided(
        forecasting.self_guidance,
        function=lambda x, scale: sampled(
            forecasting.self_guidance(COND, constant(x, 2.0), constant(x, 1.0), COSINE, scale), x
        ),
        scale=0.3,
    ),
    guided(
        forecasting.self_guided_step,
        function=lambda x, scale: sampled(
            COND, x, forecasting.self_guided_step(DDIM, constant(x, 2.0), constant(x, 1.0), COSINE, scale)
        ),
        scale=0.8,
    ),
    Example(
        name="refine_energy",
        function=lambda key, x, base, mask, scale: forecasting.refine_energy(
            key, x, COND, 0.2, base, mask, COSINE, scale
        ),
        arguments={"key": KEY, "x": X, "base": X[::-1] + 0.3, "mask": MASK, "scale": jnp.asarray(0.7)},
        covers=(forecasting.refine_energy,),
        hyperparameters=("scale",),
        differentiable=("x", "base", "scale"),
        masks={"mask": ("base",)},
        batch=("x", "base", "mask"),
        bad={"a scale of another batch": ("scale", jnp.ones(5))},
    ),
    Example(
        name="langevin_refine",
        function=lambda key, x, rate, noise: forecasting.langevin_refine(
            key, x, lambda key, x: square(x, None), 3, rate, noise
        ),
        arguments={"key": KEY, "x": X, "rate": jnp.asarray(0.1), "noise": jnp.asarray(0.2)},
        covers=(forecasting.langevin_refine,),
        hyperparameters=("rate", "noise"),
        differentiable=("x", "rate", "noise"),
        batch=("x",),
        bf16_tolerance=0.05,
    ),
]

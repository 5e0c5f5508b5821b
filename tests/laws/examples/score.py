"""Score matching losses and weights."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core import schedules
from esscher.objectives import score

DATA, NOISE, PREDICTION = jax.random.normal(jax.random.key(0), (3, 8, 3))
TIMES = jnp.linspace(0.05, 0.95, 8)
WEIGHT = jnp.linspace(0.5, 2.0, 8)
KEY = jax.random.key(1)
MATRIX = jax.random.normal(jax.random.key(2), (3, 3))


def model(scale):
    return lambda x: jnp.tanh(x @ MATRIX) - scale * x


def denoising(kind, schedule, reduce):
    return Example(
        name=f"denoising_loss[{kind}]",
        function=lambda prediction, data, noise, t, weight: score.denoising_loss(
            prediction, data, noise, t, schedule, parameterization=kind, weight=weight, reduce=reduce
        ),
        arguments={"prediction": PREDICTION, "data": DATA, "noise": NOISE, "t": TIMES, "weight": WEIGHT},
        covers=(score.denoising_loss,),
        differentiable=("prediction", "data", "noise"),
        batch=("prediction", "data", "noise", "t", "weight"),
    )


def weight(function, **hyper):
    return Example(
        name=function.__name__,
        function=lambda t, **hyper: function(t, schedules.cosine(), parameterization="velocity", **hyper),
        arguments={"t": TIMES, **{name: jnp.asarray(value) for name, value in hyper.items()}},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=tuple(hyper),
        batch=("t",),
    )


EXAMPLES = [
    denoising("noise", schedules.cosine(), "mean"),
    denoising("score", schedules.vp_linear(), "sum"),
    denoising("velocity", schedules.rectified_flow(), "mean"),
    Example(
        name="regression_loss",
        function=lambda prediction, target, weight: score.regression_loss(prediction, target, weight=weight),
        arguments={"prediction": PREDICTION, "target": DATA, "weight": jnp.asarray(0.7)},
        covers=(score.regression_loss,),
        hyperparameters=("weight",),
        differentiable=("prediction", "target", "weight"),
        batch=("prediction", "target"),
        bad={"a weight per other batch": ("weight", jnp.ones(5))},
    ),
    Example(
        name="edm_loss",
        function=lambda denoised, data, sigma, sigma_data: score.edm_loss(denoised, data, sigma, sigma_data=sigma_data),
        arguments={"denoised": PREDICTION, "data": DATA, "sigma": 4 * TIMES, "sigma_data": jnp.asarray(0.5)},
        covers=(score.edm_loss,),
        hyperparameters=("sigma_data",),
        differentiable=("denoised", "data", "sigma_data"),
        batch=("denoised", "data", "sigma"),
    ),
    Example(
        name="log_normal_noise_levels",
        function=lambda key, mean, std: score.log_normal_noise_levels(key, (8,), mean, std),
        arguments={"key": KEY, "mean": jnp.asarray(-1.2), "std": jnp.asarray(1.2)},
        covers=(score.log_normal_noise_levels,),
        hyperparameters=("mean", "std"),
        differentiable=("mean", "std"),
    ),
    weight(score.edm_weight, sigma_data=0.5),
    weight(score.min_snr_weight, gamma=5.0),
    weight(score.p2_weight, k=0.9, gamma=1.1),
    weight(score.likelihood_weight),
    weight(score.sigmoid_weight, bias=-0.5),
    Example(
        name="implicit_score_matching_loss",
        function=lambda x, scale: score.implicit_score_matching_loss(model(scale), x),
        arguments={"x": DATA, "scale": jnp.asarray(0.8)},
        covers=(score.implicit_score_matching_loss,),
        hyperparameters=("scale",),
        differentiable=("x", "scale"),
        batch=("x",),
    ),
    Example(
        name="sliced_score_matching_loss",
        function=lambda key, x, scale: score.sliced_score_matching_loss(key, model(scale), x, n_projections=2),
        arguments={"key": KEY, "x": DATA, "scale": jnp.asarray(0.8)},
        covers=(score.sliced_score_matching_loss,),
        hyperparameters=("scale",),
        differentiable=("x", "scale"),
        batch=("x",),
    ),
    Example(
        name="nonnegative_score_matching_loss",
        function=lambda x, scale: score.nonnegative_score_matching_loss(model(scale), x),
        arguments={"x": jnp.exp(DATA), "scale": jnp.asarray(0.8)},
        covers=(score.nonnegative_score_matching_loss,),
        hyperparameters=("scale",),
        differentiable=("x", "scale"),
        batch=("x",),
    ),
    Example(
        name="multiplicative_noise",
        function=score.multiplicative_noise,
        arguments={
            "data": jnp.exp(DATA), "noise": NOISE, "t": TIMES, "mu": jnp.asarray(0.4), "sigma": jnp.asarray(0.9),
        },
        covers=(score.multiplicative_noise,),
        hyperparameters=("mu", "sigma"),
        differentiable=("data", "noise", "mu", "sigma"),
        batch=("data", "noise", "t"),
        extremes=("data",),  # the noise is a standard normal, and exponentiated
    ),
    Example(
        name="multiplicative_denoising_loss",
        function=score.multiplicative_denoising_loss,
        arguments={"prediction": PREDICTION, "noise": NOISE, "t": TIMES, "sigma": jnp.asarray(0.9)},
        covers=(score.multiplicative_denoising_loss,),
        hyperparameters=("sigma",),
        differentiable=("prediction", "noise", "sigma"),
        batch=("prediction", "noise", "t"),
    ),
]  # fmt: skip

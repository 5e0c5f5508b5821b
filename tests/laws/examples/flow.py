"""Flow matching and stochastic interpolants."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import flow

VELOCITY, START, END, NOISE = jax.random.normal(jax.random.key(0), (4, 8, 3))
TIMES = jnp.linspace(0.05, 0.95, 8)
SCALE = jnp.asarray(0.7)
PATH = {"start": START, "end": END, "noise": NOISE, "t": TIMES}


def values(make):
    """All six functions of an interpolant, at the given times."""
    return lambda t, scale: jnp.stack([function(t) for function in make(scale)], -1)


EXAMPLES = [
    Example(
        name="flow_matching_loss",
        function=lambda velocity, data, noise, t, weight: flow.flow_matching_loss(
            velocity, data, noise, t, weight=weight
        ),
        arguments={"velocity": VELOCITY, "data": START, "noise": NOISE, "t": TIMES, "weight": jnp.asarray(1.3)},
        covers=(flow.flow_matching_loss,),
        hyperparameters=("weight",),
        differentiable=("velocity", "data", "noise", "weight"),
        batch=("velocity", "data", "noise", "t"),
    ),
    Example(
        name="logit_normal_times",
        function=lambda key, mean, std: flow.logit_normal_times(key, (8,), mean, std),
        arguments={"key": jax.random.key(1), "mean": jnp.asarray(0.3), "std": jnp.asarray(0.9)},
        covers=(flow.logit_normal_times,),
        hyperparameters=("mean", "std"),
        differentiable=("mean", "std"),
    ),
    *(
        Example(
            name=make.__name__,
            function=values(make),
            arguments={"t": TIMES, "scale": SCALE},
            covers=(make,),
            hyperparameters=("scale",),
            differentiable=("scale",),
            batch=("t",),
        )
        for make in (flow.linear_interpolant, flow.trigonometric_interpolant)
    ),
    Example(
        name="interpolate",
        function=lambda scale, **path: flow.interpolate(**path, interpolant=flow.linear_interpolant(scale)),
        arguments={**PATH, "scale": SCALE},
        covers=(flow.interpolate,),
        hyperparameters=("scale",),
        differentiable=("start", "end", "noise", "scale"),
        batch=tuple(PATH),
    ),
    Example(
        name="interpolant_velocity_loss",
        function=lambda velocity, scale, **path: flow.interpolant_velocity_loss(
            velocity, **path, interpolant=flow.trigonometric_interpolant(scale)
        ),
        arguments={"velocity": VELOCITY, **PATH, "scale": SCALE},
        covers=(flow.interpolant_velocity_loss,),
        hyperparameters=("scale",),
        differentiable=("velocity", "start", "end", "noise", "scale"),
        batch=("velocity", *PATH),
    ),
    Example(
        name="interpolant_score_loss",
        function=lambda prediction, noise, weight: flow.interpolant_score_loss(prediction, noise, weight=weight),
        arguments={"prediction": VELOCITY, "noise": NOISE, "weight": TIMES},
        covers=(flow.interpolant_score_loss,),
        differentiable=("prediction", "noise"),
        batch=("prediction", "noise", "weight"),
    ),
]

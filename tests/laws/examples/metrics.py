"""Distances between sets of samples, and the calibration of a classifier."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import metrics

X, Y = jax.random.normal(jax.random.key(0), (2, 8, 2)) * jnp.array([1.0, 2.5])
COVARIANCES = jnp.array([[[1.0, 0.3], [0.3, 2.0]], [[0.5, -0.2], [-0.2, 3.0]]])

EXAMPLES = [
    Example(
        name="frechet_distance",
        function=metrics.frechet_distance,
        arguments={"x": X, "y": 0.5 * Y},
        covers=(metrics.frechet_distance,),
        differentiable=("x", "y"),
        batch={"x": 0},
        output_axis=None,
        bad={"other features": ("y", Y[:, :1]), "a vector": ("x", X[:, 0]), "a single sample": ("x", X[:1])},
        exempt={"extremes": "sets whose samples agree have singular covariances, where the distance has no gradient"},
    ),
    Example(
        name="frechet_distance_from_moments",
        function=metrics.frechet_distance_from_moments,
        arguments={"mean_x": X[0], "cov_x": COVARIANCES[0], "mean_y": Y[0], "cov_y": COVARIANCES[1]},
        covers=(metrics.frechet_distance_from_moments,),
        differentiable=("mean_x", "cov_x", "mean_y", "cov_y"),
        extremes=("mean_x", "mean_y"),
        bad={
            "another dimension": ("mean_y", jnp.zeros(3)),
            "variances alone": ("cov_x", jnp.ones(2)),
            "a larger covariance": ("cov_y", jnp.eye(3)),
        },
    ),
    Example(
        name="sliced_wasserstein",
        function=metrics.sliced_wasserstein,
        arguments={"x": X, "y": 0.5 * Y, "directions": COVARIANCES[0]},
        covers=(metrics.sliced_wasserstein,),
        differentiable=("x", "y", "directions"),
        batch={"x": 0},
        output_axis=None,
        extremes=("x", "y"),
        bad={
            "fewer samples": ("y", Y[:4]),
            "directions of another dimension": ("directions", jnp.ones((3, 4))),
            "a vector": ("x", X[:, 0]),
        },
    ),
    Example(
        name="energy_distance",
        function=metrics.energy_distance,
        arguments={"x": X, "y": 0.5 * Y[:5]},
        covers=(metrics.energy_distance,),
        differentiable=("x", "y"),
        batch={"x": 0},
        output_axis=None,
        bad={"other features": ("y", Y[:, :1]), "a vector": ("x", X[:, 0]), "no samples": ("x", X[:0])},
    ),
    Example(
        name="calibration_error",
        function=lambda probs, targets: metrics.calibration_error(probs, targets, bins=4),
        arguments={"probs": jax.nn.softmax(4 * X), "targets": jnp.arange(8) % 2},
        covers=(metrics.calibration_error,),
        differentiable=("probs",),
        batch=("probs", "targets"),
        output_axis=None,
        independent=False,
    ),
]

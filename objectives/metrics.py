"""Distances between sets of samples, and the calibration of classifiers."""

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_targets, safe_sqrt

__all__ = [
    "calibration_error",
    "energy_distance",
    "frechet_distance",
    "frechet_distance_from_moments",
    "sliced_wasserstein",
]


def frechet_distance(x: Array, y: Array) -> Array:
    r"""Fréchet (Gaussian Wasserstein-2, squared) distance between two sets of features.

    `|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))` with the sets' means and covariances (unbiased,
    with `N - 1`). Two finite sets of one law are a little apart: compare with the distance between two real sets.
    Rounding to float32 moves it by some 1e-6 of the covariances' traces, up or down: equal sets may be below 0.

    Args:
      x: features, `[N, D]`, `N >= 2`.
      y: features, `[M, D]`, `M >= 2`.

    Returns:
      The distance, `[]`, in the squared unit of the features and float32 at least. It has no gradient where a
      covariance is singular or has equal eigenvalues.

    Raises:
      ValueError: `x` or `y` is not a floating matrix of at least two rows, or their widths differ.

    Reference: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500.
    """
    _check_sets(2, x=x, y=y)
    return frechet_distance_from_moments(*_moments(x), *_moments(y))


def frechet_distance_from_moments(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> Array:
    """Fréchet distance between `N(mean_x, cov_x)` and `N(mean_y, cov_y)`, as in `frechet_distance`.

    Args:
      mean_x: `[D]`.
      cov_x: `[D, D]`, symmetric, positive semi-definite; it may be singular.
      mean_y: `[D]`.
      cov_y: `[D, D]`, likewise.

    Returns:
      The distance, `[]`, in float32 at least.

    Raises:
      ValueError: shapes that do not fit, or arrays that are not floating.

    Reference: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500.
    """
    (size,) = mean_x.shape[-1:] or (0,)
    wanted = {"mean_x": (size,), "cov_x": (size, size), "mean_y": (size,), "cov_y": (size, size)}
    given = {"mean_x": mean_x, "cov_x": cov_x, "mean_y": mean_y, "cov_y": cov_y}
    for name, shape in wanted.items():
        if given[name].shape != shape or not jnp.issubdtype(given[name].dtype, jnp.floating):
            got = f"{given[name].dtype}{list(given[name].shape)}"
            raise ValueError(f"{name} must be floating and have shape {shape}, got {got}")
    mean_x, cov_x, mean_y, cov_y = (at_least_float32(array) for array in given.values())
    # The roots' singular values are the eigenvalues' roots, but lose half as many digits where those are near zero.
    coupling = jnp.linalg.svd(_square_root(cov_x) @ _square_root(cov_y), compute_uv=False).sum()
    return jnp.sum((mean_x - mean_y) ** 2) + jnp.trace(cov_x) + jnp.trace(cov_y) - 2 * coupling


def _moments(x: Array) -> tuple[Array, Array]:
    x = at_least_float32(x)
    mean = x.mean(0)
    centered = x - mean
    return mean, centered.T @ centered / (x.shape[0] - 1)


def _square_root(covariance: Array) -> Array:
    values, vectors = jnp.linalg.eigh(covariance)
    return vectors * jnp.sqrt(jnp.maximum(values, 0)) @ vectors.T


def sliced_wasserstein(x: Array, y: Array, directions: Array) -> Array:
    r"""Sliced Wasserstein-2 distance of two sets, `sqrt(mean_u mean_i (x.u_(i) - y.u_(i))^2)`, projections in order.

    Two finite sets of one law are apart by some `1 / sqrt(N)`: compare with the distance of two exact sets.

    Args:
      x: samples, `[N, D]`.
      y: samples, `[N, D]`, as many.
      directions: `[P, D]`, of any length above 0, such as normal draws.

    Returns:
      The distance, `[]`, in the unit of the samples and float32 at least.

    Raises:
      ValueError: sets that are not floating matrices of one shape, or directions of another dimension.

    Reference: Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al. 2015).
    """
    _check_sets(1, x=x, y=y, directions=directions)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {x.shape} and {y.shape}")
    x, y, directions = (at_least_float32(array) for array in (x, y, directions))
    units = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    gaps = jnp.sort(x @ units.T, axis=0) - jnp.sort(y @ units.T, axis=0)
    return safe_sqrt(jnp.mean(jnp.square(gaps)))


def energy_distance(x: Array, y: Array) -> Array:
    r"""Energy distance of two sets, `2 E|x - y| - E|x - x'| - E|y - y'|`, all pairs counted: 0 for equal sets.

    Up to rounding it is never negative, and of two sets of one law it is about `E|x - x'| (1/N + 1/M)`: compare with
    that of two exact sets.

    Args:
      x: samples, `[N, D]`.
      y: samples, `[M, D]`.

    Returns:
      The distance, `[]`, in the unit of the samples and float32 at least; a pair at one place gets no gradient.

    Raises:
      ValueError: sets that are not floating matrices, or of different widths.

    Reference: Energy Statistics: A Class of Statistics Based on Distances (Székely, Rizzo 2013).
    """
    _check_sets(1, x=x, y=y)
    x, y = at_least_float32(x), at_least_float32(y)

    def mean_distance(x: Array, y: Array) -> Array:
        # A few rows at once: all pairs of large sets would not fit, and a Gram matrix loses what is near.
        row = lambda point: safe_sqrt(jnp.sum(jnp.square(y - point), -1)).mean()  # noqa: E731
        return jax.lax.map(row, x, batch_size=64).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def _check_sets(least: int, **sets: Array) -> None:
    """Raises a ValueError unless all are floating matrices of one width, with so many rows."""
    for name, rows in sets.items():
        if rows.ndim != 2 or rows.shape[0] < least or not jnp.issubdtype(rows.dtype, jnp.floating):
            got = f"{rows.dtype}{list(rows.shape)}"
            raise ValueError(f"{name} must be a floating matrix [N, D] with N >= {least}, got {got}")
    widths = [rows.shape[1] for rows in sets.values()]
    if len(set(widths)) > 1:
        got = " and ".join(map(str, widths))
        raise ValueError(f"{' and '.join(sets)} must have features of one size, got {got}")


def calibration_error(probs: Array, targets: Array, *, bins: int = 15) -> Array:
    """Expected calibration error, `sum_b (n_b / B) |accuracy_b - confidence_b|`, a scalar in `[0, 1]`.

    Bins of equal width hold the examples by their confidence, the largest of their `probs[B, K]`, which is right if it
    is that of `targets[B]`, integers. The gradient is that at fixed bins.

    Raises:
      ValueError: shapes or types other than these, or no bins.

    Reference: On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    check_floating(probs=probs)
    if probs.ndim != 2:
        raise ValueError(f"probs must have shape [B, K], got {probs.shape}")
    check_targets(targets, probs=probs)
    probs = at_least_float32(probs)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence = probs.max(-1)
    excess = (jnp.argmax(probs, -1) == targets) - confidence
    index = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return jnp.abs(jax.ops.segment_sum(excess, index, bins)).sum() / len(probs)

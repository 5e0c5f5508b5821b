"""Distances of sets against closed forms, matrix square roots, assignments and distribution functions; calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from esscher.objectives import metrics


def random_covariance(key, size, rank):
    factor = jax.random.normal(key, (size, rank))
    return factor @ factor.T / rank


def by_matrix_square_root(mean_x, cov_x, mean_y, cov_y):
    root = scipy.linalg.sqrtm(np.asarray(cov_x, np.float64) @ np.asarray(cov_y, np.float64))
    return np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(root).real


def test_on_the_line_it_is_the_distance_of_means_and_standard_deviations():
    out = metrics.frechet_distance_from_moments(*map(jnp.array, ([1.0], [[0.25]], [-0.5], [[4.0]])))
    np.testing.assert_allclose(out, 1.5**2 + (0.5 - 2.0) ** 2, rtol=1e-6)


def test_commuting_covariances_compare_by_the_roots_of_their_eigenvalues(x64):
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 4)))[0]
    values_x, values_y = jnp.array([0.1, 0.5, 1.0, 3.0]), jnp.array([2.0, 0.4, 0.0, 1.0])
    cov_x, cov_y = (basis * values @ basis.T for values in (values_x, values_y))
    out = metrics.frechet_distance_from_moments(jnp.zeros(4), cov_x, jnp.ones(4), cov_y)
    expected = 4 + jnp.sum((jnp.sqrt(values_x) - jnp.sqrt(values_y)) ** 2)
    np.testing.assert_allclose(out, expected, rtol=1e-7)


def test_general_covariances_agree_with_a_general_matrix_square_root(x64):
    keys = jax.random.split(jax.random.key(1), 4)
    mean_x, mean_y = jax.random.normal(keys[0], (2, 5))
    arguments = (mean_x, random_covariance(keys[1], 5, 7), mean_y, random_covariance(keys[2], 5, 9))
    out = metrics.frechet_distance_from_moments(*arguments)
    np.testing.assert_allclose(out, by_matrix_square_root(*arguments), rtol=1e-9)
    x, y = jax.random.normal(keys[3], (2, 40, 5)) @ jnp.triu(jnp.ones((5, 5))) + mean_x
    y = y[:30] ** 2
    moments = (np.mean(x, 0), np.cov(x.T), np.mean(y, 0), np.cov(y.T))
    np.testing.assert_allclose(metrics.frechet_distance(x, y), by_matrix_square_root(*moments), rtol=1e-9)


def test_of_two_lines_in_space_it_depends_on_their_angle():
    """For covariances a a' and b b' the coupling is |a.b|."""
    a, b = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, -1.0, 3.0])
    out = metrics.frechet_distance_from_moments(jnp.zeros(3), jnp.outer(a, a), jnp.zeros(3), jnp.outer(b, b))
    np.testing.assert_allclose(out, a @ a + b @ b - 2 * abs(a @ b), rtol=1e-5)


def test_fewer_samples_than_features_are_no_trouble():
    x, y = jax.random.normal(jax.random.key(2), (2, 6, 20)) * jnp.array([[[1.0]], [[0.4]]])
    centered = [np.asarray(z, np.float64) - np.mean(np.asarray(z, np.float64), 0) for z in (x, y)]
    coupling = np.linalg.svd(centered[0] @ centered[1].T / 5, compute_uv=False).sum()
    total = sum(np.sum(z**2) / 5 for z in centered)
    expected = np.sum((np.mean(x, 0) - np.mean(y, 0)) ** 2) + total - 2 * coupling
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=2e-4)


def test_a_set_is_at_no_distance_from_itself_and_a_shift_counts_once():
    x = jax.random.normal(jax.random.key(3), (50, 3)) * jnp.array([1.0, 0.1, 5.0])
    assert abs(metrics.frechet_distance(x, x[::-1])) < 1e-4
    assert abs(metrics.frechet_distance(100 * x, 100 * x[::-1])) < 1.0  # rounding is a share of the traces, 5e5
    np.testing.assert_allclose(metrics.frechet_distance(x, x + jnp.array([3.0, 0.0, 4.0])), 25.0, rtol=1e-4)


def test_it_is_symmetric_and_scales_with_the_square():
    x, y = jax.random.normal(jax.random.key(4), (2, 30, 3))
    y = y @ jnp.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.2]])
    forth, back = metrics.frechet_distance(x, y), metrics.frechet_distance(y, x)
    np.testing.assert_allclose(forth, back, rtol=1e-5)
    np.testing.assert_allclose(metrics.frechet_distance(3 * x, 3 * y), 9 * forth, rtol=1e-5)


def test_wrong_shapes_are_named():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"y must be a floating matrix \[N, D\] with N >= 2, got float32\[1, 3\]"):
        metrics.frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="features of one size, got 3 and 2"):
        metrics.frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match=r"cov_y must be floating and have shape \(3, 3\), got float32\[2, 3\]"):
        metrics.frechet_distance_from_moments(x[0], jnp.eye(3), x[0], jnp.ones((2, 3)))


def test_calibration_error_of_a_hand_made_table():
    """Two bins: `{0.6 right, 0.8 wrong, 0.9 right}` and `{0.45 right}`: `(|2 - 2.3| + |1 - 0.45|) / 4`."""
    probs = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.05, 0.05, 0.9], [0.3, 0.25, 0.45]])
    error = metrics.calibration_error(probs, np.array([0, 2, 2, 2]), bins=2)
    np.testing.assert_allclose(error, (0.3 + 0.55) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics.calibration_error(np.eye(3), np.arange(3)), 0.0)
    np.testing.assert_allclose(metrics.calibration_error(np.eye(3), np.array([1, 2, 0])), 1.0)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        metrics.calibration_error(np.eye(3), np.arange(3), bins=0)
    with pytest.raises(ValueError, match=r"probs must have shape \[B, K\]"):
        metrics.calibration_error(np.ones(3), np.arange(3))


def test_a_shift_slices_to_its_length_by_the_angle_and_two_sets_to_the_distance_of_their_order():
    x = jax.random.normal(jax.random.key(4), (50, 3))
    shift, directions = jnp.array([1.0, -2.0, 0.5]), jnp.array([[2.0, 0.0, 0.0], [0.0, 3.0, 3.0]])
    out = metrics.sliced_wasserstein(x[::-1], x + shift, directions)
    np.testing.assert_allclose(out, np.sqrt((1.0 + (1.5 / np.sqrt(2)) ** 2) / 2), rtol=1e-5)
    a, b = np.random.default_rng(0).normal(size=(2, 40, 1)) * [[[1.0]], [[2.0]]]
    cost = np.square(a - b.T)
    exact = cost[scipy.optimize.linear_sum_assignment(cost)].mean() ** 0.5
    np.testing.assert_allclose(
        metrics.sliced_wasserstein(jnp.asarray(a), jnp.asarray(b), jnp.ones((1, 1))), exact, 1e-5
    )


def test_on_the_line_the_energy_distance_is_twice_the_square_of_the_distribution_functions_gap():
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=70), 0.5 * draw.normal(size=90) + 1.0
    grid = np.sort(np.concatenate([a, b]))
    gap = (a[:, None] <= grid).mean(0) - (b[:, None] <= grid).mean(0)
    exact = 2 * np.sum(np.square(gap[:-1]) * np.diff(grid))
    np.testing.assert_allclose(metrics.energy_distance(jnp.asarray(a)[:, None], jnp.asarray(b)[:, None]), exact, 1e-4)
    assert exact > 0.1


def test_equal_sets_are_at_distance_zero_with_gradient_zero():
    x = jax.random.normal(jax.random.key(5), (9, 2))
    for distance in (metrics.energy_distance, lambda x, y: metrics.sliced_wasserstein(x, y, jnp.eye(2))):
        value, gradient = jax.value_and_grad(distance)(x, x[::-1])
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)

"""Flow matching and interpolants: exact minimisers by quadrature, closed forms on Gaussians, and the ends of paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws.oracles import assert_minimises, bimodal, gauss_hermite, pairs

from esscher.core import schedules
from esscher.objectives import flow, score

pytestmark = pytest.mark.usefixtures("x64")

INTERPOLANTS = {"linear": flow.linear_interpolant, "trigonometric": flow.trigonometric_interpolant}
each_interpolant = pytest.mark.parametrize("make", INTERPOLANTS.values(), ids=INTERPOLANTS)


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_on_straight_paths_the_target_is_noise_minus_data_at_every_time():
    velocity, data, noise = jax.random.normal(jax.random.key(0), (3, 4, 5))
    t = jnp.array([0.0, 0.3, 0.9, 1.0])
    expected = jnp.mean((velocity - (noise - data)) ** 2, -1)
    np.testing.assert_allclose(flow.flow_matching_loss(velocity, data, noise, t), expected, rtol=1e-12)
    as_denoising = score.denoising_loss(
        velocity, data, noise, t, schedules.cosine(), parameterization="velocity", weight=2.0, reduce="sum"
    )
    on_circle = flow.flow_matching_loss(velocity, data, noise, t, schedules.cosine(), weight=2.0, reduce="sum")
    np.testing.assert_allclose(on_circle, as_denoising)
    assert np.all(np.abs(on_circle - 10 * expected) > 1e-2)


@pytest.mark.parametrize("name", ["rectified_flow", "cosine"])
def test_the_mixtures_exact_velocity_minimises_the_loss(name):
    law, schedule, t = bimodal(), getattr(schedules, name)(), 0.35
    data, noise, weights = pairs(law)
    x = schedules.add_noise(data, noise, t, schedule)
    exact = jax.jit(lambda x: law.predictor(schedule)(x, jnp.full(x.shape[0], t)))(x)
    t = jnp.asarray(t)
    velocity = schedule.alpha_dot(t) * exact.data + schedule.sigma_dot(t) * exact.noise
    assert_minimises(lambda u: flow.flow_matching_loss(u, data, noise, t, schedule), velocity, x, weights)


def test_at_the_ends_the_minimiser_is_known_without_a_model():
    """u = x - E[x_0] where x is pure noise, and u = -x where x is data, since the noise has mean zero."""
    law = bimodal()
    data, noise, weights = pairs(law)
    at = lambda t: lambda u: flow.flow_matching_loss(u, data, noise, jnp.asarray(t))  # noqa: E731
    assert_minimises(at(1.0), noise - law.mean(), noise, weights)
    assert_minimises(at(0.0), -data, data, weights)


def test_logit_normal_times_have_the_stated_logits():
    """Mean and standard deviation of 40,000 logits within 4.5 standard errors: a false alarm in 70,000 runs."""
    n = 40_000
    t = flow.logit_normal_times(jax.random.key(1), (n,), 0.4, 0.8)
    logits = jnp.log(t) - jnp.log1p(-t)
    assert abs(logits.mean() - 0.4) < 4.5 * 0.8 / np.sqrt(n)
    assert abs(logits.std() - 0.8) < 4.5 * 0.8 / np.sqrt(2 * n)


# --- interpolants -----------------------------------------------------------------------------------------------------


@each_interpolant
def test_paths_join_their_ends_and_derivatives_are_derivatives(make):
    path = make(0.7)
    start, end, noise = jax.random.normal(jax.random.key(2), (3, 2, 4))
    np.testing.assert_allclose(flow.interpolate(start, end, noise, 0.0, path), start)
    np.testing.assert_allclose(flow.interpolate(start, end, noise, 1.0, path), end, atol=1e-12)
    t = jnp.linspace(0.05, 0.95, 7)
    for function, derivative in zip(path[:3], path[3:], strict=True):
        np.testing.assert_allclose(derivative(t), jax.vmap(jax.grad(function))(t), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(path.gamma(t), 0.7 * jnp.sqrt(2 * t * (1 - t)))


def gaussian_path(path, t, n=12):
    """Two Gaussians and noise on quadrature nodes, with the law of `x_t`: every conditional mean is affine."""
    (mean_0, var_0), (mean_1, var_1) = (0.8, 0.3), (-1.0, 1.4)
    draws, weights = gauss_hermite(n, 3)
    start = mean_0 + jnp.sqrt(var_0) * draws[:, :1]
    end = mean_1 + jnp.sqrt(var_1) * draws[:, 1:2]
    noise = draws[:, 2:]
    x = flow.interpolate(start, end, noise, t, path)
    mean = lambda t: path.alpha(t) * mean_0 + path.beta(t) * mean_1  # noqa: E731
    variance = lambda t: path.alpha(t) ** 2 * var_0 + path.beta(t) ** 2 * var_1 + path.gamma(t) ** 2  # noqa: E731
    return (start, end, noise, x, weights), mean, variance


@each_interpolant
@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_between_gaussians_the_minimising_velocity_carries_mean_and_variance(make, scale):
    """E[x'|x] = m' + (v'/2v)(x - m), with derivatives of mean and variance by autodiff."""
    path, t = make(scale), jnp.asarray(0.3)
    (start, end, noise, x, weights), mean, variance = gaussian_path(path, t)
    velocity = jax.grad(mean)(t) + jax.grad(variance)(t) / (2 * variance(t)) * (x - mean(t))
    loss = lambda u: flow.interpolant_velocity_loss(u, start, end, noise, t, path)  # noqa: E731
    assert_minimises(loss, velocity, x, weights, rtol=1e-6)


@each_interpolant
def test_between_gaussians_the_minimising_noise_gives_the_score(make):
    path, t = make(0.9), jnp.asarray(0.6)
    (_, _, noise, x, weights), mean, variance = gaussian_path(path, t)
    score_of_x = -(x - mean(t)) / variance(t)
    loss = lambda y: flow.interpolant_score_loss(y, noise)  # noqa: E731
    assert_minimises(loss, -path.gamma(t) * score_of_x, x, weights, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
def test_without_noise_an_interpolant_is_flow_matching_at_every_time(name):
    schedule = {"linear": schedules.rectified_flow(), "trigonometric": schedules.cosine()}[name]
    velocity, start, end, noise = jax.random.normal(jax.random.key(3), (4, 5, 3))
    t = jnp.linspace(0.0, 1.0, 5)

    def loss(scale):
        return flow.interpolant_velocity_loss(velocity, start, end, noise, t, INTERPOLANTS[name](scale))

    for scale in (0.0, jnp.asarray(0.0)):
        np.testing.assert_allclose(loss(scale), flow.flow_matching_loss(velocity, start, end, t, schedule), atol=1e-12)
    np.testing.assert_array_equal(flow.interpolate(start, end, noise, 1.0, flow.linear_interpolant(0.0)), end)


def test_the_derivative_with_respect_to_the_noise_scale_exists_at_zero():
    t = jnp.array([0.2, 0.7])
    slope = jax.jacfwd(lambda scale: flow.linear_interpolant(scale).gamma_dot(t))(0.0)
    np.testing.assert_allclose(slope, (1 - 2 * t) / jnp.sqrt(2 * t * (1 - t)), rtol=1e-12)


def test_wrong_shapes_and_types_of_a_path_are_named():
    x, t, path = jnp.ones((4, 3)), jnp.full(4, 0.5), flow.linear_interpolant()
    with pytest.raises(ValueError, match=r"start \(4, 3\), end \(4, 2\), noise \(4, 3\)"):
        flow.interpolate(x, x[:, :2], x, t, path)
    with pytest.raises(ValueError, match=r"t must be a scalar or have shape \(4,\), got \(5,\)"):
        flow.interpolate(x, x, x, jnp.full(5, 0.5), path)
    with pytest.raises(ValueError, match="end must be of a floating type, got int32"):
        flow.interpolant_velocity_loss(x, x, x.astype(jnp.int32), x, t, path)
    with pytest.raises(ValueError, match=r"velocity \(3, 3\), data \(4, 3\)"):
        flow.flow_matching_loss(x[:3], x, x, t)

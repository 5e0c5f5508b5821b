"""EDM preconditioning and the adapter to schedules, against exact Gaussian posteriors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.core.exact import GaussianMixture
from esscher.models.mlp import MLP
from esscher.models.preconditioning import denoiser_predictor, edm_denoiser
from esscher.samplers import integrate, steppers

SIGMA = jnp.array([0.002, 0.1, 0.7, 3.0, 80.0])
NETWORK = functools.partial(MLP, dimension=3, width=16, depth=1)
X = jax.random.normal(jax.random.key(0), (5, 3)) * 2


@pytest.fixture
def network(build, randomize):
    """A pair `(apply, params)`."""
    return build(NETWORK).apply, randomize(build(NETWORK))


def coefficients(sigma, sigma_data):
    """`(c_skip, c_out, c_in, c_noise)`, read off the denoiser by feeding it networks that show them."""
    ones = jnp.ones((sigma.size, 1))
    run = lambda network: edm_denoiser(network, sigma_data)(None, ones, sigma)[:, 0]  # noqa: E731
    skip = run(lambda params, x, level: jnp.zeros_like(x))
    out = run(lambda params, x, level: jnp.ones_like(x)) - skip
    return (
        skip,
        out,
        (run(lambda params, x, level: x) - skip) / out,
        (run(lambda params, x, level: level[:, None]) - skip) / out,
    )


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_network_sees_and_aims_at_unit_variance(sigma_data, x64):
    """For any data of variance d^2; the target of `F` is (x_0 - c_skip x) / c_out with x = x_0 + s eps."""
    sigma = SIGMA.astype("float64")
    skip, out, scale, level = coefficients(sigma, sigma_data)
    np.testing.assert_allclose(scale**2 * (sigma_data**2 + sigma**2), 1, rtol=1e-9)
    np.testing.assert_allclose(((1 - skip) ** 2 * sigma_data**2 + skip**2 * sigma**2) / out**2, 1, rtol=1e-7)
    np.testing.assert_allclose(level, np.log(sigma) / 4, rtol=1e-6, atol=1e-9)
    assert np.all(out > 0)


def test_target_of_real_draws_has_unit_variance():
    """Two-point data: far from Gaussian, variance d^2 = 0.25. The standard error of a variance is below sqrt(2/n)."""
    n = 40_000
    skip, out, _, _ = coefficients(SIGMA, 0.5)
    data = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (n, 1)), 0.5, -0.5)
    x = data + SIGMA * jax.random.normal(jax.random.key(4), (n, 5))
    variance = jnp.var((data - skip * x) / out, axis=0)
    np.testing.assert_allclose(variance[1:], 1, atol=4.5 * np.sqrt(2 / n))


def test_on_gaussian_data_the_best_network_is_zero(x64):
    law = GaussianMixture(jnp.zeros(1), jnp.zeros((1, 3)), 0.7**2 * jnp.eye(3)[None])
    x, sigma = X.astype("float64"), SIGMA.astype("float64")
    denoise = edm_denoiser(lambda params, x, level: jnp.zeros_like(x), 0.7)
    np.testing.assert_allclose(
        denoise(None, x, sigma), jax.jit(law.predictor(schedules.edm()))(x, sigma).data, rtol=1e-6
    )


def test_without_noise_the_denoiser_is_the_identity_with_finite_derivatives(network):
    apply, params = network
    denoise, zero = jax.jit(edm_denoiser(apply)), jnp.zeros(5)
    np.testing.assert_array_equal(denoise(params, X, zero), X)
    cotangent = jax.random.normal(jax.random.key(5), X.shape)
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(denoise(*args) * cotangent), (0, 1, 2)))(params, X, zero)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1], cotangent)
    _, tangent = jax.jit(lambda sigma: jax.jvp(lambda sigma: denoise(params, X, sigma), (sigma,), (sigma + 1,)))(zero)
    assert np.all(np.isfinite(tangent))


def test_the_denoiser_tends_to_the_identity_as_noise_vanishes(network):
    apply, params = network
    sizes = [
        np.abs(edm_denoiser(apply)(params, X, jnp.full(5, sigma)) - X).max() / sigma for sigma in (1e-2, 1e-3, 1e-4)
    ]
    assert min(sizes) > 0.01
    assert max(sizes) < 10


def test_sigma_data_is_traced(network):
    apply, params = network
    traces = []

    @jax.jit
    def denoise(sigma_data):
        traces.append(sigma_data)
        return edm_denoiser(apply, sigma_data)(params, X, SIGMA)

    values = jnp.array([0.3, 0.5, 2.0])
    loop = jnp.stack([denoise(value) for value in values])
    assert len(traces) == 1
    np.testing.assert_allclose(jax.vmap(denoise)(values), loop, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loop[1], edm_denoiser(apply)(params, X, SIGMA), rtol=1e-5, atol=1e-6)


def test_conditions_reach_the_network_and_dtype_is_kept():
    def network(params, x, level, shift, factor):
        return params * shift[:, None] * factor + 0 * x

    denoise = edm_denoiser(network)
    shift = jnp.arange(5.0)
    difference = denoise(2.0, X, SIGMA, shift, 3.0) - denoise(2.0, X, SIGMA, shift, 0.0)
    np.testing.assert_allclose(difference[:, 0], coefficients(SIGMA, 0.5)[1] * 6 * shift, rtol=1e-5, atol=1e-6)
    assert denoise(2.0, X.astype(jnp.bfloat16), SIGMA, shift, 3.0).dtype == jnp.bfloat16


@pytest.fixture
def law():
    factors = jax.random.normal(jax.random.key(6), (2, 3, 3)) * 0.4
    covariances = factors @ jnp.swapaxes(factors, -1, -2) + 0.1 * jnp.eye(3)
    return GaussianMixture(jnp.log(jnp.array([0.3, 0.7])), jax.random.normal(jax.random.key(7), (2, 3)), covariances)


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "ve", "edm", "rectified_flow", "trig_flow"])
def test_one_denoiser_predicts_under_every_schedule(name, law, x64):
    """The mixture's denoiser under EDM noise gives the mixture's own prediction under any other schedule."""
    law = jax.tree.map(lambda leaf: leaf.astype("float64"), law)
    schedule = getattr(schedules, name)()
    t = jnp.linspace(0.1, 0.9, 5) * schedule.t_max
    x = X.astype("float64")
    denoise = lambda x, sigma: law.predictor(schedules.edm())(x, sigma).data  # noqa: E731
    both = jax.jit(lambda x, t: (denoiser_predictor(denoise, schedule)(x, t), law.predictor(schedule)(x, t)))
    for ours, exact in zip(*both(x, t), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "rectified_flow"])
def test_at_time_zero_the_prediction_is_the_state_and_its_gradient_is_finite(name, network):
    apply, params = network
    predictor = denoiser_predictor(lambda x, sigma: edm_denoiser(apply)(params, x, sigma), getattr(schedules, name)())
    data, noise = predictor(X, 0.0)  # a scalar time serves all examples
    np.testing.assert_array_equal(data, X)
    assert not np.any(noise)
    gradient = jax.jit(jax.grad(lambda x: sum(jnp.sum(part**2) for part in predictor(x, 0.0))))(X)
    np.testing.assert_allclose(gradient, 2 * X, rtol=1e-6)


@pytest.mark.parametrize("name", ["rectified_flow", "cosine", "trig_flow"])
def test_grids_may_begin_where_alpha_is_zero(name, x64):
    """On a Gaussian, whose prediction is known in closed form, paths end where the exact predictor's do."""
    schedule, mean, variance = getattr(schedules, name)(), 0.6, 0.3
    denoise = lambda x, sigma: (variance * x + sigma[:, None] ** 2 * mean) / (variance + sigma[:, None] ** 2)  # noqa: E731

    def exact(x, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        error = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return Prediction(mean + alpha * variance * error, sigma * error)

    x, times = jnp.array([[-1.3], [0.2], [2.0]]), schedules.uniform_times(5, schedule.t_max)
    predictor = denoiser_predictor(denoise, schedule)
    assert schedule.alpha(times[0]) == 0
    assert np.isfinite(jax.grad(lambda x: sum(jnp.sum(part) for part in predictor(x, times[0])))(x)).all()
    for make in (steppers.ddim, steppers.heun, steppers.dpm_solver_pp_2m):
        with jax.disable_jit():
            ends = [integrate(jax.random.key(0), make(schedule), model, x, times) for model in (predictor, exact)]
        np.testing.assert_allclose(*ends, atol=1e-3)


def test_wrong_values_are_named(network):
    apply, params = network
    for denoise in (
        edm_denoiser(apply),
        lambda params, x, t: denoiser_predictor(lambda x, s: x, schedules.edm())(x, t),
    ):
        with pytest.raises(ValueError, match="x must be of a floating type, got int32"):
            denoise(params, X.astype(int), SIGMA)
    with pytest.raises(ValueError, match="sigma_data must be above 0, got 0"):
        edm_denoiser(apply, 0)


def test_wrong_shapes_are_named(network):
    apply, params = network
    with pytest.raises(ValueError, match=r"sigma must be a scalar or have shape \(5,\), got \(2,\)"):
        edm_denoiser(apply)(params, X, jnp.ones(2))
    with pytest.raises(ValueError, match=r"t must be a scalar or have shape \(5,\), got \(5, 1\)"):
        denoiser_predictor(lambda x, sigma: x, schedules.cosine())(X, jnp.ones((5, 1)))

"""Gaussian mixtures against quadrature, autodiff, Monte Carlo, and the reference numbers of the design."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.exact import GaussianMixture, gaussians, quadrature

pytestmark = pytest.mark.usefixtures("x64")

SCHEDULE = schedules.cosine()


def one_dimensional(weights, means, variances):
    return GaussianMixture(jnp.log(jnp.array(weights)), jnp.array(means)[:, None], jnp.array(variances)[:, None, None])


@pytest.fixture
def p():
    return one_dimensional([0.3, 0.7], [-1.0, 1.5], [0.2, 0.35])


@pytest.fixture
def q():
    return one_dimensional([0.6, 0.4], [-0.8, 1.0], [0.5, 0.3])


@pytest.fixture
def plane():
    """Three components with unequal, correlated covariances in two dimensions."""
    factors = jax.random.normal(jax.random.key(5), (3, 2, 2)) * 0.6
    covariances = factors @ jnp.swapaxes(factors, -1, -2) + 0.15 * jnp.eye(2)
    return GaussianMixture(
        jnp.log(jnp.array([0.2, 0.5, 0.3])), jax.random.normal(jax.random.key(6), (3, 2)), covariances
    )


def log_density(law):
    return lambda x: law.log_prob(x[:, None])


def as_numbers(law):
    return float(law.mean()[0]), float(law.covariance()[0, 0])


# Mean, variance and log normaliser of tilts, products and powers of p and q, to six digits.
REFERENCE = {
    "p": (0.750000, 1.617500, 0.0),
    "q": (-0.080000, 1.197600, 0.0),
    "p^2": (1.008386, 1.143779, -1.233794),
    "p^.5": (0.617492, 2.088053, 0.779261),
    "p q": (0.320075, 1.259655, -1.574770),
    "p^2 / q": (2.027789, 0.951262, 1.266491),
    "p^.4 q^.6": (0.172832, 1.405262, -0.108825),
    "p exp(-1.5(x-.3)^2)": (0.575051, 0.498063, -1.518235),
    "p exp((-.6x^2+.5x)/.5)": (0.745802, 0.514944, -1.034771),
    "p exp(x)": (1.766245, 0.560196, 1.350441),
    "p exp(2 1[x>0])": (1.364711, 0.661087, 1.699555),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_quadrature_gives_the_reference_numbers(name, p, q):
    log_p, log_q = log_density(p), log_density(q)
    density = {
        "p": log_p,
        "q": log_q,
        "p^2": lambda x: 2 * log_p(x),
        "p^.5": lambda x: 0.5 * log_p(x),
        "p q": lambda x: log_p(x) + log_q(x),
        "p^2 / q": lambda x: 2 * log_p(x) - log_q(x),
        "p^.4 q^.6": lambda x: 0.4 * log_p(x) + 0.6 * log_q(x),
        "p exp(-1.5(x-.3)^2)": lambda x: log_p(x) - 1.5 * (x - 0.3) ** 2,
        "p exp((-.6x^2+.5x)/.5)": lambda x: log_p(x) + (-0.6 * x**2 + 0.5 * x) / 0.5,
        "p exp(x)": lambda x: log_p(x) + x,
        "p exp(2 1[x>0])": lambda x: log_p(x) + 2.0 * (x > 0),
    }[name]
    # The indicator's jump costs the trapezoid rule half a cell, 2e-5 of mass.
    np.testing.assert_allclose(quadrature.moments(density), REFERENCE[name], atol=1e-5 if "1[" in name else 1e-6)


def test_closed_forms_give_the_reference_numbers(p, q):
    curved, offset = jnp.array([[3.0]]), jnp.array([0.9])  # -1.5 (x - .3)^2 = -3x^2/2 + .9x - .135
    closed = {
        "p": (p, 0.0),
        "q": (q, 0.0),
        "p^2": (p.product(p), p.product(p).log_mass()),
        "p q": (p.product(q), p.product(q).log_mass()),
        "p exp(-1.5(x-.3)^2)": (p.tilt_quadratic(curved, offset, 1.0), p.log_z(curved, offset, 1.0) - 0.135),
        "p exp((-.6x^2+.5x)/.5)": (
            p.tilt_quadratic(jnp.array([[1.2]]), jnp.array([0.5]), 0.5),
            p.log_z(jnp.array([[1.2]]), jnp.array([0.5]), 0.5),
        ),
        "p exp(x)": (p.tilt_linear(jnp.array([1.0]), 1.0), p.log_z(jnp.zeros((1, 1)), jnp.array([1.0]), 1.0)),
    }
    for name, (law, log_z) in closed.items():
        np.testing.assert_allclose((*as_numbers(law), log_z), REFERENCE[name], atol=1e-6, err_msg=name)


def test_score_is_the_gradient_of_log_prob(plane):
    x = jax.random.normal(jax.random.key(0), (7, 2))
    gradient = jax.vmap(jax.grad(lambda x: plane.log_prob(x[None])[0]))(x)
    np.testing.assert_allclose(plane.score(x), gradient, rtol=1e-9)


def test_samples_have_the_mixtures_moments_and_density(plane):
    n = 40_000
    x = plane.sample(jax.random.key(1), n)
    standard_error = jnp.sqrt(jnp.diag(plane.covariance()) / n)
    assert np.all(np.abs(x.mean(0) - plane.mean()) < 4 * standard_error)  # false alarms: 1e-4
    np.testing.assert_allclose(jnp.cov(x.T), plane.covariance(), atol=0.03)
    inside = plane.log_prob(x) > plane.log_prob(plane.means).min()
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-6, 6, 600)] * 2), -1).reshape(-1, 2)
    log_p = plane.log_prob(grid)
    mass = jnp.sum(jnp.exp(log_p) * (log_p > plane.log_prob(plane.means).min())) * (12 / 599) ** 2
    assert abs(inside.mean() - mass) < 4 * 0.5 / np.sqrt(n)


def test_weights_need_not_be_normalised(plane):
    scaled = plane._replace(log_weights=plane.log_weights + 3.0)
    x = jax.random.normal(jax.random.key(2), (3, 2))
    np.testing.assert_allclose(scaled.log_prob(x), plane.log_prob(x), rtol=1e-10)
    np.testing.assert_allclose(scaled.product(plane).log_mass(), plane.product(plane).log_mass(), rtol=1e-10)
    zeros, a = jnp.zeros((2, 2)), jnp.array([0.3, -1.0])
    np.testing.assert_allclose(scaled.log_z(zeros, a, 0.7), plane.log_z(zeros, a, 0.7), rtol=1e-10)


@pytest.mark.parametrize("schedule", [schedules.vp_linear(), schedules.edm(), schedules.rectified_flow()])
def test_prediction_follows_tweedie_and_reassembles_the_state(plane, schedule):
    x, t = jax.random.normal(jax.random.key(3), (6, 2)), jnp.linspace(0.05, 0.9, 6)
    prediction = plane.predictor(schedule)(x, t)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    score = jnp.stack([plane.at(schedule, t_i).score(x_i[None])[0] for x_i, t_i in zip(x, t, strict=True)])
    np.testing.assert_allclose(prediction.data, (x + sigma**2 * score) / alpha, rtol=1e-8)
    np.testing.assert_allclose(alpha * prediction.data + sigma * prediction.noise, x, rtol=1e-9)


def test_posterior_mean_and_covariance_agree_with_quadrature(p):
    x_t, t = 0.4, 0.55
    alpha, sigma = SCHEDULE.alpha(jnp.asarray(t)), SCHEDULE.sigma(jnp.asarray(t))
    truth = quadrature.moments(lambda x: p.log_prob(x[:, None]) - (x_t - alpha * x) ** 2 / (2 * sigma**2))
    np.testing.assert_allclose(as_numbers(p.posterior(jnp.array([x_t]), SCHEDULE, t)), truth[:2], rtol=1e-9)


def test_reverse_kernel_is_bayes_rule(p):
    """p(x_s | x_t) p(x_t) = p(x_s) p(x_t | x_s), with the forward kernel written out."""
    t, s, x_t = 0.8, 0.3, jnp.array([[0.7]])
    x_s = jnp.linspace(-2, 2, 9)[:, None]
    a_t, s_t, a_s, s_s = (f(jnp.asarray(u)) for u in (t, s) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    ratio = a_t / a_s
    variance = s_t**2 - ratio**2 * s_s**2
    forward = -0.5 * (x_t - ratio * x_s)[:, 0] ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)
    joint = p.at(SCHEDULE, s).log_prob(x_s) + forward
    reverse = p.reverse_kernel(SCHEDULE).log_prob(x_s, jnp.repeat(x_t, 9, 0), t, s)
    np.testing.assert_allclose(reverse + p.at(SCHEDULE, t).log_prob(x_t), joint, rtol=1e-9)


@pytest.mark.parametrize(("t", "s"), [(0.002, 0.0), (1e-4, 0.0), (5e-3, 2e-3), (60.0, 1.0), (0.3, 0.3)])
def test_reverse_kernel_keeps_its_digits_in_single_precision(t, s):
    """The variance is `B - B^2 / C` of two numbers that agree in all digits near data."""
    schedule, variances = schedules.edm(), np.array([100.0, 1.0, 1e-3])
    low, t_low, s_low = jax.tree.map(jnp.float32, (one_dimensional([1.0, 1.0, 1.0], [0.0, 1.0, 2.0], variances), t, s))
    law = low._reverse(jnp.zeros(1, jnp.float32), schedule, t_low, s_low)
    t, s = float(t_low), float(s_low)
    exact = (t**2 - s**2) * (variances + s**2) / (variances + t**2)
    assert law.covariances.dtype == jnp.float32
    np.testing.assert_allclose(law.covariances.ravel(), exact, rtol=1e-5)


def test_one_time_serves_the_whole_batch(p):
    for call in (
        lambda t: p.at(SCHEDULE, t),
        lambda t: p.soft_value(jnp.zeros((2, 1)), t, SCHEDULE, jnp.eye(1), jnp.ones(1), 1.0),
        lambda t: p.reverse_kernel(SCHEDULE).sample(jax.random.key(0), jnp.zeros((2, 1)), t, 0.0),
    ):
        with pytest.raises(ValueError, match=r"t must be a scalar, got shape \(2,\)"):
            call(jnp.array([0.1, 0.9]))


@pytest.mark.parametrize("stops", [(0.0,), (0.7, 0.2, 0.0)])
def test_reverse_kernel_reaches_the_data_law_in_any_number_of_steps(plane, stops):
    n, t = 20_000, 0.95
    keys = jax.random.split(jax.random.key(4), 1 + len(stops))
    x, kernel = plane.at(SCHEDULE, t).sample(keys[0], n), plane.reverse_kernel(SCHEDULE)
    for key, s in zip(keys[1:], stops, strict=True):
        x, t = kernel.sample(key, x, t, s), s
    standard_error = jnp.sqrt(jnp.diag(plane.covariance()) / n)
    assert np.all(np.abs(x.mean(0) - plane.mean()) < 4 * standard_error)
    np.testing.assert_allclose(jnp.cov(x.T), plane.covariance(), atol=0.04)


def test_soft_value_is_the_log_expectation_of_the_reward(p):
    t, beta, x = 0.5, 0.5, jnp.array([[0.2], [-1.1]])
    A, b = jnp.array([[1.2]]), jnp.array([0.5])
    alpha, sigma = SCHEDULE.alpha(jnp.asarray(t)), SCHEDULE.sigma(jnp.asarray(t))
    for x_t, value in zip(x[:, 0], p.soft_value(x, t, SCHEDULE, A, b, beta), strict=True):
        log_posterior = lambda y: p.log_prob(y[:, None]) - (x_t - alpha * y) ** 2 / (2 * sigma**2)  # noqa: E731
        tilted = quadrature.moments(lambda y: log_posterior(y) + (-0.6 * y**2 + 0.5 * y) / beta)
        np.testing.assert_allclose(value, beta * (tilted.log_z - quadrature.moments(log_posterior).log_z), rtol=1e-9)


def test_soft_value_at_the_two_ends_is_reward_and_log_normaliser(plane):
    A, b, beta = jnp.array([[0.8, 0.1], [0.1, 0.5]]), jnp.array([0.4, -0.7]), 0.6
    x = jax.random.normal(jax.random.key(7), (5, 2))
    reward = -0.5 * jnp.einsum("bi,ij,bj->b", x, A, x) + x @ b
    np.testing.assert_allclose(plane.soft_value(x, 0.0, SCHEDULE, A, b, beta), reward, rtol=1e-9)
    at_noise = plane.soft_value(x, 1.0, SCHEDULE, A, b, beta)
    np.testing.assert_allclose(at_noise, beta * plane.log_z(A, b, beta), rtol=1e-9)


def test_exponentiated_soft_value_is_a_martingale(p):
    """E[exp(V_s / beta) | x_t] = exp(V_t / beta), by quadrature over the exact reverse kernel."""
    t, s, beta, x_t = 0.8, 0.35, 0.7, jnp.array([[0.3]])
    kernel = p.reverse_kernel(SCHEDULE)
    arguments = {
        "soft_value": (jnp.array([[0.9]]), jnp.array([0.5]), beta),
        "soft_value_half_space": (jnp.array([1.0]), 0.2, beta, 1.5),
    }
    for name, reward in arguments.items():
        value = lambda x, u: getattr(p, name)(x, u, SCHEDULE, *reward)  # noqa: E731

        def log_mass(x, value=value):
            log_kernel = kernel.log_prob(x[:, None], jnp.broadcast_to(x_t, (x.size, 1)), t, s)
            return log_kernel + value(x[:, None], s) / beta

        total = quadrature.moments(log_mass, n=4001).log_z
        np.testing.assert_allclose(total, value(x_t, t)[0] / beta, rtol=1e-6, err_msg=name)


def test_half_space_soft_value_at_noise_is_the_reference_log_normaliser(p):
    value = p.soft_value_half_space(jnp.zeros((1, 1)), 1.0, SCHEDULE, jnp.array([1.0]), 0.0, 1.0, 2.0)
    np.testing.assert_allclose(value, REFERENCE["p exp(2 1[x>0])"][2], atol=1e-5)


def test_tilts_compose_and_point_masses_stay(plane):
    a, beta = jnp.array([0.5, -1.0]), 0.4
    twice = plane.tilt_linear(a, beta).tilt_linear(a, beta)
    x = jax.random.normal(jax.random.key(8), (4, 2))
    np.testing.assert_allclose(twice.log_prob(x), plane.tilt_linear(2 * a, beta).log_prob(x), rtol=1e-8)
    ratio = plane.tilt_linear(a, beta).log_prob(x) - plane.log_prob(x)
    np.testing.assert_allclose(ratio, x @ a / beta - plane.log_z(jnp.zeros((2, 2)), a, beta), rtol=1e-8)
    atoms = plane._replace(covariances=jnp.zeros_like(plane.covariances)).tilt_linear(a, beta)
    np.testing.assert_allclose(atoms.means, plane.means)
    np.testing.assert_allclose(
        atoms.log_weights, jax.nn.log_softmax(plane.log_weights + plane.means @ a / beta), rtol=1e-9
    )


def test_a_tilt_that_does_not_exist_is_not_finite(p):
    assert not np.isfinite(p.tilt_quadratic(jnp.array([[-4.0]]), jnp.zeros(1), 1.0).log_weights).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("A", [(-2.0, -2.0), (-1.0, -1.0), (-1e8, -1e8), (-2.0, 1e8), (-2.0, -2.0, 1e8)])
def test_a_tilt_with_negative_directions_does_not_exist_however_many_they_are(A, dtype):
    n, A = len(A), jnp.diag(jnp.array(A, dtype))
    law = GaussianMixture(jnp.zeros(1, dtype), jnp.zeros((1, n), dtype), jnp.eye(n, dtype=dtype)[None])
    assert not np.isfinite(law.log_z(A, jnp.ones(n, dtype), 1.0))
    for field in law.tilt_quadratic(A, jnp.ones(n, dtype), 1.0):
        assert not np.isfinite(field).any()


def test_one_component_without_a_tilt_leaves_none_to_the_mixture(plane):
    wide = plane._replace(covariances=plane.covariances.at[1].set(3 * jnp.eye(2)))
    A = -0.5 * jnp.eye(2)
    assert np.isfinite(GaussianMixture(*(field[1:2] for field in wide)).log_z(-0.3 * jnp.eye(2), jnp.zeros(2), 1.0))
    assert not np.isfinite(wide.log_z(A, jnp.zeros(2), 1.0))


def test_a_precise_observation_of_one_direction_is_a_tilt_in_single_precision():
    """Its eigenvalues, 1e8 and 1, are too far apart for float32 to tell the sign of the smaller one."""
    covariance = jnp.array([[1.0, 0.6], [0.6, 2.0]], jnp.float32)
    law = GaussianMixture(jnp.zeros(1, jnp.float32), jnp.zeros((1, 2), jnp.float32), covariance[None])
    out = law.tilt_quadratic(jnp.diag(jnp.array([1.0, 0.0], jnp.float32)), jnp.zeros(2, jnp.float32), 1e-8)
    np.testing.assert_allclose(out.covariances[0], [[1e-8, 0.6e-8], [0.6e-8, 1.64]], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(out.log_weights, 0.0)


def test_gradients_of_a_tilt_agree_with_finite_differences(plane):
    """Equal eigenvalues too, at which those of an eigendecomposition would be NaN."""
    laws = (plane, plane._replace(covariances=jnp.stack([0.5 * jnp.eye(2)] * 3)))
    A, b, beta = jnp.array([[0.6, 0.2], [0.2, -0.1]]), jnp.array([0.4, -0.7]), 0.9
    for law in laws:
        arguments = (law, A, b, beta)
        jax.test_util.check_grads(lambda law, *reward: law.log_z(*reward), arguments, 1, ("fwd", "rev"), eps=1e-5)


def test_annealing_a_gaussian_agrees_with_quadrature_and_a_mixture_is_refused(p):
    law = one_dimensional([1.0], [0.6], [0.3])
    annealed = law.anneal(2.5)
    truth = quadrature.moments(lambda x: 2.5 * law.log_prob(x[:, None]))
    np.testing.assert_allclose((*as_numbers(annealed), annealed.log_mass().squeeze()), truth, rtol=1e-8)
    with pytest.raises(ValueError, match="mixture of 2"):
        p.anneal(2.0)


def test_probability_flow_maps_marginal_to_marginal_and_follows_the_ode():
    mean, covariance = jnp.array([0.6, -0.2]), jnp.array([[0.5, 0.2], [0.2, 0.3]])
    law, schedule, t = GaussianMixture(jnp.zeros(1), mean[None], covariance[None]), schedules.rectified_flow(), 0.6
    x = jnp.array([[0.3, 0.9], [-1.0, 0.1]])
    there = gaussians.probability_flow(x, t, 0.1, mean, covariance, schedule)
    np.testing.assert_allclose(gaussians.probability_flow(there, 0.1, t, mean, covariance, schedule), x, rtol=1e-9)
    velocity = jax.jacfwd(lambda s: gaussians.probability_flow(x, t, s, mean, covariance, schedule))(t)
    data, noise = law.predictor(schedule)(x, jnp.full(2, t))
    np.testing.assert_allclose(velocity, noise - data, rtol=1e-7)


def test_geometric_average_agrees_with_quadrature_and_plain_guidance_does_not_reach_it():
    uncond, cond, w = one_dimensional([1.0], [0.0], [1.0]), one_dimensional([1.0], [1.0], [0.3]), 2.5
    target = gaussians.geometric_average(uncond, cond, w)
    truth = quadrature.moments(lambda x: (1 - w) * log_density(uncond)(x) + w * log_density(cond)(x))
    np.testing.assert_allclose(as_numbers(target), truth[:2], rtol=1e-8)
    np.testing.assert_allclose(as_numbers(target), (1.2195, 0.1463), atol=1e-4)
    mean, variance = gaussians.cfg_law(0.0, 1.0, 1.0, 0.3, w, 80.0)
    np.testing.assert_allclose(
        mean, 1.5318413, atol=1e-5
    )  # from integrating the ODE of the mean with an adaptive solver
    np.testing.assert_allclose(variance, 0.0493, atol=5e-5)
    with pytest.raises(ValueError, match="cond must be a single Gaussian"):
        gaussians.geometric_average(uncond, one_dimensional([0.5, 0.5], [0.0, 1.0], [1.0, 1.0]), w)


def test_guidance_between_equal_variances_is_exact():
    mean, variance = gaussians.cfg_law(-0.4, 0.5, 1.0, 0.5, 3.0, 1e4)
    np.testing.assert_allclose((mean, variance), ((1 - 3.0) * -0.4 + 3.0, 0.5), rtol=1e-3)


def test_a_wrong_shape_is_named(p):
    with pytest.raises(ValueError, match=r"x must have shape \[B, 1\], got \(3,\)"):
        p.log_prob(jnp.zeros(3))

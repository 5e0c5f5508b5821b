"""Every stepper has its stated order on the exact mixture, its limits, and the identities that tie it to the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.core.exact import GaussianMixture, gaussians
from esscher.samplers import integrate, steppers

pytestmark = pytest.mark.usefixtures("x64")

EDM, COSINE, FLOW = schedules.edm(), schedules.cosine(), schedules.rectified_flow()


def mixture():
    return GaussianMixture(jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-1.0], [1.5]]), jnp.array([[[0.2]], [[0.35]]]))


def solve(stepper, schedule, n, t_max, t_min, key=0):
    """Ends of the paths from fixed starts on a grid uniform in log SNR."""
    times = schedules.log_snr_times(n, schedule, t_max, t_min)
    x = jnp.linspace(-1.5, 1.5, 7)[:, None] * schedule.sigma(times[0])
    return jax.jit(integrate, static_argnums=(1, 2))(
        jax.random.key(key), stepper, mixture().predictor(schedule), x, times
    )


def observed_order(stepper, schedule, t_max, t_min, steps=(16, 32, 64)):
    """Slope of log error against log step size between the last two grids, the truth by fourth order's fine grid."""
    truth = solve(steppers.heun(schedule), schedule, 4096, t_max, t_min)
    errors = [float(jnp.abs(solve(stepper, schedule, n, t_max, t_min) - truth).max()) for n in steps]
    return np.log(errors[-2] / errors[-1]) / np.log(steps[-1] / steps[-2])


@pytest.mark.parametrize(
    ("stepper", "low", "high"),
    [(steppers.ddim, 0.8, 1.3), (steppers.euler, 0.8, 1.3), (steppers.heun, 1.8, 2.4)],
)
@pytest.mark.parametrize(("schedule", "t_max", "t_min"), [(EDM, 10.0, 0.2), (COSINE, 0.95, 0.1)])
def test_order_of_convergence(stepper, low, high, schedule, t_max, t_min):
    assert low <= observed_order(stepper(schedule), schedule, t_max, t_min) <= high


def test_eta_one_is_the_posterior_of_ddpm():
    """Mean and standard deviation of one step against q(x_s | x_t, x_0 = D), multiplied out from the two Gaussians."""
    t, s, x = jnp.asarray(0.7), jnp.asarray(0.4), jnp.array([[0.3], [-1.2]])
    a_t, s_t, a_s, s_s = (f(u) for u in (t, s) for f in (COSINE.alpha, COSINE.sigma))
    prediction = mixture().predictor(COSINE)(x, jnp.full(2, t))
    ratio, forward_variance = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
    variance = 1 / (1 / s_s**2 + ratio**2 / forward_variance)
    mean = variance * (a_s * prediction.data / s_s**2 + ratio * x / forward_variance)
    step = lambda key: steppers.ancestral(COSINE).step(key, x, prediction, t, s, (), None)[0]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape, x.dtype))(keys)
    np.testing.assert_allclose(jax.vmap(step)(keys), mean + jnp.sqrt(variance) * noise, rtol=1e-9)


def test_euler_is_ddim_where_alpha_and_sigma_are_linear_in_time():
    for schedule, t_max in ((EDM, 5.0), (FLOW, 0.9)):
        ends = [solve(make(schedule), schedule, 7, t_max, 0.1) for make in (steppers.euler, steppers.ddim)]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_edm_stochastic_without_churn_is_heun():
    ends = [solve(s, EDM, 9, 10.0, 0.2) for s in (steppers.heun(EDM), steppers.edm_stochastic(EDM, 9, churn=0.0))]
    np.testing.assert_allclose(*ends, rtol=1e-10)


def test_a_constant_noise_prediction_is_integrated_exactly_down_to_the_data():
    """If eps does not depend on the state, x_0 = (x_t - sigma_t eps) / alpha_t, in one step or many."""
    x = jnp.array([[0.4, -2.0]])
    for make in (steppers.ddim, steppers.euler, steppers.heun):
        for schedule, n in ((EDM, 1), (FLOW, 3)):
            predictor = lambda x, t: Prediction(  # noqa: E731
                (x - schedule.sigma(t)[:, None] * 0.7) / schedule.alpha(t)[:, None], jnp.full_like(x, 0.7)
            )
            times = schedules.uniform_times(n, 0.8)
            x_0 = (x - schedule.sigma(times[0]) * 0.7) / schedule.alpha(times[0])
            np.testing.assert_allclose(
                integrate(jax.random.key(0), make(schedule), predictor, x, times), x_0, rtol=1e-9
            )


def test_gaussian_paths_end_where_the_exact_flow_ends():
    mean, covariance = jnp.array([0.6]), jnp.array([[0.3]])
    law = GaussianMixture(jnp.zeros(1), mean[None], covariance[None])
    x = jnp.linspace(-100, 100, 5)[:, None]
    exact = gaussians.probability_flow(x, 80.0, 0.0, mean, covariance, EDM)
    errors = []
    for n in (100, 200, 400):
        end = integrate(jax.random.key(0), steppers.heun(EDM), law.predictor(EDM), x, schedules.edm_times(n))
        errors.append(float(jnp.abs(end - exact).max()))
    assert errors[-1] < 1e-4
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2]


@pytest.mark.parametrize("bad", [[0.0, 0.5, 1.0], [1.0, 0.5, 0.5]])
def test_a_grid_that_does_not_decrease_is_rejected(bad):
    with pytest.raises(ValueError, match="times must be strictly decreasing"):
        integrate(jax.random.key(0), steppers.ddim(FLOW), mixture().predictor(FLOW), jnp.zeros((2, 1)), jnp.array(bad))


def test_integer_states_and_scalar_grids_are_rejected():
    predictor = mixture().predictor(FLOW)
    with pytest.raises(ValueError, match="x must be of a floating type, got int"):
        integrate(jax.random.key(0), steppers.ddim(FLOW), predictor, jnp.zeros((2, 1), int), jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="times must be a vector of at least two"):
        integrate(jax.random.key(0), steppers.ddim(FLOW), predictor, jnp.zeros((2, 1)), jnp.array(1.0))

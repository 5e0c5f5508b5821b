"""Stochastic steppers reach the law of the mixture, at the stated order; by Monte Carlo with fixed seeds."""

import jax
import numpy as np
import pytest

from esscher.core import schedules
from esscher.samplers import integrate, steppers

EDM, COSINE = schedules.edm(), schedules.cosine()
N_PARTICLES = 100_000


def bias(line, stepper, schedule, t_max, n, t_min=0.02):
    """Errors of the mean and of the variance after n steps, and their standard errors."""
    x = line.at(schedule, t_max).sample(jax.random.key(1), N_PARTICLES)
    times = schedules.log_snr_times(n, schedule, t_max, t_min)
    run = jax.jit(lambda x: integrate(jax.random.key(n), stepper, line.predictor(schedule), x, times))
    x = np.asarray(run(x), np.float64)
    mean, variance = line.at(schedule, t_min).moments()
    fourth = np.mean((x - x.mean()) ** 4)
    standard_errors = np.sqrt(np.array([variance, fourth - variance**2]) / N_PARTICLES)
    return np.array([x.mean() - mean, x.var() - variance]), standard_errors


@pytest.mark.parametrize(
    ("make", "schedule", "t_max"),
    [
        (lambda n: steppers.sde_dpm_solver_pp_2m(COSINE), COSINE, 0.99),
        (lambda n: steppers.edm_stochastic(EDM, n, churn=20.0, sigma_low=0.0, noise_scale=1.0), EDM, 40.0),
    ],
    ids=["sde_dpm_solver_pp_2m", "edm_stochastic"],
)
def test_second_order_stochastic_steppers_reach_the_law_of_the_mixture(line, make, schedule, t_max):
    """The bias of the variance falls at order 2; at 80 steps both biases are within 4 standard errors.

    False alarms: 1e-4 each; at 16 steps the second is more than 10 standard errors.
    """
    (coarse, standard_error), (fine, _) = (bias(line, make(n), schedule, t_max, n) for n in (16, 32))
    assert abs(coarse[1]) > 10 * standard_error[1]
    assert 1.4 < np.log2(coarse[1] / fine[1]) < 2.6
    error, standard_error = bias(line, make(80), schedule, t_max, 80)
    assert np.all(np.abs(error) < 4 * standard_error)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_approaches_the_law_of_the_mixture_at_first_order(line, eta):
    """The bias of the variance halves with the step; extrapolated, a fifth of it is not left (4 standard errors)."""
    coarse, fine = (bias(line, steppers.ddim(COSINE, eta), COSINE, 0.99, n)[0] for n in (16, 32))
    assert 0.75 < np.log2(coarse[1] / fine[1]) < 1.25
    assert abs(2 * fine[1] - coarse[1]) < 0.2 * abs(coarse[1])

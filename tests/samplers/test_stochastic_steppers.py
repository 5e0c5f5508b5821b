"""One step of a stochastic stepper is the stated Gaussian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.samplers import guidance, integrate, steppers

pytestmark = pytest.mark.usefixtures("x64")

EDM, COSINE = schedules.edm(), schedules.cosine()
T, S = 0.7, 0.4


def coefficients(t, s):
    return (f(jnp.asarray(u)) for u in (t, s) for f in (COSINE.alpha, COSINE.sigma))


def steps_with_their_noise(stepper, prediction, x, t, s, carry):
    """Three draws of `x_s` and the standard normal noise each was made with."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: stepper.step(key, x, prediction, jnp.asarray(t), jnp.asarray(s), carry, None)[0]  # noqa: E731
    return jax.vmap(draw)(keys), jax.vmap(lambda key: jax.random.normal(key, x.shape, x.dtype))(keys)


def test_eta_one_is_the_posterior_of_ddpm_and_the_first_step_of_sde_two_m(line):
    """Mean and standard deviation of one step against q(x_s | x_t, x_0 = D), multiplied out from the two Gaussians."""
    x, (a_t, s_t, a_s, s_s) = jnp.array([[0.3], [-1.2]]), coefficients(T, S)
    prediction = line.predictor(COSINE)(x, jnp.full(2, T))
    ratio, forward_variance = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
    variance = 1 / (1 / s_s**2 + ratio**2 / forward_variance)
    mean = variance * (a_s * prediction.data / s_s**2 + ratio * x / forward_variance)
    for stepper in (steppers.ancestral(COSINE), steppers.ddim(COSINE, 1.0), steppers.sde_dpm_solver_pp_2m(COSINE)):
        ends, noise = steps_with_their_noise(stepper, prediction, x, T, S, stepper.init(x))
        np.testing.assert_allclose(ends, mean + jnp.sqrt(variance) * noise, rtol=1e-9)


def test_eta_scales_the_noise_and_keeps_the_variance_of_the_state(line):
    x, (_, _, a_s, s_s), eta = jnp.array([[0.3], [-1.2]]), coefficients(T, S), 0.6
    prediction = line.predictor(COSINE)(x, jnp.full(2, T))
    full, noise = steps_with_their_noise(steppers.ancestral(COSINE), prediction, x, T, S, ())
    fresh = ((full[0] - full[1]) / (noise[0] - noise[1]))[0, 0]  # standard deviation at eta = 1
    expected = a_s * prediction.data + jnp.sqrt(s_s**2 - (eta * fresh) ** 2) * prediction.noise + eta * fresh * noise
    ends, _ = steps_with_their_noise(steppers.ddim(COSINE, eta), prediction, x, T, S, ())
    np.testing.assert_allclose(ends, expected, rtol=1e-9)


def test_sde_two_m_is_the_papers_formula(line):
    """x_s = (s_s/s_t) e^-h x + a_s (1 - e^-2h) (D + (D - D_prev) / 2r) + s_s sqrt(1 - e^-2h) z, on unequal steps."""
    x, before = jnp.array([[0.3], [-1.2]]), 0.85
    previous, current = (line.predictor(COSINE)(x, jnp.full(2, u)) for u in (before, T))
    stepper = steppers.sde_dpm_solver_pp_2m(COSINE)
    step = functools.partial(stepper.step, jax.random.key(1), x)
    _, carry = step(previous, jnp.asarray(before), jnp.asarray(T), stepper.init(x), None)
    lam = [float(COSINE.log_snr_half(jnp.asarray(u))) for u in (before, T, S)]
    h, r, (_, s_t, a_s, s_s) = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1]), coefficients(T, S)
    data = current.data + (current.data - previous.data) / (2 * r)
    mean = s_s / s_t * np.exp(-h) * x - a_s * np.expm1(-2 * h) * data
    ends, noise = steps_with_their_noise(stepper, current, x, T, S, carry)
    np.testing.assert_allclose(ends, mean + s_s * np.sqrt(-np.expm1(-2 * h)) * noise, rtol=1e-9)


def test_cfg_plus_plus_with_noise_is_cfg_at_the_weight_that_its_step_makes_of_it(line):
    """One step at l is one with CFG at w = l / (1 - k e^-h), with `k sigma_s` of the noise kept: e^-h if eta is 1."""
    cond, uncond = line._replace(weights=jnp.array([0.01, 0.99])).predictor(COSINE), line.predictor(COSINE)
    x, lam = jnp.array([[0.3], [-1.2]]), COSINE.log_snr_half(jnp.array([T, S]))
    decay = np.exp(lam[0] - lam[1])
    for stepper, eta in (
        (steppers.ancestral(COSINE), 1.0),
        (steppers.sde_dpm_solver_pp_2m(COSINE), 1.0),
        (steppers.ddim(COSINE, 0.6), 0.6),
    ):
        w = 0.6 / (1 - np.sqrt(1 - eta**2 * (1 - decay**2)) * decay)
        predictors = guidance.cfg_plus_plus(cond, uncond, 0.6), guidance.cfg(cond, uncond, w)
        ends = [
            steps_with_their_noise(stepper, predict(x, jnp.full(2, T)), x, T, S, stepper.init(x))[0]
            for predict in predictors
        ]
        np.testing.assert_allclose(*ends, rtol=1e-10)


def test_edm_stochastic_without_churn_is_heun(line):
    x, times = jnp.linspace(-10, 10, 7)[:, None], schedules.log_snr_times(5, EDM, 10.0, 0.2)

    @jax.jit
    def run(churn, sigma_low):
        stepper = steppers.edm_stochastic(EDM, 5, churn, sigma_low)
        return integrate(jax.random.key(0), stepper, line.predictor(EDM), x, times)

    heun = integrate(jax.random.key(0), steppers.heun(EDM), line.predictor(EDM), x, times)
    np.testing.assert_allclose(run(0.0, 0.05), heun, rtol=1e-10)
    np.testing.assert_allclose(run(2.0, 11.0), heun, rtol=1e-10)  # churned above the highest level only
    assert np.abs(run(2.0, 0.05) - heun).max() > 0.1


def test_edm_stochastic_raises_the_noise_before_it_asks_the_model(line):
    """The state is `x + sqrt(t^^2 - t^2) noise_scale z` at `t^ = t (1 + churn / n)`, at most `sqrt(2) t`."""
    x, key, seen = jnp.linspace(-10, 10, 3)[:, None], jax.random.key(3), []

    def record(x, t):
        seen.append((x, t))
        return line.predictor(EDM)(x, t)

    for churn in (1.8, 100.0):
        stepper = steppers.edm_stochastic(EDM, 9, churn, noise_scale=1.1)
        stepper.step(key, x, None, jnp.asarray(10.0), jnp.asarray(5.0), (), record)
    added = np.sqrt(12.0**2 - 10.0**2) * 1.1 * jax.random.normal(key, x.shape, x.dtype)
    np.testing.assert_allclose(seen[0][1], 12.0, rtol=1e-12)
    np.testing.assert_allclose(seen[0][0], x + added, rtol=1e-12)
    np.testing.assert_allclose(seen[2][1], 10 * np.sqrt(2), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: steppers.edm_stochastic(COSINE, 5),
            r"schedule must be ve or edm, whose alpha is 1, got alpha\(0.5\) =",
        ),
        (lambda: steppers.edm_stochastic(EDM, 0), "n must be at least 1, got 0"),
        (lambda: steppers.edm_stochastic(EDM, 5, -1.0), r"churn must be at least 0, got -1\.0"),
        (lambda: steppers.ddim(COSINE, 2.0), r"eta must be in \[0, 1\], got 2\.0"),
    ],
)
def test_noise_that_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: [make(), 0][1])  # while another program is traced too

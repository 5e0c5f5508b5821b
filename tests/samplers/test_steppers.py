"""Every deterministic stepper has its stated order on the exact mixture, and is tied to the others by identities."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.core.exact import gaussians
from esscher.samplers import guidance, integrate, steppers
from esscher.samplers.steppers.coefficients import phis

pytestmark = pytest.mark.usefixtures("x64")

EDM, COSINE, VP, FLOW = schedules.edm(), schedules.cosine(), schedules.vp_linear(), schedules.rectified_flow()
UNIC = {
    f"unipc{order}_{variant}": functools.partial(steppers.unipc, order=order, variant=variant)
    for order, variant in ((1, "bh1"), (2, "bh1"), (2, "bh2"), (3, "bh2"))
}


def solve(stepper, predictor, x, times, key=0):
    return jax.jit(lambda x, times: integrate(jax.random.key(key), stepper, predictor, x, times))(x, times)


def one_step(stepper, prediction, x, t, s, carry=None, key=0):
    """`(x_s, carry)` of a single step with a prediction made elsewhere."""
    carry = stepper.init(x) if carry is None else carry
    return stepper.step(jax.random.key(key), x, prediction, jnp.asarray(t), jnp.asarray(s), carry, None)


def observed_order(line, stepper, schedule, t_max, t_min, steps=(32, 64)):
    """Slope of log error against log step size, on grids uniform in log SNR; the truth matches quantiles."""
    x = jnp.linspace(-1.5, 1.5, 7)[:, None] * schedule.sigma(jnp.asarray(t_max))
    truth, predictor = line.flow(schedule, x, t_max, t_min), line.predictor(schedule)

    @jax.jit  # the loop is outside, so that grids of all lengths share one compilation
    def step(x, carry, t, s):
        prediction = predictor(x, jnp.broadcast_to(t, x.shape[:1]))
        return stepper.step(jax.random.key(0), x, prediction, t, s, carry, predictor)

    errors = []
    for n in steps:
        times, end, carry = schedules.log_snr_times(n, schedule, t_max, t_min), x, stepper.init(x)
        for t, s in itertools.pairwise(times):
            end, carry = step(end, carry, t, s)
        errors.append(float(jnp.abs(end - truth).max()))
    return np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])


# --- order ------------------------------------------------------------------------------------------------------------

ORDERS = {
    "ddim": (steppers.ddim, 0.85, 1.2),
    "euler": (steppers.euler, 0.85, 1.2),
    "heun": (steppers.heun, 1.8, 2.3),
    "dpm_solver_2": (steppers.dpm_solver_2, 1.8, 2.3),
    "dpm_solver_3": (steppers.dpm_solver_3, 2.8, 3.3),
    "dpm_solver_pp_2m": (steppers.dpm_solver_pp_2m, 1.8, 2.3),
    "unipc2_bh2": (UNIC["unipc2_bh2"], 2.6, 3.3),
    "unipc3_bh2": (UNIC["unipc3_bh2"], 3.0, 5.5),
}
VARIANTS = {
    "dpm_solver_2_r1": (functools.partial(steppers.dpm_solver_2, r1=0.8), 1.8, 2.3),
    "dpm_solver_3_r1": (functools.partial(steppers.dpm_solver_3, r1=0.6), 2.8, 3.3),
    "dpm_solver_3_r2": (functools.partial(steppers.dpm_solver_3, r2=0.5), 1.8, 2.5),  # only 2/3 gives order 3
    "unipc1_bh1": (UNIC["unipc1_bh1"], 1.8, 2.3),
    "unipc2_bh1": (UNIC["unipc2_bh1"], 2.7, 3.3),
}


@pytest.mark.parametrize(("stepper", "low", "high"), ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("schedule", "t_max", "t_min"), [(EDM, 10.0, 0.2), (VP, 0.9, 0.1)], ids=["edm", "vp"])
def test_order_of_convergence(line, stepper, low, high, schedule, t_max, t_min):
    assert low <= observed_order(line, stepper(schedule), schedule, t_max, t_min) <= high


@pytest.mark.parametrize(("stepper", "low", "high"), VARIANTS.values(), ids=VARIANTS)
def test_order_of_convergence_of_variants(line, stepper, low, high):
    assert low <= observed_order(line, stepper(COSINE), COSINE, 0.95, 0.1) <= high


def test_the_third_order_predictor_alone_is_held_back_by_its_start(line):
    """Two start-up steps of lower order cap the asymptotic order at 2, as fine grids show."""
    stepper = steppers.unipc(EDM, 3, corrector=False)
    assert 1.75 < observed_order(line, stepper, EDM, 10.0, 0.2, (256, 512)) < 2.25


@pytest.mark.parametrize("make", [steppers.heun, steppers.dpm_solver_2, steppers.dpm_solver_3])
def test_a_small_step_is_the_exact_flow_of_a_gaussian_up_to_its_order(gaussian, make):
    """The error of one step against the closed form falls as h^(order + 1)."""
    x, t, errors = jnp.array([[0.3], [-1.0]]), 0.6, []
    for h in (0.1, 0.05):
        s = float(COSINE.inverse_log_snr_half(COSINE.log_snr_half(jnp.asarray(t)) + h))
        end = solve(make(COSINE), gaussian(0.6, 0.3).predictor(COSINE), x, jnp.array([t, s]))
        exact = gaussians.probability_flow(x, t, s, jnp.array([0.6]), jnp.array([[0.3]]), COSINE)
        errors.append(jnp.abs(end - exact).max())
    order = 3 if make is steppers.dpm_solver_3 else 2
    assert abs(np.log2(errors[0] / errors[1]) - (order + 1)) < 0.25


def test_gaussian_paths_end_where_the_exact_flow_ends(gaussian):
    x, errors = jnp.linspace(-100, 100, 5)[:, None], []
    exact = gaussians.probability_flow(x, 80.0, 0.0, jnp.array([0.6]), jnp.array([[0.3]]), EDM)
    for n in (100, 200):
        end = solve(steppers.heun(EDM), gaussian(0.6, 0.3).predictor(EDM), x, schedules.edm_times(n))
        errors.append(float(jnp.abs(end - exact).max()))
    assert errors[1] < 4e-4
    assert errors[0] > 3.5 * errors[1]


# --- identities -------------------------------------------------------------------------------------------------------


def test_the_line_is_the_mixture(line):
    x, t = jnp.linspace(-2, 3, 6)[:, None], jnp.linspace(0.05, 1.0, 6)
    ours, exact = (jax.jit(law.predictor(COSINE))(x, t) for law in (line, line.mixture()))
    np.testing.assert_allclose(ours.data, exact.data, rtol=1e-9)
    np.testing.assert_allclose(ours.noise, exact.noise, rtol=1e-9)


def test_the_first_order_steps_are_one(line):
    """DDIM = DPM-Solver-1 = DPM-Solver++(1) = UniP-1, against the noise form and the data form of the papers."""
    x, t, s = jnp.array([[0.3], [-1.2]]), 0.7, 0.4
    a_t, s_t, a_s, s_s = (f(jnp.asarray(u)) for u in (t, s) for f in (COSINE.alpha, COSINE.sigma))
    h = jnp.log(a_s / s_s) - jnp.log(a_t / s_t)
    prediction = line.predictor(COSINE)(x, jnp.full(2, t))
    expected = a_s / a_t * x - s_s * jnp.expm1(h) * prediction.noise
    np.testing.assert_allclose(s_s / s_t * x - a_s * jnp.expm1(-h) * prediction.data, expected, rtol=1e-12)
    for stepper in (
        steppers.ddim(COSINE),
        steppers.ddim(COSINE, eta=0.0),
        steppers.dpm_solver_1(COSINE),
        steppers.dpm_solver_pp_2m(COSINE),
        steppers.unipc(COSINE, 1, corrector=False),
    ):
        np.testing.assert_allclose(one_step(stepper, prediction, x, t, s)[0], expected, rtol=1e-12)


def test_two_m_is_the_papers_formula(line):
    """x_s = (s_s/s_t) x - a_s (e^-h - 1) ((1 + 1/2r) D - D_prev / 2r), on steps of unequal length."""
    x, times = jnp.array([[0.3], [-1.2]]), (0.8, 0.55, 0.45)
    lams = [float(COSINE.log_snr_half(jnp.asarray(u))) for u in times]
    previous, current = (line.predictor(COSINE)(x, jnp.full(2, u)) for u in times[:2])
    stepper = steppers.dpm_solver_pp_2m(COSINE)
    carry = one_step(stepper, previous, x, *times[:2])[1]
    h, r = lams[2] - lams[1], (lams[1] - lams[0]) / (lams[2] - lams[1])
    data = (1 + 1 / (2 * r)) * current.data - previous.data / (2 * r)
    sigma_t, sigma_s, alpha_s = (
        f(jnp.asarray(u))
        for f, u in zip((COSINE.sigma, COSINE.sigma, COSINE.alpha), (times[1], times[2], times[2]), strict=True)
    )
    expected = sigma_s / sigma_t * x - alpha_s * np.expm1(-h) * data
    np.testing.assert_allclose(one_step(stepper, current, x, *times[1:], carry)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", [EDM, COSINE], ids=["edm", "cosine"])
def test_unip_two_is_two_m_with_any_guidance_on_any_grid(line, schedule):
    uncond, cond = line.predictor(schedule), line._replace(weights=jnp.array([0.01, 0.99])).predictor(schedule)
    times = schedules.edm_times(9) if schedule is EDM else schedules.uniform_times(9)
    x = jnp.linspace(-1.5, 1.5, 5)[:, None] * schedule.sigma(times[0])
    ends = [
        jax.jit(lambda w: integrate(jax.random.key(0), stepper, guidance.cfg_plus_plus(cond, uncond, w), x, times))
        for stepper in (steppers.dpm_solver_pp_2m(schedule), steppers.unipc(schedule, 2, corrector=False))
    ]
    for w in (0.0, 0.4):
        np.testing.assert_allclose(ends[0](w), ends[1](w), rtol=1e-12)


def test_the_corrector_of_order_one_is_the_trapezoid_in_the_data_term(line):
    """The second step starts from x^c = x^p + a_s (1 - e^-h) (D(x^p) - D(x)) / 2, with the data term of x^p."""
    x, times = jnp.array([[0.3], [-1.2]]), (0.8, 0.6, 0.45)
    a, sg, lam = (np.asarray(f(jnp.array(times))) for f in (COSINE.alpha, COSINE.sigma, COSINE.log_snr_half))
    predictor = line.predictor(COSINE)
    first = predictor(x, jnp.full(2, times[0]))
    predicted = a[1] * first.data + sg[1] * first.noise
    second = predictor(predicted, jnp.full(2, times[1]))
    corrected = predicted - 0.5 * a[1] * np.expm1(lam[0] - lam[1]) * (second.data - first.data)
    expected = sg[2] / sg[1] * corrected - a[2] * np.expm1(lam[1] - lam[2]) * second.data
    end = solve(steppers.unipc(COSINE, 1), predictor, x, jnp.array(times))
    np.testing.assert_allclose(end, expected, rtol=1e-12)


def test_euler_is_ddim_where_alpha_and_sigma_are_linear_in_time(line):
    for schedule, t_max in ((EDM, 5.0), (FLOW, 0.9)):
        x, times = jnp.linspace(-1.5, 1.5, 7)[:, None], schedules.log_snr_times(7, schedule, t_max, 0.1)
        predictor = line.predictor(schedule)
        ends = [solve(make(schedule), predictor, x, times) for make in (steppers.euler, steppers.ddim)]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_a_constant_noise_prediction_is_integrated_exactly_down_to_the_data():
    """If eps does not depend on the state, x_0 = (x_t - sigma_t eps) / alpha_t, in one step or many."""
    x = jnp.array([[0.4, -2.0]])
    for schedule, n in ((EDM, 1), (FLOW, 3)):
        predictor = lambda x, t: Prediction(  # noqa: E731
            (x - schedule.sigma(t)[:, None] * 0.7) / schedule.alpha(t)[:, None], jnp.full_like(x, 0.7)
        )
        times = schedules.uniform_times(n, 0.8)
        x_0 = (x - schedule.sigma(times[0]) * 0.7) / schedule.alpha(times[0])
        for make in (steppers.ddim, steppers.euler, steppers.heun, steppers.dpm_solver_3):
            np.testing.assert_allclose(solve(make(schedule), predictor, x, times), x_0, rtol=1e-9)


def test_a_constant_data_prediction_is_reached_exactly():
    """If D does not depend on the state, x_s = (sigma_s / sigma_t) (x - alpha_t D) + alpha_s D, in data form."""
    x, target, times = jnp.array([[0.4, -2.0]]), 0.7, schedules.uniform_times(4, 0.9, 0.2)
    predictor = lambda x, t: Prediction(  # noqa: E731
        jnp.full_like(x, target), (x - COSINE.alpha(t)[:, None] * target) / COSINE.sigma(t)[:, None]
    )
    ratio = COSINE.sigma(times[-1]) / COSINE.sigma(times[0])
    expected = ratio * (x - COSINE.alpha(times[0]) * target) + COSINE.alpha(times[-1]) * target
    for make in (steppers.dpm_solver_pp_2m, UNIC["unipc1_bh1"], UNIC["unipc3_bh2"]):
        np.testing.assert_allclose(solve(make(COSINE), predictor, x, times), expected, rtol=1e-9)


@pytest.mark.parametrize("z", [-12.0, -1.0, -0.3, -1e-4, 1e-6, 0.999, 1.0, 9.0])
def test_phi_is_its_integral(z):
    """phi_k(z) = int_0^1 e^((1-u) z) u^(k-1) / (k-1)! du, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = 0.5 * (nodes + 1)
    integrals = [np.sum(0.5 * weights * np.exp((1 - u) * z) * u**k / math.factorial(k)) for k in range(4)]
    for n in (1, 2, 4):
        np.testing.assert_allclose(phis(n, jnp.asarray(z)), integrals[:n], rtol=1e-11)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_unknown_variant_or_order_of_unipc_is_rejected():
    with pytest.raises(ValueError, match=r"variant must be one of \('bh1', 'bh2'\), got 'bh3'"):
        steppers.unipc(COSINE, variant="bh3")
    for order in (0, 4, 2.5, 2.0):
        with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, got {order}"):
            steppers.unipc(COSINE, order)


def test_an_evaluation_outside_of_the_step_is_rejected():
    for r1 in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"r1 must be in \(0, 1\], got {r1}"):
            steppers.dpm_solver_2(COSINE, r1)
    with pytest.raises(ValueError, match=r"r2 must be in \(0, 1\), got 1\.0"):
        steppers.dpm_solver_3(COSINE, r2=1.0)


def test_a_grid_may_be_a_list_and_what_is_no_prediction_is_named(line):
    predictor, x = line.predictor(FLOW), jnp.zeros((2, 1))
    run = lambda predictor, times: integrate(jax.random.key(0), steppers.ddim(FLOW), predictor, x, times)  # noqa: E731
    np.testing.assert_array_equal(run(predictor, [1.0, 0.4, 0.0]), run(predictor, jnp.array([1.0, 0.4, 0.0])))
    for bad, name in ((lambda x, t: x, "Tracer"), (lambda x, t: (x, x), "tuple")):
        with pytest.raises(ValueError, match=rf"predictor must return a Prediction\(data, noise\), got \w*{name}"):
            run(bad, [1.0, 0.0])


@pytest.mark.parametrize("bad", [[0.0, 0.5, 1.0], [1.0, 0.5, 0.5], [1.0, float("nan"), 0.0]])
def test_a_grid_that_does_not_decrease_is_rejected(bad, line):
    with pytest.raises(ValueError, match="times must be strictly decreasing"):
        integrate(jax.random.key(0), steppers.ddim(FLOW), line.predictor(FLOW), jnp.zeros((2, 1)), jnp.array(bad))


def test_integer_states_and_scalar_grids_are_rejected(line):
    predictor, times = line.predictor(FLOW), jnp.array([1.0, 0.0])
    run = lambda x, times: integrate(jax.random.key(0), steppers.ddim(FLOW), predictor, x, times)  # noqa: E731
    with pytest.raises(ValueError, match="x must be of a floating type, got int"):
        run(jnp.zeros((2, 1), int), times)
    with pytest.raises(ValueError, match="times must be of a floating type, got int"):
        run(jnp.zeros((2, 1)), jnp.array([1, 0]))
    with pytest.raises(ValueError, match="times must be a vector of at least two"):
        run(jnp.zeros((2, 1)), jnp.array(1.0))

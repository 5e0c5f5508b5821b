"""Schedules obey their definitions; conversions round-trip; grids have the stated shapes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.exact import GaussianMixture

SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
    "rectified_flow": schedules.rectified_flow(),
    "trig_flow": schedules.trig_flow(sigma_data=0.5),
}
KINDS = ("data", "noise", "v", "score", "velocity")
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def inner_times(schedule):
    return jnp.linspace(0.02, 0.97, 9) * schedule.t_max


@each_schedule
def test_derivatives_and_sde_coefficients_follow_from_alpha_and_sigma(schedule, x64):
    t = inner_times(schedule)
    alpha_dot, sigma_dot = jax.vmap(jax.grad(schedule.alpha))(t), jax.vmap(jax.grad(schedule.sigma))(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    np.testing.assert_allclose(schedule.alpha_dot(t), alpha_dot, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma_dot(t), sigma_dot, rtol=1e-10)
    np.testing.assert_allclose(schedule.f(t), alpha_dot / alpha, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(schedule.g2(t), 2 * sigma * sigma_dot - 2 * alpha_dot / alpha * sigma**2, rtol=1e-9)
    log_snr_dot = jax.vmap(jax.grad(schedule.log_snr_half))(t)
    np.testing.assert_allclose(schedule.g2(t), -2 * sigma**2 * log_snr_dot, rtol=1e-9)


@each_schedule
def test_half_log_snr_is_log_of_the_ratio_and_is_inverted(schedule, x64):
    t = inner_times(schedule)
    log_snr = schedule.log_snr_half(t)
    np.testing.assert_allclose(log_snr, jnp.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.inverse_log_snr_half(log_snr), t, rtol=1e-9)
    assert np.all(np.diff(log_snr) < 0)


@each_schedule
def test_time_zero_is_data_and_the_far_end_is_noise(schedule):
    zero, end = jnp.asarray(0.0), jnp.asarray(schedule.t_max)
    assert schedule.alpha(zero) == 1
    assert schedule.sigma(zero) == 0
    assert schedule.log_snr_half(end) <= 0


@each_schedule
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(KINDS, 2)))
def test_conversions_round_trip_and_say_the_truth(schedule, source, target, x64):
    t = inner_times(schedule)
    data, noise = jax.random.normal(jax.random.key(0), (2, t.size, 3)) + jnp.array([1.0, 0.0])[:, None, None]
    x = schedules.add_noise(data, noise, t, schedule)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    truth = {
        "data": data,
        "noise": noise,
        "v": a * noise - s * data,
        "score": -noise / s,
        "velocity": schedule.alpha_dot(t)[:, None] * data + schedule.sigma_dot(t)[:, None] * noise,
    }
    out = schedules.convert(truth[source], x, t, schedule, source=source, target=target)
    back = schedules.convert(out, x, t, schedule, source=target, target=source)
    np.testing.assert_allclose(out, truth[target], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(back, truth[source], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cosine", "trig_flow", "rectified_flow"])
@pytest.mark.parametrize("source", ["v", "velocity"])
@pytest.mark.parametrize("target", ["data", "noise", "v", "velocity"])
def test_from_v_and_velocity_both_ends_are_defined(name, source, target):
    schedule = SCHEDULES[name]
    t = jnp.array([0.0, schedule.t_max])
    data, noise = jax.random.normal(jax.random.key(1), (2, 2, 5))
    x = schedules.add_noise(data, noise, t, schedule)
    a, s, da, ds = (f(t)[:, None] for f in schedule[:4])
    truth = {"data": data, "noise": noise, "v": a * noise - s * data, "velocity": da * data + ds * noise}
    out = schedules.convert(truth[source], x, t, schedule, source=source, target=target)
    np.testing.assert_allclose(out, truth[target], atol=2e-6)


@each_schedule
def test_the_clean_end_of_noise_and_score_predictions_is_the_data(schedule):
    x = jax.random.normal(jax.random.key(2), (4, 3))
    for source in ("noise", "score"):
        out = schedules.convert(jnp.ones_like(x), x, jnp.zeros(4), schedule, source=source, target="data")
        np.testing.assert_allclose(out, x, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_conversions_round_trip_at_the_ends_wherever_they_are_defined(name, x64):
    """And are not finite elsewhere: the docstring's list of what `x` and the source leave open, case by case."""
    schedule = SCHEDULES[name]
    data, noise = jax.random.normal(jax.random.key(0), (2, 1, 5))
    for t in (0.0, schedule.t_max):
        alpha, sigma = float(schedule.alpha(jnp.asarray(t))), float(schedule.sigma(jnp.asarray(t)))
        x = schedules.add_noise(data, noise, t, schedule)

        def defined(source, target, alpha=alpha, sigma=sigma, t=t):
            if source == target:
                return True
            if "velocity" in (source, target) and name == "vp_linear" and t == 0:
                return False
            open_source = (source == "data" and sigma == 0) or (source in ("noise", "score") and alpha == 0)
            return not (open_source or (target == "score" and sigma == 0))

        for source, target in itertools.product(KINDS, KINDS):
            if source == "score" and sigma == 0:
                continue  # there is no such prediction to begin with
            p, q = schedules.coefficients(source, jnp.asarray(t), schedule)
            given = p * data + q * noise if source != "score" else -noise / sigma
            if not np.isfinite(given).all():
                continue
            out = schedules.convert(given, x, t, schedule, source=source, target=target)
            assert np.isfinite(out).all() == defined(source, target), (name, t, source, target)
            if defined(source, target) and defined(target, source):
                back = schedules.convert(out, x, t, schedule, source=target, target=source)
                np.testing.assert_allclose(back, given, rtol=1e-6, atol=1e-6, err_msg=f"{name} {t} {source} {target}")


def test_both_terms_of_a_prediction_reassemble_the_state():
    schedule, t = schedules.cosine(), jnp.linspace(0.1, 0.9, 6)
    x, v = jax.random.normal(jax.random.key(3), (2, 6, 4))
    data, noise = schedules.as_prediction(v, x, t, schedule, source="v")
    np.testing.assert_allclose(schedules.add_noise(data, noise, t, schedule), x, rtol=1e-5, atol=1e-6)


def test_a_misspelt_parameterization_is_named():
    with pytest.raises(ValueError, match="epsilon"):
        schedules.convert(jnp.ones((1, 2)), jnp.ones((1, 2)), 0.5, schedules.cosine(), source="epsilon", target="data")
    with pytest.raises(ValueError, match="prediction must have the shape of x"):
        schedules.convert(jnp.ones((1, 3)), jnp.ones((1, 2)), 0.5, schedules.cosine(), source="v", target="data")


def test_schedule_hyperparameters_are_traced_and_vmapped():
    beta_max = jnp.array([5.0, 20.0])
    out = jax.jit(jax.vmap(lambda b: schedules.vp_linear(0.1, b).alpha(jnp.asarray(0.7))))(beta_max)
    expected = [math.exp(-0.05 * 0.7 - (b - 0.1) * 0.49 / 4) for b in (5.0, 20.0)]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vp_linear", "trig_flow"])
def test_gradients_in_a_schedules_own_parameters_agree_with_finite_differences_at_both_ends(name, t, x64):
    make, values = {
        "vp_linear": (schedules.vp_linear, jnp.array([0.1, 20.0])),
        "trig_flow": (schedules.trig_flow, jnp.array([0.5])),
    }[name]

    def scalars(values):
        schedule = make(*values)
        time = jnp.asarray(t) * schedule.t_max
        return jnp.stack([schedule.alpha(time), schedule.sigma(time)])

    ours, step = jax.jacobian(scalars)(values), 1e-6
    differences = [(scalars(values + e) - scalars(values - e)) / (2 * step) for e in step * jnp.eye(values.size)]
    np.testing.assert_allclose(ours, jnp.stack(differences, -1), rtol=1e-6, atol=1e-9)


def test_where_the_derivative_in_time_is_infinite_it_is_taken_as_zero():
    vp = schedules.vp_linear()
    assert jax.grad(vp.sigma)(0.0) == 0
    assert jnp.isinf(vp.sigma_dot(jnp.asarray(0.0)))
    assert jnp.isnan(vp.sigma(jnp.nan))


def test_the_exact_predictor_is_differentiable_in_the_schedules_parameters(x64):
    law = GaussianMixture(jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-1.0], [1.5]]), jnp.array([[[0.2]], [[0.35]]]))

    def predict(beta_min):
        prediction = law.predictor(schedules.vp_linear(beta_min))(jnp.array([[0.4]]), jnp.array([0.5]))
        return jnp.concatenate(prediction).ravel()

    difference = (predict(0.1 + 1e-6) - predict(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jacfwd(predict)(0.1), difference, rtol=1e-7)
    np.testing.assert_allclose(jax.jacrev(predict)(0.1), difference, rtol=1e-7)


def test_edm_grid_is_the_papers():
    grid = schedules.edm_times(18)
    assert grid.shape == (19,)
    np.testing.assert_allclose(grid[:3], [80.0, 57.586, 40.785], rtol=1e-4)
    np.testing.assert_allclose(grid[-2:], [0.002, 0.0], atol=1e-7)


def test_log_snr_grid_is_uniform_in_log_snr_and_hits_its_ends():
    schedule = schedules.vp_linear()
    grid = schedules.log_snr_times(12, schedule, 1.0, 1e-3)
    assert (grid[0], grid[-1]) == (1.0, jnp.float32(1e-3))
    steps = np.diff(schedule.log_snr_half(grid))
    np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)
    geometric = schedules.log_snr_times(3, schedules.edm(), 8.0, 1.0)
    np.testing.assert_allclose(geometric, [8, 4, 2, 1], rtol=1e-6)


def test_time_shift_multiplies_the_noise_to_signal_ratio():
    t, flow = schedules.uniform_times(8)[1:-1], schedules.rectified_flow()
    moved = schedules.shift_time(t, 3.0)
    np.testing.assert_allclose(moved / (1 - moved), 3 * t / (1 - t), rtol=1e-5)
    np.testing.assert_allclose(flow.log_snr_half(t) - flow.log_snr_half(moved), math.log(3), rtol=1e-5)


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_step_is_rejected(n):
    makers = (schedules.uniform_times, schedules.edm_times)
    for make in (*makers, lambda n: schedules.log_snr_times(n, schedules.cosine(), 0.9, 0.1)):
        with pytest.raises(ValueError, match=f"at least 1, got {n}"):
            make(n)


def test_times_of_another_shape_than_the_batch_are_named():
    x, schedule = jnp.zeros((3, 2)), schedules.cosine()
    for t in (jnp.ones((3, 1)) / 2, jnp.ones(2) / 2):
        with pytest.raises(ValueError, match=r"t must be a scalar or have shape \(3,\)"):
            schedules.add_noise(x, x, t, schedule)
        with pytest.raises(ValueError, match=r"t must be a scalar or have shape \(3,\)"):
            schedules.convert(x, x, t, schedule, source="data", target="noise")


def test_ends_without_a_finite_signal_to_noise_ratio_are_named():
    with pytest.raises(ValueError, match=r"t_max must be a time with a signal-to-noise ratio above 0 .*, got 1.0"):
        schedules.log_snr_times(4, schedules.cosine(), 1.0, 1e-3)
    with pytest.raises(ValueError, match=r"t_min must be a time .*, got 0.0"):
        schedules.log_snr_times(4, schedules.cosine(), 0.99, 0.0)
    with pytest.raises(ValueError, match=r"sigma_min must be above 0, got -1"):
        schedules.edm_times(4, sigma_min=-1)

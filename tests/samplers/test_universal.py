"""Universal guidance against closed-form descents and Gibbs chains; noisy classifiers against flows and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction, Stepper
from esscher.samplers import guidance, integrate, steppers
from esscher.samplers.diffusion import universal
from esscher.samplers.diffusion.energy import energy_guidance, sine_boost

pytestmark = pytest.mark.usefixtures("x64")

COSINE, VE = schedules.cosine(), schedules.ve(10.0)
X, T = np.array([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.1]]), np.array([0.2, 0.55, 0.9])
Y = np.array([[2.0, 0.1], [-1.0, 0.5], [0.3, -3.0]])
RATE = np.array([0.1, 0.3, 0.7])


def exact(schedule, mean=0.4, variance=0.8):
    """The exact predictor of data `N(mean, variance I)`."""

    def predict(x, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        data = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return Prediction(data, (x - alpha * data) / sigma)

    return predict


MODEL = exact(COSINE)


def square(data, t):
    return 0.5 * ((data - Y) ** 2).sum(-1)


def assert_same(ours, expected):
    np.testing.assert_allclose(ours.data, expected.data, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.noise, expected.noise, rtol=1e-9, atol=1e-12)


def assert_moments(x, mean, variance):
    """Within 5 standard errors, false once in a million, if the fourth moment is at most twice that of a normal."""
    n = len(x)
    assert abs(np.mean(x) - mean) < 5 * np.sqrt(variance / n)
    assert abs(np.var(x) - variance) < 5 * variance * np.sqrt(5 / n)


# --- within a step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4])
def test_descents_on_a_quadratic_go_a_known_share_of_the_way(n):
    plain, out = MODEL(X, T), universal.backward_guidance(MODEL, square, COSINE, n, RATE)(X, T)
    share = (1 - (1 - RATE) ** n)[:, None]
    np.testing.assert_allclose(out.data, plain.data + share * (Y - plain.data), rtol=1e-9)
    np.testing.assert_allclose(COSINE.alpha(T)[:, None] * out.data + COSINE.sigma(T)[:, None] * out.noise, X, rtol=1e-9)


def test_one_step_of_descent_is_guidance_in_the_data_term():
    energy = lambda data, t: jnp.sum(jnp.exp(data) * (1 + t[:, None]) - data[:, ::-1] ** 3, -1)  # noqa: E731
    ours = universal.backward_guidance(MODEL, energy, COSINE, 1, RATE)(X, T)
    assert_same(ours, energy_guidance(MODEL, energy, COSINE, RATE, through=False)(X, T))
    assert np.abs(ours.data - MODEL(X, T).data).min() > 0.01


def test_after_forward_guidance_the_descent_starts_at_the_guided_data_term():
    forward = energy_guidance(MODEL, square, COSINE, 0.5)
    start, share = forward(X, T), (1 - (1 - RATE) ** 3)[:, None]
    alpha, sigma = COSINE.alpha(T)[:, None], COSINE.sigma(T)[:, None]
    data = start.data + share * (Y - start.data)
    both = universal.backward_guidance(forward, square, COSINE, 3, RATE)(X, T)
    assert_same(both, Prediction(data, (X - alpha * data) / sigma))
    assert np.all(square(both.data, T) < square(start.data, T))
    assert np.all(square(start.data, T) < square(MODEL(X, T).data, T))


def test_long_descents_end_at_the_minimum_and_not_in_the_tilt():
    """Steps that reach the minimum leave nothing of the model's law; that of the tilt has the variance 4/9."""
    x = COSINE.sigma(0.9) * np.random.default_rng(0).normal(size=(200, 2))
    model = universal.backward_guidance(MODEL, lambda data, t: 0.5 * ((data - 1.5) ** 2).sum(-1), COSINE, 60, 0.5)
    out = integrate(jax.random.key(0), steppers.ddim(COSINE), model, jnp.asarray(x), jnp.array([0.9, 0.5, 0.0]))
    np.testing.assert_allclose(out, 1.5, rtol=1e-9)


# --- once more --------------------------------------------------------------------------------------------------------


def one_step(stepper, predictor, x, t, s, seed=1):
    times = jnp.full(len(x), t)
    run = jax.jit(
        lambda x: stepper.step(jax.random.key(seed), x, predictor(x, times), t, s, stepper.init(x), predictor)
    )
    return jax.tree.map(np.asarray, run(jnp.asarray(x)))


def test_once_is_the_stepper_and_further_ones_see_the_state_that_was_noised_again():
    stepper = steppers.ddim(COSINE)
    assert universal.self_recurrence(stepper, COSINE, 1) is stepper
    t, s = jnp.asarray(0.6), jnp.asarray(0.3)
    x = np.full((40_000, 1), 0.9)
    model = exact(COSINE)
    ends = model(jnp.array([[0.0], [1.0], [0.9]]), jnp.full(3, t))
    ends = COSINE.alpha(s) * ends.data + COSINE.sigma(s) * ends.noise  # a DDIM step is affine here
    slope, start = ends[1, 0] - ends[0, 0], ends[2, 0]
    shrink = COSINE.alpha(t) / COSINE.alpha(s)
    tau2 = COSINE.sigma(t) ** 2 - shrink**2 * COSINE.sigma(s) ** 2
    twice = one_step(universal.self_recurrence(stepper, COSINE, 2), model, x, t, s)[0]
    assert_moments(twice, ends[0, 0] + slope * shrink * start, slope**2 * tau2)


def test_exact_steps_keep_the_right_law_and_find_it_from_a_wrong_start(line):
    """A Gibbs chain on two modes: from one point in the wrong mode the mean of `x_s` comes to that of its law."""
    n, t, s = 20_000, jnp.asarray(0.7), jnp.asarray(0.4)
    at_t, at_s, ratio = line.at(COSINE, t), line.at(COSINE, s), COSINE.alpha(t) / COSINE.alpha(s)
    gain = ratio * at_s.variances / at_t.variances

    def draw(key, x, prediction, t, s, carry, predictor):
        keys = jax.random.split(key)
        k = jax.random.categorical(keys[0], line.log_responsibilities(COSINE, x, jnp.full(n, t)))[:, None]
        mean = at_s.means[k] + gain[k] * (x - at_t.means[k])
        spread = jnp.sqrt(at_s.variances - gain * ratio * at_s.variances)[k]
        return mean + spread * jax.random.normal(keys[1], x.shape), carry

    posterior = Stepper(lambda x: (), draw)
    often = universal.self_recurrence(posterior, COSINE, 12)
    law = at_s.moments()
    model = exact(COSINE)  # whose word does not count
    right = at_t.sample(jax.random.key(0), n)
    assert_moments(one_step(often, model, right, t, s)[0], *law)
    wrong = np.full((n, 1), -2.0)
    assert_moments(one_step(often, model, wrong, t, s)[0], *law)
    once = one_step(posterior, model, wrong, t, s)[0]
    assert np.mean(once) < law[0] - 0.5


def test_ancestral_steps_have_a_limit_of_their_own_but_for_a_point():
    """They draw as if `x_0` were known: right for a point, and for a Gaussian a variance in closed form, too small."""
    n, t, s, mean = 40_000, jnp.asarray(0.7), jnp.asarray(0.4), 0.4
    shrink = COSINE.alpha(t) / COSINE.alpha(s)
    tau2 = COSINE.sigma(t) ** 2 - shrink**2 * COSINE.sigma(s) ** 2
    for variance in (0.0, 0.8):
        at_t, at_s = (float(COSINE.alpha(u) ** 2 * variance + COSINE.sigma(u) ** 2) for u in (t, s))
        x = COSINE.alpha(t) * mean + np.sqrt(at_t) * np.random.default_rng(2).normal(size=(n, 1))
        ends = exact(COSINE, mean, variance)(jnp.array([[0.0], [1.0]]), jnp.full(2, t)).data[:, 0]
        slope = shrink * COSINE.sigma(s) ** 2 / COSINE.sigma(t) ** 2
        slope = slope + COSINE.alpha(s) * tau2 / COSINE.sigma(t) ** 2 * (ends[1] - ends[0])
        fresh = COSINE.sigma(s) ** 2 * tau2 / COSINE.sigma(t) ** 2
        expected = slope**2 * at_t + fresh
        for _ in range(2):
            expected = slope**2 * (shrink**2 * expected + tau2) + fresh
        stepper = universal.self_recurrence(steppers.ancestral(COSINE), COSINE, 3)
        out = one_step(stepper, exact(COSINE, mean, variance), x, t, s)[0]
        assert_moments(out, COSINE.alpha(s) * mean, expected)
        assert np.isclose(expected, at_s, rtol=1e-6) if variance == 0 else expected < 0.95 * at_s


def test_each_repetition_starts_from_the_history_of_the_step():
    stepper = universal.self_recurrence(steppers.dpm_solver_pp_2m(COSINE), COSINE, 3)
    assert one_step(stepper, MODEL, X, jnp.asarray(0.6), jnp.asarray(0.3))[1].count == 1
    times = jnp.array([0.9, 0.6, 0.3])
    out = integrate(jax.random.key(0), stepper, MODEL, jnp.asarray(X), times)
    assert np.all(np.isfinite(out))  # two looks at one time would be a difference over nothing


# --- before a step ----------------------------------------------------------------------------------------------------


def test_the_exact_classifier_of_noisy_states_leads_to_its_class(line, gaussian):
    """The flow of the component asked for, with an error that falls as the steps do."""
    energy = lambda x, t: -line.log_responsibilities(VE, x, t)[:, 0]  # noqa: E731
    x, errors = jnp.array([[-8.0], [2.0], [9.0]]), []
    expected = gaussian(-1.0, 0.2).flow(VE, x, VE.t_max, 0.0)
    guided = universal.noisy_energy_guidance(steppers.heun(VE), energy, lambda t, s: (t - s) * VE.g2(t) / 2)
    for n in (60, 120):
        times = schedules.edm_times(n, VE.t_max)
        errors.append(np.abs(integrate(jax.random.key(0), guided, line.predictor(VE), x, times) - expected).max())
    assert errors[1] < 0.02
    assert errors[0] > 1.7 * errors[1]
    free = integrate(jax.random.key(0), steppers.heun(VE), line.predictor(VE), x, times)
    assert np.abs(free - expected).max() > 1


@pytest.mark.parametrize(("make", "factor"), [(steppers.ddim, 0.5), (steppers.ancestral, 1.0)])
def test_a_short_step_is_that_of_classifier_guidance(make, factor):
    energy, t = lambda x, t: jnp.sum(jnp.cos(x + t[:, None]), -1), jnp.asarray(0.6)
    stepper = make(COSINE)
    ours = universal.noisy_energy_guidance(stepper, energy, lambda t, s: factor * (t - s) * COSINE.g2(t))
    guided = guidance.classifier(MODEL, lambda x, t: -energy(x, t), 1.0, COSINE)
    for gap in (1e-3, 1e-5):
        plain, moved, expected = (
            one_step(*pair, X, t, t - gap)[0] for pair in ((stepper, MODEL), (ours, MODEL), (stepper, guided))
        )
        np.testing.assert_allclose((moved - plain) / (expected - plain), 1, atol=20 * gap)


def test_the_step_starts_and_looks_where_the_state_was_moved_to():
    energy = lambda x, t: jnp.sum(x**2, -1)  # noqa: E731
    t, s = jnp.asarray(0.6), jnp.asarray(0.4)
    for stepper in (steppers.heun(COSINE), steppers.ancestral(COSINE)):
        ours = universal.noisy_energy_guidance(stepper, energy, RATE)
        np.testing.assert_allclose(
            one_step(ours, MODEL, X, t, s)[0], one_step(stepper, MODEL, X * (1 - 2 * RATE[:, None]), t, s)[0]
        )
        none = universal.noisy_energy_guidance(stepper, energy, 0.0)
        np.testing.assert_allclose(one_step(none, MODEL, X, t, s)[0], one_step(stepper, MODEL, X, t, s)[0])


# --- classifiers ------------------------------------------------------------------------------------------------------

MATRIX, TARGETS = np.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.8]]), np.array([0, 1, 1])


def tempered_slope(z, joint, marginal):
    odds = np.exp(marginal * z @ MATRIX.T)
    return joint * MATRIX[TARGETS] - marginal * odds / odds.sum(-1, keepdims=True) @ MATRIX


def rms(x):
    return np.sqrt(np.mean(x**2, -1, keepdims=True))


def test_the_published_sampler_is_a_plain_loop():
    """EluCD's Algorithm on EDM's, without churn, for a linear classifier: every line of it in NumPy."""
    model, times = exact(VE), schedules.edm_times(4, VE.t_max, 0.05)
    start = VE.t_max * np.random.default_rng(1).normal(size=(3, 2))
    strength, x, n = 0.2, start, len(times)
    look = lambda x, t: (x - np.asarray(model(x, jnp.full(3, t)).data)) / t  # noqa: E731
    for i, (t, s) in enumerate(zip(np.asarray(times)[:-1], np.asarray(times)[1:], strict=True)):
        g = tempered_slope(x / np.maximum(1, rms(x)), 1.3, 0.6)
        size = max(strength * (1 - i / n), 1e-5) + strength * 0.3 * np.sin(np.pi * i / (n - 1))
        moved = x + size * rms(x) * g / rms(g)
        slope = look(moved, t)
        x = moved + (s - t) * slope
        if s > 0:
            x = moved + (s - t) * 0.5 * (slope + look(x, s))
    weight = lambda t, s: sine_boost(jnp.sum(times > t), len(times), strength, 0.3)  # noqa: E731
    stepper = universal.tempered_classifier_step(
        steppers.edm_stochastic(VE, 4, 0.0), lambda z: z @ MATRIX.T, TARGETS, weight, joint=1.3, marginal=0.6
    )
    ours = integrate(jax.random.key(0), stepper, model, jnp.asarray(start), times)
    np.testing.assert_allclose(ours, x, rtol=1e-9)
    free = integrate(jax.random.key(0), steppers.heun(VE), model, jnp.asarray(start), times)
    margin = lambda x: (x @ MATRIX.T)[np.arange(3), TARGETS]  # noqa: E731
    assert np.all(margin(ours) > margin(free) + 0.1)


def test_the_state_is_shown_on_the_scale_of_data_and_churn_comes_on_top():
    """Small states are shown as they are; the churn is that of the stepper, from the state that was moved."""
    x, t, s = X * np.array([[0.1], [1.0], [50.0]]), jnp.asarray(3.0), jnp.asarray(2.0)
    churned, model = steppers.edm_stochastic(VE, 4), exact(VE)
    g = tempered_slope(x / np.maximum(1, rms(x)), 1.0, 0.9)
    ours = universal.tempered_classifier_step(churned, lambda z: z @ MATRIX.T, TARGETS, RATE, marginal=0.9)
    moved = x + RATE[:, None] * rms(x) * g / rms(g)
    np.testing.assert_allclose(one_step(ours, model, x, t, s)[0], one_step(churned, model, moved, t, s)[0], rtol=1e-9)
    flat = universal.tempered_classifier_step(churned, lambda z: 0 * z @ MATRIX.T, TARGETS, RATE)
    np.testing.assert_allclose(one_step(flat, model, x, t, s)[0], one_step(churned, model, x, t, s)[0], rtol=1e-12)


def test_bad_input_is_named():
    wide, step = (lambda data, t: data), steppers.ddim(COSINE)
    with pytest.raises(ValueError, match=r"energy must return shape \(3,\)"):
        universal.backward_guidance(MODEL, wide, COSINE, 1, 0.1)(X, T)
    with pytest.raises(ValueError, match="rate must be a scalar"):
        universal.backward_guidance(MODEL, square, COSINE, 1, jnp.ones(2))(X, T)
    with pytest.raises(ValueError, match="k must be at least 1"):
        universal.self_recurrence(step, COSINE, 0)
    with pytest.raises(ValueError, match=r"energy must return shape \(3,\)"):
        one_step(universal.noisy_energy_guidance(step, wide), MODEL, X, 0.5, 0.4)
    with pytest.raises(ValueError, match="w must be a scalar"):
        one_step(universal.noisy_energy_guidance(step, square, jnp.ones(2)), MODEL, X, 0.5, 0.4)
    classifier = universal.tempered_classifier_step(step, lambda z: z @ MATRIX.T, TARGETS[:2], 0.1)
    with pytest.raises(ValueError, match="targets must have the leading axes"):
        one_step(classifier, MODEL, X, 0.5, 0.4)

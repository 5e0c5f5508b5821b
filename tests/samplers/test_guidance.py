"""Guidance against exact conditional laws, against what plain guidance really samples, and against its identities."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.core.exact import gaussians
from esscher.samplers import guidance, integrate, steppers

pytestmark = pytest.mark.usefixtures("x64")

EDM, COSINE, FLOW = schedules.edm(), schedules.cosine(), schedules.rectified_flow()
X, T = np.array([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]]), np.array([0.2, 0.55, 0.9])


def affine(slope, offset, schedule):
    """A plain predictor whose data term is affine in the state, cheap to compile."""

    def predict(x, t):
        data = slope * x + offset * t[:, None]
        return Prediction(data, (x - schedule.alpha(t)[:, None] * data) / schedule.sigma(t)[:, None])

    return predict


COND, UNCOND, THIRD = affine(0.8, 1.0, COSINE), affine(0.3, -0.5, COSINE), affine(-0.2, 0.1, COSINE)


def assert_same(ours, expected, rtol=1e-12):
    np.testing.assert_allclose(ours.data, expected.data, rtol=rtol, atol=1e-13)
    np.testing.assert_allclose(ours.noise, expected.noise, rtol=rtol, atol=1e-13)


def assert_consistent(prediction, schedule=COSINE):
    alpha, sigma = schedule.alpha(T)[:, None], schedule.sigma(T)[:, None]
    np.testing.assert_allclose(alpha * prediction.data + sigma * prediction.noise, X, rtol=1e-6)


# --- linear mixes -----------------------------------------------------------------------------------------------------


def test_cfg_at_weights_zero_one_and_beyond():
    assert_same(guidance.cfg(COND, UNCOND, 0.0)(X, T), UNCOND(X, T))
    assert_same(guidance.cfg(COND, UNCOND, 1.0)(X, T), COND(X, T))
    guided, c, u = guidance.cfg(COND, UNCOND, 2.5)(X, T), COND(X, T), UNCOND(X, T)
    assert_same(guided, Prediction(*(2.5 * c_i - 1.5 * u_i for c_i, u_i in zip(c, u, strict=True))))
    assert_consistent(guided)


def test_weights_may_differ_by_example_and_by_time():
    w = jnp.array([0.0, 1.0, 3.0])
    by_example = guidance.cfg(COND, UNCOND, w)(X, T)
    for i in range(3):
        alone = guidance.cfg(COND, UNCOND, w[i])(X, T)
        np.testing.assert_array_equal(by_example.data[i], alone.data[i])
    assert_same(guidance.cfg(COND, UNCOND, lambda t: 3 * t)(X, T), guidance.cfg(COND, UNCOND, 3 * T)(X, T))


def test_interval_guides_inside_and_is_conditional_outside():
    predict = guidance.cfg(COND, UNCOND, guidance.interval(4.0, 0.4, 0.6))
    expected = guidance.cfg(COND, UNCOND, jnp.array([1.0, 4.0, 1.0]))
    assert_same(predict(X, T), expected(X, T))
    ends = guidance.interval(jnp.array([2.0, 3.0, 4.0]), T[0], T[2])(T)
    np.testing.assert_array_equal(ends, [2.0, 3.0, 4.0])  # both ends belong to it


def test_a_mix_is_affine_and_leaves_the_rest_to_its_base():
    p_0, p_1, p_2 = UNCOND(X, T), COND(X, T), THIRD(X, T)
    mixed = guidance.mix((UNCOND, COND, THIRD), (2.0, -0.7))(X, T)
    assert_same(mixed, jax.tree.map(lambda a, b, c: -0.3 * a + 2.0 * b - 0.7 * c, p_0, p_1, p_2))
    assert_consistent(mixed)
    nested = guidance.cfg(COND, guidance.mix((UNCOND, THIRD), (0.5,)), 3.0)(X, T)
    assert_same(nested, guidance.mix((UNCOND, COND, THIRD), (3.0, -1.0))(X, T))
    assert_same(guidance.mix((COND,), ())(X, T), p_1)


@pytest.mark.parametrize("bad", [jnp.ones(2), jnp.ones((3, 1)), lambda t: jnp.ones((3, 2))])
def test_a_weight_of_the_wrong_shape_is_named(bad):
    log_prob = lambda x, t: x.sum(-1)  # noqa: E731
    for predict in (
        guidance.cfg(COND, UNCOND, bad),
        guidance.cfg_plus_plus(COND, UNCOND, bad),
        guidance.mix((UNCOND, THIRD, COND), (1.0, bad)),
        guidance.classifier(UNCOND, log_prob, bad, COSINE),
    ):
        with pytest.raises(ValueError, match=r"w must be a scalar or have shape \(3,\), got"):
            jax.eval_shape(predict, X, T)
    with pytest.raises(ValueError, match="phi must be a scalar"):
        jax.eval_shape(guidance.rescale(COND, UNCOND, bad, COSINE), X, T)


def test_an_interval_that_cannot_be_is_named():
    predict = guidance.cfg(COND, UNCOND, guidance.interval(jnp.array([2.0, 3.0]), 0.2, 0.6))
    with pytest.raises(ValueError, match=r"w must be a scalar or have shape \(3,\), got \(2,\)"):
        predict(X, T)
    with pytest.raises(ValueError, match=r"high must be at least low=0.6, got 0.4"):
        guidance.interval(4.0, low=0.6, high=0.4)
    growing = guidance.interval(lambda t: 10 * t, 0.2, 0.6)  # a weight inside may depend on time, as elsewhere
    np.testing.assert_allclose(growing(T), [2.0, 5.5, 1.0])


def test_bad_mixes_and_classifiers_are_rejected():
    with pytest.raises(ValueError, match="one w for each predictor but the first, got 2 for 2"):
        guidance.mix((COND, UNCOND), (1.0, 2.0))
    with pytest.raises(ValueError, match=r"log_prob must return shape \(3,\), one value per example, got \(3, 2\)"):
        guidance.classifier(UNCOND, lambda x, t: x, 1.0, COSINE)(X, T)


def test_autoguidance_of_gaussians_is_the_gaussian_of_extrapolated_precision(gaussian):
    """p_strong^w p_weak^(1-w) of equal means, at one noise level: sharper than the strong model where w > 1."""
    strong, weak, w = gaussian(0.4, 0.5), gaussian(0.4, 1.5), 1.8
    x, t = X[:, :1], T
    precision = w / (0.5 + t**2) - (w - 1) / (1.5 + t**2)
    guided = guidance.autoguidance(strong.predictor(EDM), weak.predictor(EDM), w)(x, t)
    np.testing.assert_allclose(guided.noise, (t * precision)[:, None] * (x - 0.4), rtol=1e-12)
    np.testing.assert_allclose(guided.data, x - (t**2 * precision)[:, None] * (x - 0.4), rtol=1e-12)


# --- what guidance samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("var_cond", [1.0, 0.3], ids=["equal_variances", "unequal_variances"])
def test_guided_gaussians_end_in_the_law_that_cfg_really_samples(gaussian, var_cond):
    """The path is affine in its start, so mean and variance are read off two starts: the whole pipeline, exactly."""
    w, sigma_max, errors = 2.5, 80.0, []
    guided = guidance.cfg(gaussian(1.0, var_cond).predictor(EDM), gaussian(0.0, 1.0).predictor(EDM), w)
    mean, variance = gaussians.cfg_law(0.0, 1.0, 1.0, var_cond, w, sigma_max, n=40_000)
    if var_cond == 1.0:  # N(w, 1) as sigma_max goes to infinity
        expected = w * (1 - 1 / np.sqrt(1 + sigma_max**2)), sigma_max**2 / (1 + sigma_max**2)
        np.testing.assert_allclose((mean, variance), expected, rtol=1e-6)
    for n in (80, 160):
        ends = integrate(
            jax.random.key(0), steppers.heun(EDM), guided, jnp.array([[0.0], [1.0]]), schedules.edm_times(n)
        )
        law = ends[0, 0], (sigma_max * (ends[1, 0] - ends[0, 0])) ** 2
        errors.append(np.abs(np.array(law) - np.array((mean, variance))))
    assert np.all(errors[1] < 1.5e-3)
    assert np.all(errors[0] > 3 * errors[1])  # second order, towards this law and no other


def test_classifier_guidance_with_the_exact_posterior_is_the_conditional_model(line):
    """Of a class that is itself a mixture, the first two components of three."""
    everything = type(line)(jnp.array([0.2, 0.5, 0.3]), jnp.array([-1.0, 0.2, 1.1]), jnp.array([0.2, 0.6, 0.1]))
    first_two = type(line)(*(field[:2] for field in everything))
    uncond, cond, x = everything.predictor(FLOW), first_two.predictor(FLOW), X[:, :1]

    def log_prob(x, t):
        return jax.nn.logsumexp(everything.log_responsibilities(FLOW, x, t)[:, :2], axis=-1)

    guided = jax.jit(lambda w, t: guidance.classifier(uncond, log_prob, w, FLOW)(x, t))
    assert_same(guided(1.0, T), cond(x, T), rtol=1e-9)
    assert_same(guided(2.0, T), guidance.cfg(cond, uncond, 2.0)(x, T), rtol=1e-9)  # the score is linear in w
    assert_same(guided(2.0, np.ones(3)), uncond(x, np.ones(3)))  # at pure noise nothing is known of the class


# --- CFG++ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM, COSINE], ids=["edm", "cosine"])
def test_cfg_plus_plus_is_cfg_at_the_weight_that_grows_as_the_step_shrinks(line, schedule):
    """One DDIM step with CFG++ at l is one with CFG at w = l / (1 - e^-h); at sigma = 0, at w = l."""
    cond, uncond = line._replace(weights=jnp.array([0.01, 0.99])).predictor(schedule), line.predictor(schedule)
    x, scale = jnp.array([[0.3], [-1.2], [2.0]]), 5.0 if schedule is EDM else 1.0
    step = steppers.ddim(schedule).step
    for t, s in ((0.9, 0.6), (0.5, 0.45), (0.3, 0.0)):
        t, s = jnp.asarray(t * scale), jnp.asarray(s * scale)
        h = schedule.log_snr_half(s) - schedule.log_snr_half(t)
        w = 0.6 / -jnp.expm1(-h)
        ends = [
            step(jax.random.key(0), x, predict(x, jnp.full(3, t)), t, s, (), None)[0]
            for predict in (guidance.cfg_plus_plus(cond, uncond, 0.6), guidance.cfg(cond, uncond, w))
        ]
        np.testing.assert_allclose(*ends, rtol=1e-12)
    assert w == 0.6


def test_on_edm_two_term_two_m_is_the_papers_cfg_plus_plus(line):
    """x_s = D_l - e^-h D_u + (1 - e^-h) (D_l - D_u_prev) / 2r + e^-h x, where rho = sigma."""
    cond, uncond = line._replace(weights=jnp.array([0.01, 0.99])).predictor(EDM), line.predictor(EDM)
    predict, stepper, x = guidance.cfg_plus_plus(cond, uncond, 0.6), steppers.dpm_solver_pp_2m(EDM), jnp.array([[3.0]])
    times = [jnp.asarray(t) for t in (4.0, 2.5, 1.0)]
    x_1, carry = stepper.step(None, x, predict(x, times[0][None]), times[0], times[1], stepper.init(x), None)
    x_2, _ = stepper.step(None, x_1, predict(x_1, times[1][None]), times[1], times[2], carry, None)
    free_previous, free, guided = uncond(x, times[0][None]).data, uncond(x_1, times[1][None]).data, None
    guided = free + 0.6 * (cond(x_1, times[1][None]).data - free)
    decay, r = times[2] / times[1], jnp.log(times[0] / times[1]) / jnp.log(times[1] / times[2])
    expected = guided - decay * free + (1 - decay) * (guided - free_previous) / (2 * r) + decay * x_1
    np.testing.assert_allclose(x_2, expected, rtol=1e-12)


def two_terms(line, schedule):
    """CFG++ of two classes as `x, t -> (guided data, unconditional noise, unconditional data)`, and its predictor."""
    cond, uncond = line._replace(weights=jnp.array([0.01, 0.99])).predictor(schedule), line.predictor(schedule)
    predict = guidance.cfg_plus_plus(cond, uncond, 0.6)

    def terms(x, t):
        free = uncond(x, jnp.full(len(x), t))
        return free.data + 0.6 * (cond(x, jnp.full(len(x), t)).data - free.data), free.noise, free.data

    return terms, predict


def at(times, schedule=COSINE):
    """`alpha`, `sigma` and `lam` at each time."""
    return (np.asarray(f(jnp.asarray(times))) for f in (schedule.alpha, schedule.sigma, schedule.log_snr_half))


def test_cfg_plus_plus_in_one_step_of_dpm_solver(line):
    """Every state on the way is `alpha D_guided + sigma eps_uncond`, and only the noise term is expanded."""
    terms, predict = two_terms(line, COSINE)
    x, t, s = jnp.array([[0.3], [-1.2], [2.0]]), 0.7, 0.4
    (data, noise, _), (_, _, lam) = terms(x, t), at((t, s))
    h = lam[1] - lam[0]
    phi = lambda z: np.expm1(z) / z - 1  # noqa: E731
    inside = [COSINE.inverse_log_snr_half(lam[0] + r * h) for r in (0.4, 2 / 3)]
    alpha, sigma, _ = at((*inside, s))
    states = [a * data + b * noise for a, b in zip(alpha, sigma, strict=True)]
    change_1 = terms(states[0], inside[0])[1] - noise
    corrected = states[1] - sigma[1] * (2 / 3 / 0.4) * phi(2 / 3 * h) * change_1
    change_2 = terms(corrected, inside[1])[1] - noise
    for stepper, expected in (
        (steppers.dpm_solver_2(COSINE, r1=0.4), states[2] - sigma[2] * np.expm1(h) * change_1 / (2 * 0.4)),
        (steppers.dpm_solver_3(COSINE, r1=0.4), states[2] - sigma[2] / (2 / 3) * phi(h) * change_2),
    ):
        prediction = predict(x, jnp.full(3, t))
        end, _ = stepper.step(None, x, prediction, jnp.asarray(t), jnp.asarray(s), (), predict)
        np.testing.assert_allclose(end, expected, rtol=1e-10)


def test_cfg_plus_plus_in_the_corrector_of_unipc(line):
    """It corrects by the change of the unconditional data term, the one that goes with the state."""
    terms, predict = two_terms(line, COSINE)
    x, times, stepper = jnp.array([[0.3], [-1.2], [2.0]]), (0.8, 0.6, 0.45), steppers.unipc(COSINE, 1)
    alpha, sigma, lam = at(times)
    data, noise, free = terms(x, times[0])
    predicted = alpha[1] * data + sigma[1] * noise
    data_1, noise_1, free_1 = terms(predicted, times[1])
    moved = -0.5 * alpha[1] * np.expm1(lam[0] - lam[1]) * (free_1 - free)
    expected = alpha[2] * data_1 + sigma[2] * (noise_1 + moved / sigma[1])
    carry, end = stepper.init(x), x
    for t, s in itertools.pairwise(times):
        end, carry = stepper.step(None, end, predict(end, jnp.full(3, t)), jnp.asarray(t), jnp.asarray(s), carry, None)
    np.testing.assert_allclose(end, expected, rtol=1e-10)


DETERMINISTIC = {
    "ddim": steppers.ddim,
    "euler": steppers.euler,
    "heun": steppers.heun,
    "dpm_solver_2": steppers.dpm_solver_2,
    "dpm_solver_3": steppers.dpm_solver_3,
    "dpm_solver_pp_2m": steppers.dpm_solver_pp_2m,
    "unipc": steppers.unipc,
}


@pytest.mark.parametrize("make", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_cfg_plus_plus_reaches_every_stepper(make):
    """At weight 0 it is the unconditional path; with weight it moves every stepper as it moves DDIM, on EDM too."""
    # On EDM the velocity is the noise term alone, so a solver that advances `x` by its velocity would not feel it.
    cond, uncond = affine(0.0, 1.0, EDM), affine(0.0, 0.0, EDM)
    x, times = jnp.array([[0.5, -1.0]]), jnp.array([2.0, 1.0, 0.0])
    run = jax.jit(lambda w: integrate(jax.random.key(0), make(EDM), guidance.cfg_plus_plus(cond, uncond, w), x, times))
    np.testing.assert_allclose(run(0.0), integrate(jax.random.key(0), make(EDM), uncond, x, times), atol=1e-12)
    assert np.all(run(0.5) > 0.3)  # the conditional data term is t > 0, the unconditional one 0


# --- rescaling --------------------------------------------------------------------------------------------------------


def test_rescaling_gives_the_guided_data_the_contrast_of_the_conditional():
    guided = guidance.cfg(COND, UNCOND, 5.0)
    std = lambda predict: np.std(predict(X, T).data, axis=1)  # noqa: E731
    full, none = guidance.rescale(guided, COND, 1.0, COSINE), guidance.rescale(guided, COND, 0.0, COSINE)
    np.testing.assert_allclose(std(full), std(COND), rtol=1e-6)
    assert np.all(std(guided) > 1.5 * std(COND))
    assert_same(none(X, T), guided(X, T), rtol=1e-6)
    half = guidance.rescale(guided, COND, 0.5, COSINE)
    np.testing.assert_allclose(std(half), 0.5 * (std(guided) + std(COND)), rtol=1e-6)
    assert_consistent(half(X, T))


def test_cfg_plus_plus_takes_rescaled_and_classified_data_and_keeps_its_noise():
    """Written around them, as their documentation has it; inside, they would move the noise term by what they add."""
    log_prob = lambda x, t: -jnp.sum(x**2, -1)  # noqa: E731
    rescale = functools.partial(guidance.rescale, cond=COND, phi=1.0, schedule=COSINE)
    classify = functools.partial(guidance.classifier, log_prob=log_prob, w=0.5, schedule=COSINE)
    plus = guidance.cfg_plus_plus(COND, UNCOND, 5.0)
    for change, plain in ((rescale, guidance.cfg(COND, UNCOND, 5.0)), (classify, UNCOND)):
        inner = change(plain)(X, T)
        assert_consistent(inner)
        assert_same(guidance.cfg_plus_plus(change(plain), UNCOND, 1.0)(X, T), inner._replace(noise=UNCOND(X, T).noise))
        assert np.all(np.abs(change(plus)(X, T).noise - UNCOND(X, T).noise) > 1e-3)


def test_rescaling_leaves_data_without_contrast_alone():
    """Events of one number have standard deviation 0; values and gradients stay finite."""
    x, t = X[:, :1], T
    predict = guidance.rescale(COND, COND, 0.7, COSINE)
    assert_same(predict(x, t), COND(x, t), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: predict(x, t).data.sum())(x)).all()

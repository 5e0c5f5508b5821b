"""Score matching against quadrature: identities between the losses, exact minimisers, and weights in five spellings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws.oracles import assert_minimises, bimodal, gauss_hermite, nodes, pairs

from esscher.core import schedules
from esscher.objectives import score

pytestmark = pytest.mark.usefixtures("x64")

KINDS = ("data", "noise", "v", "score", "velocity")
SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "rectified_flow": schedules.rectified_flow(),
    "trig_flow": schedules.trig_flow(sigma_data=0.5),
}
WEIGHTS = {
    "edm": lambda *args, **kwargs: score.edm_weight(*args, sigma_data=0.7, **kwargs),
    "min_snr": lambda *args, **kwargs: score.min_snr_weight(*args, gamma=3.0, **kwargs),
    "p2": lambda *args, **kwargs: score.p2_weight(*args, k=0.8, gamma=1.3, **kwargs),
    "likelihood": score.likelihood_weight,
    "sigmoid": lambda *args, **kwargs: score.sigmoid_weight(*args, bias=-0.6, **kwargs),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


def inner_times(schedule, n=9):
    return jnp.linspace(0.02, 0.97, n) * schedule.t_max


def wiggly(x):
    """A score model that is nobody's score, neither odd nor even."""
    return jnp.sin(1.7 * x + 0.4) - 0.3 * x**2 + jnp.roll(x, 1, -1)


# --- the losses and the score they estimate ---------------------------------------------------------------------------


def test_implicit_loss_is_the_explicit_one_up_to_a_constant_of_the_data():
    law = bimodal()
    x, weights = nodes(lambda x: jnp.exp(law.log_prob(x)), -6.0, 7.0, 4001)
    truth = law.score(x)
    for psi in (wiggly, lambda x: -2 * x, lambda x: jnp.cos(x) * x):
        explicit = weights @ (0.5 * jnp.sum((psi(x) - truth) ** 2, -1))
        implicit = weights @ score.implicit_score_matching_loss(psi, x)
        np.testing.assert_allclose(explicit, implicit + weights @ (0.5 * jnp.sum(truth**2, -1)), rtol=1e-10)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_denoising_score_matching_is_explicit_score_matching_up_to_the_known_constant(t):
    """At (a, s): E|psi + eps/s|^2/2 = E|psi - score|^2/2 + D/(2 s^2) - E|score|^2/2, here with D = 1."""
    law, schedule = bimodal(), schedules.cosine()
    data, noise, weights = pairs(law)
    psi = wiggly(schedules.add_noise(data, noise, t, schedule))
    dsm = weights @ score.denoising_loss(psi, data, noise, t, schedule, parameterization="score", weight=0.5)
    at_t = law.at(schedule, t)
    x, p_t = nodes(lambda x: jnp.exp(at_t.log_prob(x)), -9.0, 9.0, 4001)
    explicit, information = p_t @ jnp.sum((wiggly(x) - at_t.score(x)) ** 2, -1), p_t @ jnp.sum(at_t.score(x) ** 2, -1)
    expected = 0.5 * (explicit + 1 / schedule.sigma(jnp.asarray(t)) ** 2 - information)
    np.testing.assert_allclose(dsm, expected, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cosine", "rectified_flow"])
def test_the_exact_prediction_minimises_the_denoising_loss(kind, name):
    law, schedule, t = bimodal(), SCHEDULES[name], 0.45
    data, noise, weights = pairs(law)
    x = schedules.add_noise(data, noise, t, schedule)
    exact = jax.jit(lambda x: law.at(schedule, t).score(x))(x)
    exact = schedules.convert(exact, x, t, schedule, source="score", target=kind)
    assert_minimises(
        lambda y: score.denoising_loss(y, data, noise, t, schedule, parameterization=kind, weight=0.7),
        exact, x, weights, curvature=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_loss_averages_to_the_implicit_one(variance_reduced):
    """Mean over keys within 4.5 standard errors of it for each of 3 examples: a false alarm in 50,000 runs."""
    x = jax.random.normal(jax.random.key(0), (3, 3))
    keys = jax.random.split(jax.random.key(1), 5000)
    sliced = jax.jit(
        jax.vmap(
            lambda key: score.sliced_score_matching_loss(
                key, wiggly, x, n_projections=2, variance_reduced=variance_reduced
            )
        )
    )(keys)
    z = (sliced.mean(0) - score.implicit_score_matching_loss(wiggly, x)) / (sliced.std(0) / np.sqrt(keys.size))
    assert np.all(np.abs(z) < 4.5)
    assert np.all(sliced.std(0) > 0.1)  # there is something to average


def test_variance_reduction_makes_the_sliced_loss_exact_on_separable_models():
    x = jax.random.normal(jax.random.key(2), (4, 3))
    exact = score.implicit_score_matching_loss(jnp.sin, x)
    reduced, plain = (
        score.sliced_score_matching_loss(jax.random.key(3), jnp.sin, x, variance_reduced=flag) for flag in (True, False)
    )
    np.testing.assert_allclose(reduced, exact, rtol=1e-12)
    assert np.all(np.abs(plain - exact) > 1e-3)


@pytest.mark.parametrize("shape", [3.0, 0.7], ids=["vanishing at 0", "infinite at 0"])
def test_nonnegative_loss_is_the_weighted_explicit_one_up_to_a_constant(shape):
    """On a gamma density, on a grid uniform in log x: E x^2 (psi - score)^2 / 2 = E loss + E x^2 score^2 / 2."""
    u = jnp.linspace(-50.0, 5.0, 20_001)
    x = jnp.exp(u)[:, None]
    weights = jnp.exp(shape * u - x[:, 0] - jax.scipy.special.gammaln(shape)) * (u[1] - u[0])
    truth = (shape - 1) / x - 1
    for psi in (lambda x: jnp.sin(x + 0.3), lambda x: -0.4 * x + 1 / (1 + x)):
        explicit = weights @ (0.5 * x**2 * (psi(x) - truth) ** 2)[:, 0]
        implicit = weights @ score.nonnegative_score_matching_loss(psi, x)
        np.testing.assert_allclose(explicit, implicit + weights @ (0.5 * x**2 * truth**2)[:, 0], rtol=1e-8)


# --- multiplicative noise ---------------------------------------------------------------------------------------------


def test_geometric_brownian_motion_grows_at_its_rate_and_spreads_in_the_logarithm():
    z, weights = gauss_hermite(40, 1)
    data, t, mu, sigma = jnp.full_like(z, 1.7), 0.6, 0.4, 0.8
    x = score.multiplicative_noise(data, z, t, mu, sigma)
    np.testing.assert_allclose(weights @ x[:, 0], 1.7 * jnp.exp(mu * t), rtol=1e-10)
    log_mean = weights @ jnp.log(x[:, 0])
    np.testing.assert_allclose(weights @ (jnp.log(x[:, 0]) - log_mean) ** 2, sigma**2 * t, rtol=1e-10)


def test_the_exact_log_normal_score_minimises_the_multiplicative_loss():
    mean, variance, t, mu, sigma = 0.3, 0.25, 0.7, 0.5, 0.9
    draws, weights = gauss_hermite(30, 2)
    data, noise = jnp.exp(mean + jnp.sqrt(variance) * draws[:, :1]), draws[:, 1:]
    x = score.multiplicative_noise(data, noise, t, mu, sigma)
    drifted = mean + (mu - sigma**2 / 2) * t
    exact = -1 - (jnp.log(x) - drifted) / (variance + sigma**2 * t)  # x times the score of a log-normal law
    loss = lambda y: score.multiplicative_denoising_loss(y, noise, t, sigma)  # noqa: E731
    assert_minimises(loss, exact, jnp.log(x), weights, curvature=sigma**2 * t)


def test_multiplicative_loss_is_a_variance_exploding_one_of_the_logarithm():
    prediction, data, noise = jax.random.normal(jax.random.key(4), (3, 5, 2))
    t, sigma = jnp.linspace(0.1, 0.9, 5), 0.8
    spread = sigma * jnp.sqrt(t)
    in_log = score.denoising_loss(
        prediction + 1, data, noise, spread, schedules.ve(), parameterization="score", weight=spread**2
    )
    ours = score.multiplicative_denoising_loss(prediction, noise, t, sigma)
    np.testing.assert_allclose(ours, in_log, rtol=1e-10)
    at_zero = score.multiplicative_denoising_loss(prediction, noise, 0.0, sigma)
    np.testing.assert_allclose(at_zero, jnp.mean(noise**2, -1), rtol=1e-12)


# --- weights ----------------------------------------------------------------------------------------------------------


@each_schedule
@each_weight
def test_one_prediction_has_one_weighted_loss_in_all_five_parameterizations(schedule, weight):
    t = inner_times(schedule)
    data, noise, v = jax.random.normal(jax.random.key(5), (3, t.size, 4))
    x = schedules.add_noise(data, noise, t, schedule)
    losses = [
        score.denoising_loss(
            schedules.convert(v, x, t, schedule, source="v", target=kind), data, noise, t, schedule,
            parameterization=kind, weight=weight(t, schedule, parameterization=kind),
        )
        for kind in KINDS
    ]  # fmt: skip
    assert np.ptp(losses[0]) > 0
    for kind, loss in zip(KINDS[1:], losses[1:], strict=True):
        np.testing.assert_allclose(loss, losses[0], rtol=1e-8, err_msg=kind)


@each_schedule
def test_weights_are_their_papers_formulas(schedule):
    t = inner_times(schedule)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    rho = schedule.sigma(t) / schedule.alpha(t)
    log_snr_dot = 2 * jax.vmap(jax.grad(schedule.log_snr_half))(t)
    snr_dot = jax.vmap(jax.grad(lambda t: jnp.exp(2 * schedule.log_snr_half(t))))(t)
    papers = [
        (score.min_snr_weight, {"gamma": 5.0}, "noise", jnp.minimum(snr, 5) / snr),
        (score.min_snr_weight, {"gamma": 5.0}, "data", jnp.minimum(snr, 5)),
        (score.p2_weight, {"k": 1.0, "gamma": 0.5}, "noise", (1 + snr) ** -0.5),
        (score.edm_weight, {"sigma_data": 0.5}, "data", (rho**2 + 0.25) / (0.5 * rho) ** 2),
        (score.likelihood_weight, {}, "noise", -0.5 * log_snr_dot),
        (score.likelihood_weight, {}, "data", -0.5 * snr_dot),
        (score.likelihood_weight, {}, "score", 0.5 * schedule.g2(t)),
        (score.sigmoid_weight, {"bias": -1.0}, "noise", -log_snr_dot * jax.nn.sigmoid(-1.0 - jnp.log(snr))),
        (score.sigmoid_weight, {"bias": -1.0}, "data",
         -log_snr_dot * jnp.exp(-1.0) * jax.nn.sigmoid(jnp.log(snr) + 1.0)),
    ]  # fmt: skip
    for function, hyper, kind, expected in papers:
        out = function(t, schedule, parameterization=kind, **hyper)
        np.testing.assert_allclose(out, expected, rtol=1e-8, err_msg=f"{function.__name__} {kind}")


@pytest.mark.parametrize("name", ["cosine", "vp_linear"])
def test_min_snr_on_v_has_its_variance_preserving_form(name):
    t, schedule = inner_times(SCHEDULES[name]), SCHEDULES[name]
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    out = score.min_snr_weight(t, schedule, parameterization="v", gamma=5.0)
    np.testing.assert_allclose(out, jnp.minimum(snr, 5) / (snr + 1), rtol=1e-8)


def test_p2_weight_divides_the_noise_loss_by_a_power_of_k_plus_snr():
    t, schedule = jnp.array([0.1, 0.5, 0.9]), schedules.cosine()
    snr = 1 / jnp.tan(jnp.pi * t / 2) ** 2
    out = score.p2_weight(t, schedule, parameterization="noise", k=0.7, gamma=2.0)
    np.testing.assert_allclose(out, 1 / (0.7 + snr) ** 2, rtol=1e-10)


# (weight, parameterization, at t = 0, at t = 1) on straight paths: limits of the formulas, inf where there is none.
LIMITS = [
    ("min_snr", "data", 3.0, 0.0),
    ("min_snr", "noise", 0.0, 1.0),
    ("min_snr", "v", 0.0, 0.0),
    ("min_snr", "score", 0.0, 1.0),
    ("min_snr", "velocity", 0.0, 0.0),
    ("edm", "data", np.inf, 1 / 0.49),
    ("edm", "noise", 1.0, np.inf),
    ("edm", "velocity", 1.0, 1 / 0.49),
    ("p2", "noise", 0.0, 0.8**-1.3),
    ("p2", "velocity", 0.0, 0.0),
    ("likelihood", "velocity", np.inf, 0.0),
    ("likelihood", "score", 0.0, np.inf),
    ("sigmoid", "noise", 0.0, np.inf),
    ("sigmoid", "velocity", 0.0, 0.0),
]


@pytest.mark.parametrize(("name", "kind", "clean", "noisy"), LIMITS)
def test_at_the_ends_of_time_weights_are_their_limits(name, kind, clean, noisy):
    ends = jnp.array([0.0, 1.0], jnp.float32)
    out = WEIGHTS[name](ends, schedules.rectified_flow(), parameterization=kind)
    assert out.dtype == jnp.float32
    for value, limit in zip(out, (clean, noisy), strict=True):
        if np.isfinite(limit):
            np.testing.assert_allclose(value, limit, rtol=1e-5, atol=1e-9)
        else:
            assert value > 1e9


@pytest.mark.parametrize("name", ["cosine", "rectified_flow", "trig_flow"])
@pytest.mark.parametrize("kind", ["noise", "v", "velocity"])
def test_losses_and_their_gradients_are_finite_at_both_ends(name, kind):
    schedule = SCHEDULES[name]
    t = jnp.array([0.0, schedule.t_max], jnp.float32)
    prediction, data, noise = jax.random.normal(jax.random.key(6), (3, 2, 4), jnp.float32)

    def loss(prediction, data, gamma):
        weight = score.min_snr_weight(t, schedule, parameterization=kind, gamma=gamma)
        return score.denoising_loss(prediction, data, noise, t, schedule, parameterization=kind, weight=weight).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(prediction, data, jnp.float32(5.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients)))


@pytest.mark.parametrize("name", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("kind", ["data", "noise", "velocity"])
def test_likelihood_weight_integrates_to_a_difference_of_divergences(name, kind):
    """int E[loss(q's denoiser) - loss(p's)] dt from .05 to .95 = KL(p_.05||q_.05) - KL(p_.95||q_.95), Gaussians in 2-D.

    Denoisers of Gaussians are affine, so three nodes per variable integrate the losses exactly.
    """
    schedule = SCHEDULES[name]
    mean_p, var_p = jnp.array([0.6, -1.0]), jnp.array([0.3, 0.9])
    mean_q, var_q = jnp.array([-0.2, -0.5]), jnp.array([0.8, 0.5])
    draws, weights = gauss_hermite(3, 4)
    data, noise = mean_p + jnp.sqrt(var_p) * draws[:, :2], draws[:, 2:]

    def loss(t, mean, var):
        a, s = schedule.alpha(t), schedule.sigma(t)
        x = a * data + s * noise
        denoised = mean + a * var / (a**2 * var + s**2) * (x - a * mean)
        prediction = schedules.convert(denoised, x, t, schedule, source="data", target=kind)
        weight = score.likelihood_weight(t, schedule, parameterization=kind)
        return weights @ score.denoising_loss(
            prediction, data, noise, t, schedule, parameterization=kind, weight=weight, reduce="sum"
        )

    def divergence(t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        p, q = a**2 * var_p + s**2, a**2 * var_q + s**2
        return 0.5 * jnp.sum(p / q - 1 - jnp.log(p / q) + (a * (mean_p - mean_q)) ** 2 / q)

    t, w = (jnp.asarray(x) for x in np.polynomial.legendre.leggauss(48))
    excess = jax.jit(jax.vmap(lambda t: loss(t, mean_q, var_q) - loss(t, mean_p, var_p)))(0.5 + 0.45 * t)
    expected = divergence(jnp.asarray(0.05)) - divergence(jnp.asarray(0.95))
    np.testing.assert_allclose(0.45 * (w @ excess), expected, rtol=1e-8)


# --- EDM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_loss_of_an_untrained_preconditioned_network_is_one_at_every_noise_level(sigma_data):
    draws, weights = gauss_hermite(3, 2)
    data = sigma_data * draws[:, :1]
    for sigma in (0.01, 0.4, 20.0):
        skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        losses = score.edm_loss(skip * (data + sigma * draws[:, 1:]), data, jnp.asarray(sigma), sigma_data=sigma_data)
        np.testing.assert_allclose(weights @ losses, 1.0, rtol=1e-8)


def test_edm_loss_is_the_plain_squared_error_of_the_raw_network():
    data, noise, raw = jax.random.normal(jax.random.key(7), (3, 6, 4))
    sigma, sd = jnp.geomspace(0.01, 50, 6), 0.5
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / jnp.sqrt(sigma**2 + sd**2)
    x = data + sigma[:, None] * noise
    loss = score.edm_loss(skip[:, None] * x + out[:, None] * raw, data, sigma, sigma_data=sd)
    target = (data - skip[:, None] * x) / out[:, None]
    np.testing.assert_allclose(loss, jnp.mean((raw - target) ** 2, -1), rtol=1e-7)


def test_noise_levels_are_log_normal():
    """Mean and standard deviation of 40,000 logarithms within 4.5 standard errors: a false alarm in 70,000 runs."""
    n = 40_000
    log_sigma = jnp.log(score.log_normal_noise_levels(jax.random.key(8), (n // 4, 4), -0.7, 0.5))
    assert abs(log_sigma.mean() + 0.7) < 4.5 * 0.5 / np.sqrt(n)
    assert abs(log_sigma.std() - 0.5) < 4.5 * 0.5 / np.sqrt(2 * n)


# --- conventions ------------------------------------------------------------------------------------------------------


def test_sum_is_the_mean_times_the_dimension_and_weights_multiply():
    prediction, target = jax.random.normal(jax.random.key(9), (2, 3, 2, 5))
    mean = score.regression_loss(prediction, target)
    np.testing.assert_allclose(mean, jnp.mean((prediction - target) ** 2, (1, 2)), rtol=1e-12)
    weight = jnp.array([0.0, 2.0, 0.5])
    out = score.regression_loss(prediction, target, weight=weight, reduce="sum")
    np.testing.assert_allclose(out, 10 * weight * mean, rtol=1e-12)


def test_a_misspelt_parameterization_is_named():
    x, t = jnp.ones((2, 3)), jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="'epsilon'"):
        score.denoising_loss(x, x, x, t, schedules.cosine(), parameterization="epsilon")
    with pytest.raises(ValueError, match=r"parameterization must be one of .*'epsilon'"):
        score.edm_weight(t, schedules.cosine(), parameterization="epsilon")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, **on: score.edm_weight(x, sigma_data=0.0, **on), "sigma_data must be above 0, got 0.0"),
        (lambda x, **on: score.min_snr_weight(x, gamma=-5.0, **on), "gamma must be above 0, got -5.0"),
        (lambda x, **on: score.p2_weight(x, k=0.0, **on), "k must be above 0, got 0.0"),
        (lambda x, **on: score.edm_loss(x, x, 0.0), "sigma must be above 0, got 0.0"),
        (lambda x, **on: score.edm_loss(x, x, x, sigma_data=-0.5), "sigma_data must be above 0, got -0.5"),
        (lambda x, **on: score.nonnegative_score_matching_loss(wiggly, x - 1), "x must be at least 0, got -0.5"),
    ],
)
def test_hyperparameters_and_data_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.array([0.5, 0.7]), schedule=schedules.cosine(), parameterization="data")

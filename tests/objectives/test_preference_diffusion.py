"""Diffusion-DPO: its algebra, and Gaussian data with a linear reward, where the optimum is the exact tilt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws.oracles import gauss_hermite, one_dimensional

from esscher.core import schedules
from esscher.objectives import score
from esscher.objectives.preference import diffusion, links, losses

pytestmark = pytest.mark.usefixtures("x64")

SCHEDULE = schedules.cosine()
MEAN, VARIANCE, SLOPE = 0.4, 0.7, 1.3  # of the data, and r(x) = 1.3 x


def errors(seed=0):
    return jnp.square(jax.random.normal(jax.random.key(seed), (4, 6), jnp.float64))


def softplus(z):
    return np.logaddexp(0, z)


# --- algebra ----------------------------------------------------------------------------------------------------------


def test_it_is_the_pairwise_loss_of_minus_weighted_error_differences():
    chosen, rejected, ref_chosen, ref_rejected = errors()
    weight = jnp.linspace(0.2, 0.8, 6)
    value = diffusion.diffusion_dpo(*errors(), beta=3.0, weight=weight)
    z = -3.0 * weight * ((chosen - ref_chosen) - (rejected - ref_rejected))
    np.testing.assert_allclose(value, softplus(-z), rtol=1e-12)
    pairwise = losses.pairwise(weight * (ref_chosen - chosen), weight * (ref_rejected - rejected), beta=3.0)
    np.testing.assert_allclose(value, pairwise, rtol=1e-12)
    authors = softplus(0.5 * 5000 * ((chosen - ref_chosen) - (rejected - ref_rejected)))  # scale_term = -0.5 beta_dpo
    np.testing.assert_allclose(diffusion.diffusion_dpo(*errors()), authors, rtol=1e-12)
    ipo = diffusion.diffusion_dpo(*errors(), beta=3.0, weight=weight, link=links.squared_link(0.7))
    np.testing.assert_allclose(ipo, (z - 0.7) ** 2, rtol=1e-12)


def test_it_is_log_two_at_the_reference_and_linear_for_small_beta():
    chosen, rejected, *ref = errors()
    np.testing.assert_allclose(diffusion.diffusion_dpo(*ref, *ref), np.log(2), rtol=1e-15)
    slope = (diffusion.diffusion_dpo(chosen, rejected, *ref, beta=1e-6) - np.log(2)) / 1e-6
    np.testing.assert_allclose(slope, 0.25 * ((chosen - ref[0]) - (rejected - ref[1])), rtol=1e-4, atol=1e-8)


def test_it_lowers_the_chosen_error_and_raises_the_rejected_one():
    gradient = jax.grad(lambda *args: diffusion.diffusion_dpo(*args, beta=2.0).sum(), (0, 1))(*errors())
    assert (gradient[0] > 0).all()
    np.testing.assert_allclose(gradient[1], -gradient[0], rtol=1e-12)
    z = -((errors()[0] - errors()[2]) - (errors()[1] - errors()[3]))
    np.testing.assert_allclose(gradient[0], jax.nn.sigmoid(-z), rtol=1e-12)  # beta weight = 1


def test_inversion_noise_is_the_noise_of_a_latent():
    data, noise = jax.random.normal(jax.random.key(1), (2, 5, 3), jnp.float64)
    t = jnp.linspace(0.1, 0.9, 5)
    latents = schedules.add_noise(data, noise, t, SCHEDULE)
    np.testing.assert_allclose(diffusion.inversion_noise(latents, data, t, SCHEDULE), noise, rtol=1e-12)


# --- Gaussian data, a linear reward -----------------------------------------------------------------------------------


def law():
    return one_dimensional([1.0], [MEAN], [VARIANCE])


def noise_of(law, x, t):
    """The exact noise prediction."""
    return -SCHEDULE.sigma(t) * law.at(SCHEDULE, t).score(x)


def error_of(predict, data, noise, t):
    x = schedules.add_noise(data, noise, t, SCHEDULE)
    return score.regression_loss(predict(x), noise, reduce="sum")


def population_gradient(predict, t, beta, weight, *, shared_noise=True):
    """Slope of the population loss at a noise predictor, in the directions of a constant, `x` and `x^2`.

    Pairs are two draws of the data, labelled by Bradley-Terry of the reward; all by quadrature.
    """
    nodes, p = gauss_hermite(13, 3 if shared_noise else 4)
    first, second = (MEAN + np.sqrt(VARIANCE) * nodes[:, i : i + 1] for i in (0, 1))
    noises = nodes[:, 2:3], nodes[:, -1:]
    wins = jax.nn.sigmoid(SLOPE * (first - second))[:, 0]

    @jax.jit
    def loss(theta):
        moved = lambda x: predict(x) + theta[0] + theta[1] * x + theta[2] * x**2  # noqa: E731
        reference = lambda x: noise_of(law(), x, t)  # noqa: E731
        (a, ref_a), (b, ref_b) = (
            tuple(error_of(f, data, noise, t) for f in (moved, reference))
            for data, noise in zip((first, second), noises, strict=True)
        )
        hyper = {"beta": beta, "weight": weight}
        forward, back = (
            diffusion.diffusion_dpo(a, b, ref_a, ref_b, **hyper),
            diffusion.diffusion_dpo(b, a, ref_b, ref_a, **hyper),
        )
        return p @ (wins * forward + (1 - wins) * back)

    return jax.grad(loss)(jnp.zeros(3))


def temperature(t, beta, weight):
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    return 2 * beta * weight * alpha**2 * sigma**2 * VARIANCE / (alpha**2 * VARIANCE + sigma**2) ** 2


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_population_optimum_is_the_denoiser_of_a_tilt(t):
    """Same noise: `h` differs by the reward over the temperature, exactly, so every pair's slope is zero on average."""
    beta, weight, t = 1.7, 0.6, jnp.asarray(t)

    def slope(temperature):
        tilted = law().tilt_linear(jnp.array([SLOPE]), temperature)
        return population_gradient(lambda x: noise_of(tilted, x, t), t, beta, weight)

    exact = temperature(t, beta, weight)
    np.testing.assert_allclose(slope(exact), 0, atol=1e-13)
    colder, warmer = slope(exact / 1.2), slope(1.2 * exact)
    assert colder[0] * warmer[0] < 0
    assert min(np.abs(colder[0]), np.abs(warmer[0])) > 1e-2
    assert np.abs(population_gradient(lambda x: noise_of(law(), x, t), t, beta, weight)[0]) > 1e-2


def test_a_weight_by_the_log_snr_makes_it_one_tilt_at_every_time():
    tilted = law().tilt_linear(jnp.array([SLOPE]), 0.8)
    for t in jnp.array([0.15, 0.6, 0.85]):
        weight = 0.8 / temperature(t, 1.0, 1.0)
        gradient = population_gradient(lambda x, t=t: noise_of(tilted, x, t), t, 1.0, weight)
        np.testing.assert_allclose(gradient, 0, atol=1e-13)


def test_noise_of_their_own_moves_the_optimum():
    t, beta, weight = jnp.asarray(0.5), 1.7, 0.6
    tilted = law().tilt_linear(jnp.array([SLOPE]), temperature(t, beta, weight))
    gradient = population_gradient(lambda x: noise_of(tilted, x, t), t, beta, weight, shared_noise=False)
    assert np.abs(gradient).max() > 1e-2


def test_the_bound_summed_over_all_times_is_the_log_ratio():
    """With half the change of the log-SNR as weight, as `log tilt(x) - log p(x)`, constant included."""
    tilted, x = law().tilt_linear(jnp.array([SLOPE]), 0.8), jnp.array([[-1.2], [0.3], [2.5]])
    nodes, p = gauss_hermite(3, 1)
    log_snr = jnp.linspace(-40.0, 40.0, 801)
    times = 2 / jnp.pi * jnp.arctan(jnp.exp(-log_snr / 2))

    @jax.jit
    @jax.vmap
    def at(t):
        x_, noise = jnp.repeat(x, 3, 0), jnp.tile(nodes, (3, 1))
        pair = [error_of(lambda y, one=one: noise_of(one, y, t), x_, noise, t) for one in (tilted, law())]
        h = diffusion.denoising_log_ratio(*pair, weight=0.5 * 0.1)
        return h.reshape(3, 3) @ p

    np.testing.assert_allclose(at(times).sum(0), tilted.log_prob(x) - law().log_prob(x), rtol=1e-8)

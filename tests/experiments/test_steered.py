"""Every way of steering reaches, or misses, the exact tilt of a Gaussian model as it should, at the cost it states."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes, schedules
from esscher.core.errors import UsageError
from esscher.experiments import sampling, steered
from esscher.experiments.quality import Judge
from esscher.models import preconditioning
from esscher.samplers import integrate, steppers
from esscher.samplers.diffusion import energy

EDM = schedules.edm()
MEAN, VARIANCE, NOISE = 0.2, 0.5, 0.7
SHAPE, N, RUNS, STEPS = (2, 2, 1), 256, 8, 250
NOTHING = np.zeros(SHAPE, np.float32)
SEEN = np.array([[1], [0]], np.float32)[..., None] * np.ones(SHAPE, np.float32)
BASE = steered.Goal(
    *map(np.float32, (0, 0)),
    slopes=np.outer([1, 1, 1, 1], [-0.5, 1.0]).astype(np.float32),
    offsets=np.array([0.3, 0], np.float32),
    target=np.int32(1),
    observed=NOTHING,
    precision=NOTHING,
    width=np.float32(0.7),
    zeta=np.float32(0),
)
GOALS = {
    "none": BASE,
    "ink": BASE._replace(ink=np.float32(0.8)),
    "class": BASE._replace(weight=np.float32(2.0)),
    "measured": BASE._replace(observed=1.4 * SEEN, precision=SEEN / np.float32(NOISE**2), zeta=np.float32(1.0)),
}
CALLS = []


def denoise(params, x, sigma, label):
    """`E[x_0 | x]` of data `N(m, v I)` without a label, and nonsense with one; the rows that are used are counted."""

    def count(_):
        CALLS.append(len(x))
        return np.float32(0)

    zero = jax.ShapeDtypeStruct((), jnp.float32)
    zero = jax.pure_callback(count, zero, jax.lax.stop_gradient(x.ravel()[0]), vmap_method="sequential")
    gain = (VARIANCE / (VARIANCE + sigma**2))[:, None, None, None]
    return zero + jnp.where((label == 10)[:, None, None, None], MEAN + gain * (x - MEAN), 99.0)


@functools.cache
def program(name):
    """Means of the upper and the lower pixels and the upper ones' variance, of `RUNS` runs."""
    sample = steered.sampler(steered.METHODS[name], denoise, SHAPE, 10, meshes.make(data=1), N)

    @jax.jit
    def moments(goal, times):
        x = jax.lax.map(lambda key: sample(None, key, goal, times), jax.random.split(jax.random.key(0), RUNS))
        return jnp.stack([x[:, :, 0].mean((1, 2, 3)), x[:, :, 1].mean((1, 2, 3)), x[:, :, 0].var((1, 2, 3))], -1)

    return moments


def found(name, goal):
    """Their means over the runs, and standard errors."""
    runs = np.asarray(program(name)(GOALS[goal], schedules.edm_times(STEPS, sampling.SIGMA_MAX, 0.02)), float)
    return runs.mean(0), runs.std(0, ddof=1) / RUNS**0.5


def exact(goal):
    """Those moments of the tilt: by completing the square, for the class by weighted samples of the model."""
    if goal == "measured":
        precision = 1 / VARIANCE + 1 / NOISE**2
        return np.array([(MEAN / VARIANCE + 1.4 / NOISE**2) / precision, MEAN, 1 / precision])
    if goal == "class":
        x = MEAN + VARIANCE**0.5 * np.random.default_rng(0).standard_normal((400_000, *SHAPE)).astype(np.float32)
        w = np.asarray(jax.nn.softmax(steered.log_reward(GOALS[goal], jnp.asarray(x))), float)
        mean = w @ x.mean((1, 2, 3))
        return np.array([mean, mean, w @ np.square(x - mean).mean((1, 2, 3))])
    shift = VARIANCE * float(GOALS[goal].ink)
    return np.array([MEAN + shift, MEAN + shift, VARIANCE])


def agree(found, expected):
    """To 6 standard errors of 8 runs' mean (7 degrees of freedom: one number in 2,000 fails) and 0.02 for the steps."""
    mean, error = found
    assert error.max() < 0.025
    np.testing.assert_array_less(np.abs(mean - expected), 6 * error + 0.02)


@pytest.mark.parametrize("goal", ["ink", "class", "measured"])
@pytest.mark.parametrize("name", ["weights at the end", "TDS", "FKC"])
def test_particles_reach_the_exact_tilt(name, goal):
    agree(found(name, goal), exact(goal))
    assert exact(goal)[0] - MEAN > 0.2


@pytest.mark.parametrize("goal", ["ink", "class", "measured"])
def test_a_choice_among_four_candidates_goes_most_of_the_way(goal):
    gone = (found("SVDD", goal)[0][0] - MEAN) / (exact(goal)[0] - MEAN)
    assert 0.6 < gone < 1.05


def test_gradients_alone_are_right_for_a_linear_reward_and_far_too_sure_of_a_measurement():
    agree(found("DPS", "ink"), exact("ink"))
    (mean, _, variance), expected = found("DPS", "measured")[0], exact("measured")
    assert mean > expected[0] + 0.4  # 1.4 was measured
    assert variance < expected[2] - 0.05


@pytest.mark.usefixtures("compile_quickly")
def test_dps_takes_the_steps_of_the_library():
    goal, times = GOALS["measured"], schedules.edm_times(20, sampling.SIGMA_MAX, 0.02)
    predictor = preconditioning.denoiser_predictor(lambda x, t: denoise(None, x, t, jnp.full(len(x), 10)), EDM)
    observe = lambda x: x[:, 0].reshape(len(x), -1)  # noqa: E731
    start_key, key = jax.random.split(jax.random.key(3))
    x = times[0] * jax.random.normal(start_key, (5, *SHAPE))
    stepper = energy.dps(steppers.ancestral(EDM), observe, jnp.full((5, 2), 1.4), goal.zeta)
    expected = integrate(key, stepper, predictor, x, times)
    found = steered.METHODS["DPS"].sample(jax.random.key(3), predictor, goal, 5, SHAPE, times)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("goal", ["none", "measured"])
def test_without_steering_no_goal_matters(goal):
    agree(found("unsteered", goal), exact("none"))


@pytest.mark.parametrize("name", steered.METHODS)
def test_a_sample_costs_as_many_looks_of_the_model_as_is_stated(name):
    found(name, "none")
    CALLS.clear()
    found(name, "ink")
    assert sum(CALLS) == RUNS * N * steered.METHODS[name].evaluations(STEPS)


@pytest.mark.usefixtures("compile_quickly")
def test_eight_devices_draw_the_images_of_one():
    def images(**sizes):
        study = sampling.Study(denoise, None, SHAPE, 10, meshes.make(**sizes), jax.random.key(0))
        drawn = steered.draw(study, [steered.Task("", GOALS["class"], "", None)], 16)
        assert list(drawn) == list(steered.METHODS)
        return [images for ((images, _),) in drawn.values()]

    for alone, together in zip(images(data=1), images(data=4, fsdp=2), strict=True):
        assert alone.shape == (16, *SHAPE)
        np.testing.assert_allclose(together, alone, atol=1e-4)


# --- tasks and the report ---------------------------------------------------------------------------------------------


def classify(images):
    assert np.isfinite(images).all()  # as scikit-learn asks for
    return np.where(images.mean((1, 2, 3)) > 0, 7, 2)


JUDGE = Judge(classify, None, np.zeros((5, 3)), 0.9, 0.1)


def real(labels, channels=1):
    """Images of 4 x 4, lighter and darker, and their labels."""
    rng = np.random.default_rng(0)
    label = rng.choice(labels, 200)
    tone = (label - np.mean(labels)) / np.ptp(labels)
    images = tone[:, None, None, None] + 0.3 * rng.standard_normal((200, 4, 4, channels))
    return images.astype(np.float32), label


@pytest.mark.parametrize("labels", [[2, 7], [0, 1, 2, 7]])
def test_goals_reward_what_they_are_named_for(labels):
    train = real(labels)
    image = train[0][0]
    ink, kind, measured = steered.tasks(train, image, JUDGE, jax.random.key(0))
    assert [task.name for task in (ink, kind, measured)] == ["more ink", "class 7", "upper half measured"]
    assert steered.tasks(real(labels, 3), np.zeros((4, 4, 3)), JUDGE, jax.random.key(0))[0].name == "brighter"
    reward = lambda task, images: np.asarray(steered.log_reward(task.goal, jnp.asarray(images)), float)  # noqa: E731
    # Two standard deviations of ink are worth 2 x 2 nats.
    darkness = train[0].mean((1, 2, 3)) / 2
    np.testing.assert_allclose(reward(ink, train[0]).std(), 2, rtol=1e-4)
    assert np.corrcoef(reward(ink, train[0]), darkness)[0, 1] > 0.9999
    np.testing.assert_allclose(ink.measure(train[0]), 0.5 + darkness.mean(), rtol=1e-5)
    # The class is told by another classifier than the judge, which here goes by the tone.
    of_class = train[1] == 7
    assert reward(kind, train[0][of_class]).mean() > -2
    assert reward(kind, train[0][~of_class]).mean() < -8
    assert kind.measure(np.ones((3, 4, 4, 1))) == 1
    assert kind.measure(-np.ones((3, 4, 4, 1))) == 0
    # Of the measured image only the upper half counts, in units of the noise.
    halves = np.where(np.arange(4)[:, None, None] < 2, image, [[[-9]], [[0.0]], [[5]], [[1]]])
    np.testing.assert_allclose(reward(measured, halves[None]), reward(measured, image[None]), rtol=1e-5)
    np.testing.assert_allclose(-2 * reward(measured, image[None])[0] / 8, measured.measure(image[None]) ** 2, rtol=1e-5)
    assert 0.4 < measured.measure(image[None]) < 1.8


def drawn(value):
    def draw(study, chosen, n):
        images = np.random.default_rng(1).standard_normal((n, 4, 4, 1)).astype(np.float32)
        images[1::2] = images[::2]
        return {name: [(images + (value if name == "TDS" else 0), 1.5)] * len(chosen) for name in steered.METHODS}

    return draw


@pytest.fixture
def study():
    return sampling.Study(None, None, (4, 4, 1), 3, meshes.make(data=4, fsdp=2), jax.random.key(0))


def test_the_report_has_every_method_for_every_goal(tmp_path, monkeypatch, study):
    monkeypatch.setattr(steered, "draw", drawn(0.0))
    train = real([0, 2, 7])
    text = steered.report(tmp_path, study, JUDGE, train, train, 12)["Steering"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[1] for row in rows] == ["real images", *steered.METHODS] * 3
    costs = {row[1]: row[6:] for row in rows}
    assert costs["SVDD"] == ["125", "0", "1.5"]
    assert costs["DPS"] == ["32", "32", "1.5"]
    assert {row[5] for row in rows[1:7]} == {"8"}  # 12 become 16 on eight devices, each of them twice
    assert (tmp_path / "figures" / "steered.png").exists()
    assert re.search(r"seconds for all 16 ", text)


def test_rewards_that_are_not_finite_are_one_line(tmp_path, monkeypatch, study):
    monkeypatch.setattr(steered, "draw", drawn(np.nan))
    train = real([0, 2, 7])
    with pytest.raises(UsageError) as error:
        steered.report(tmp_path, study, JUDGE, train, train, 8)
    assert str(error.value) == (
        "--steered: the rewards of TDS for 'more ink' are not finite; "
        "train the model longer, or leave this out by --steered 0"
    )

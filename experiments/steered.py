"""A trained denoiser steered to goals it was not trained for: samplers of the tilt side by side, with their cost."""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from esscher.core import figures, meshes, reporting, schedules
from esscher.core.arrays import reduce_events, safe_sqrt, squared_norm
from esscher.core.contracts import Predictor
from esscher.core.errors import UsageError
from esscher.experiments import quality, sampling
from esscher.models import preconditioning
from esscher.samplers import integrate, resampling, smc, steppers
from esscher.samplers.diffusion import correctors, energy, kernels, steering, svdd

__all__ = ["METHODS", "Goal", "Method", "Score", "Task", "draw", "log_reward", "report", "sampler", "tasks"]

EDM = sampling.EDM
STEPS, CANDIDATES = 32, 4  # of each sampler; model evaluations per step and delivered sample, where it has a choice
SIGMA_MIN = 0.02  # before the last step; less noise is hardly seen
Images = np.ndarray


# --- what is asked for ------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """A reward of images, `r / beta`: three terms, in arrays, so that a sampler compiles once for all goals."""

    ink: Array  # [] nats for a unit of the sum of all pixels
    weight: Array  # [] on the log-probability of a class
    slopes: Array  # [H W C, K] of a linear classifier of clean images
    offsets: Array  # [K]
    target: Array  # [] the class
    observed: Array  # [H, W, C] what was measured
    precision: Array  # [H, W, C] of the measurement, 0 where nothing was
    width: Array  # [] noise up to which the reward of a noisy state means something
    zeta: Array  # [] step size of DPS towards the measurement; 0 if the goal is none


class Task(NamedTuple):
    """A goal, and how it is spoken of."""

    name: str
    goal: Goal
    unit: str  # of `measure`
    measure: Callable[[Images], float]  # the mean reward of images, in that unit


def log_reward(goal: Goal, x: Array) -> Array:
    """`ink sum x + weight log p(target | x) - sum precision (x - observed)^2 / 2`, `[B, H, W, C] -> [B]`."""
    log_probs = jax.nn.log_softmax(x.reshape(len(x), -1) @ goal.slopes + goal.offsets)
    error = reduce_events(goal.precision * jnp.square(x - goal.observed), "sum")
    return goal.ink * reduce_events(x, "sum") + goal.weight * log_probs[:, goal.target] - 0.5 * error


INK, CLASS, SHARPNESS, NOISE, ZETA = 2.0, 8, 4.0, 0.5, 0.5


def tasks(train: tuple[Images, Images], image: Images, judge: quality.Judge, key: Array) -> list[Task]:
    """Three tasks: more ink, a class, and the rest of an image of which the upper half is measured.

    Ink is rewarded so that a Gaussian law would move by two standard deviations. The class is rewarded by the fourth
    power of its probability under logistic regression, which is not the judge. The noise of the measurement has a
    deviation of 0.5, where pixels are in `[-1, 1]`.

    Args:
      train: real images `[N, H, W, C]` and labels `[N]`, for the classifier and the scales.
      image: a real image that is not among them, `[H, W, C]`.
      judge: tells the classes of samples.
      key: of the measurement's noise.
    """
    images, few = train[0], slice(quality.LARGEST_TRAINING_SET)
    slopes, offsets, labels = _classifier(images[few], train[1][few])
    column = min(CLASS, len(labels) - 1)
    seen = np.broadcast_to(np.arange(len(image))[:, None, None] < len(image) // 2, image.shape)
    observed = np.where(seen, image + NOISE * np.asarray(jax.random.normal(key, image.shape)), 0)
    nothing = np.zeros(image.shape)
    base = Goal(0.0, 0.0, slopes, offsets, column, nothing, nothing, images.std(), 0.0)
    goals = [
        base._replace(ink=INK / _ink(images).std() / (2 * image.size)),
        base._replace(weight=SHARPNESS),
        base._replace(observed=observed, precision=seen / NOISE**2, width=NOISE, zeta=ZETA),
    ]
    goals = [jax.tree.map(np.float32, goal)._replace(target=np.int32(column)) for goal in goals]
    error = lambda x: np.sqrt(np.square((x - observed)[:, seen]).mean()) / NOISE  # noqa: E731
    return [
        Task("more ink" if image.shape[-1] == 1 else "brighter", goals[0], "mean pixel", lambda x: _ink(x).mean()),
        Task(f"class {labels[column]}", goals[1], "judged so", lambda x: quality.agreement(judge, x, labels[column])),
        Task("upper half measured", goals[2], "error / noise", error),
    ]


def _classifier(images: Images, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes, offsets and classes of a logistic regression on real images."""
    from sklearn.linear_model import LogisticRegression

    machine = LogisticRegression(max_iter=1000).fit(images.reshape(len(images), -1), labels)
    slopes, offsets = machine.coef_, machine.intercept_
    if len(slopes) == 1:  # of two classes scikit-learn keeps one row
        slopes, offsets = np.stack([0 * slopes[0], slopes[0]]), np.append(0.0, offsets)
    return slopes.T, offsets, machine.classes_


def _ink(images: Images) -> np.ndarray:
    """Mean pixel of each image, in `[0, 1]`."""
    return (1 + images.mean((1, 2, 3))) / 2


# --- how it is reached ------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A sampler, `(key, predictor, goal, n, shape, times) -> images[n, *shape]`, and what a delivered sample costs."""

    sample: Callable[..., Array]
    evaluations: Callable[[int], int]  # of the model, by the number of steps
    gradient: bool = False  # whether each is differentiated too


def _starts(key: Array, n: int, shape: Sequence[int], times: Array) -> Array:
    return times[0] * jax.random.normal(key, (n, *shape))


def _unsteered(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    start_key, key = jax.random.split(key)
    return integrate(key, steppers.ancestral(EDM), predictor, _starts(start_key, n, shape, times), times)


def _weighted(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    """The model's samples, some for each that is wanted, drawn by weight once all is done."""
    key, pick_key = jax.random.split(key)
    x = _unsteered(key, predictor, goal, CANDIDATES * n, shape, times)
    return x[resampling.systematic(pick_key, log_reward(goal, x), n)]


def _svdd(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    start_key, key = jax.random.split(key)
    reward = functools.partial(log_reward, goal)
    build = functools.partial(kernels.ddim_kernel, schedule=EDM)
    look, kernel = kernels.remembering_kernel(build, predictor, last=lambda s: EDM.sigma(s) == 0)
    value = kernels.remembered_value(lambda model: svdd.posterior_mean_value(model, reward, EDM))
    x = look(_starts(start_key, n, shape, times), times[0])
    return svdd.svdd(key, kernel, value, x, times, 1.0, candidates=CANDIDATES).x.x


def _tds(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    start_key, key, pick_key = jax.random.split(key, 3)
    start, propose = steering.tds(predictor, functools.partial(log_reward, goal), EDM)
    first = start(_starts(start_key, CANDIDATES * n, shape, times), times[0])
    last, _ = smc.run(key, propose, first, steering.steps(times))
    return last.state.x[resampling.systematic(pick_key, last.log_w, n)]


def _fkc(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    """The reward sets in where noise becomes as small as what it looks at; without noise it is whole."""
    start_key, key, pick_key = jax.random.split(key, 3)
    strength = lambda t: 1 / (1 + jnp.square(t / goal.width))  # noqa: E731
    reward = {"reward": functools.partial(log_reward, goal), "strength": strength}
    start, propose = correctors.corrector((predictor,), (1.0,), EDM, **reward)
    first = start(start_key, CANDIDATES * n, tuple(shape), times[0])
    last, _ = smc.run(key, propose, first, steering.steps(times))
    return last.state.x[resampling.systematic(pick_key, last.log_w, n)]


def _dps(key: Array, predictor: Predictor, goal: Goal, n: int, shape: Sequence[int], times: Array) -> Array:
    """Towards a measurement by the steps of `energy.dps`, to other goals by the gradient of the reward."""
    start_key, key = jax.random.split(key)
    measured = goal.zeta > 0

    def cost(data: Array, t: Array) -> Array:
        norm = safe_sqrt(squared_norm(jnp.where(goal.precision > 0, data - goal.observed, 0)))
        return jnp.where(measured, norm, -log_reward(goal, data))

    def size(t: Array, s: Array) -> Array:
        return jnp.where(measured, goal.zeta, jnp.square(t) - jnp.square(s))

    stepper = energy.energy_correction(steppers.ancestral(EDM), cost, size)
    return integrate(key, stepper, predictor, _starts(start_key, n, shape, times), times)


METHODS = {
    "unsteered": Method(_unsteered, lambda steps: steps),
    "weights at the end": Method(_weighted, lambda steps: CANDIDATES * steps),
    "SVDD": Method(_svdd, lambda steps: 1 + CANDIDATES * (steps - 1)),  # one start, and no look at what is done
    "TDS": Method(_tds, lambda steps: CANDIDATES * steps, gradient=True),
    "FKC": Method(_fkc, lambda steps: CANDIDATES * steps),
    "DPS": Method(_dps, lambda steps: steps, gradient=True),
}


def sampler(
    method: Method, denoise: Callable[..., Array], image_shape: Sequence[int], classes: int, mesh: Mesh, n: int
) -> Callable[..., Array]:
    """Builds `sample(params, key, goal, times) -> images[n, H, W, C]`; every look of the model is split over the mesh.

    The unconditional model is steered, and the devices over which examples are split must divide `n`.
    """
    rows = NamedSharding(mesh, meshes.BATCH)

    def sample(params: Any, key: Array, goal: Goal, times: Array) -> Array:
        def unconditional(x: Array, sigma: Array) -> Array:
            x = jax.lax.with_sharding_constraint(x, rows)
            return denoise(params, x, sigma, jnp.full(len(x), classes, jnp.int32))

        predictor = preconditioning.denoiser_predictor(unconditional, EDM)
        return method.sample(key, predictor, goal, n, image_shape, times)

    return sample


# --- what came of it --------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What is said of a method's samples for one task."""

    reward: float  # in the task's unit
    log_reward: float  # r / beta, in nats
    diversity: float  # mean distance of two samples over that of two real images
    distinct: int  # how many samples differ
    seconds: float  # for all of them, compiled before


def draw(study: sampling.Study, chosen: Sequence[Task], n: int) -> dict[str, list[tuple[Images, float]]]:
    """Images `[n, H, W, C]` of every method for each task, and the seconds they took, compilation apart."""
    drawn: dict[str, list[tuple[Images, float]]] = {name: [] for name in METHODS}
    times = schedules.edm_times(STEPS, sampling.SIGMA_MAX, SIGMA_MIN)
    with reporting.progress(len(METHODS) * len(chosen), label="steering") as show:
        for index, (name, method) in enumerate(METHODS.items()):
            sample = jax.jit(sampler(method, study.denoise, study.image_shape, study.classes, study.mesh, n))
            compiled = sample.lower(study.params, study.key, chosen[0].goal, times).compile()
            for number, task in enumerate(chosen, 1):
                begin = time.perf_counter()
                images = jax.block_until_ready(compiled(study.params, study.key, task.goal, times))
                drawn[name].append((meshes.gather(images), time.perf_counter() - begin))
                show(index * len(chosen) + number)
    return drawn


def _score(name: str, task: Task, images: Images, seconds: float, spread: float) -> Score:
    value = float(log_reward(task.goal, jnp.asarray(images)).mean())
    if not math.isfinite(value):
        raise UsageError(
            f"--steered: the rewards of {name} for {task.name!r} are not finite; "
            "train the model longer, or leave this out by --steered 0"
        )
    distinct = len(np.unique(images.round(3), axis=0))
    return Score(float(task.measure(images)), value, _spread(images) / spread, distinct, seconds)


def _spread(images: Images) -> float:
    """Mean root mean square distance between two images."""
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    power = np.square(flat).mean(1)
    squares = (power[:, None] + power - 2 * flat @ flat.T / flat.shape[1]).round(12)  # so that copies are 0 apart
    return float(np.sqrt(np.maximum(squares, 0)).sum() / (len(flat) * (len(flat) - 1)))


def report(
    folder: pathlib.Path,
    study: sampling.Study,
    judge: quality.Judge,
    train: tuple[Images, Images],
    test: tuple[Images, Images],
    samples: int,
) -> dict[str, str]:
    """Steers the model to three goals by every method, draws the figure and returns the section of the report.

    Args:
      folder: of the run.
      study: the model.
      judge: tells the classes of samples.
      train: real images `[N, H, W, C]` and labels `[N]`.
      test: the same, held out; of its first image one half is measured.
      samples: of each method for each goal, at least 2; rounded up to a multiple of the devices they are split over.

    Raises:
      UsageError: a reward is not finite, as that of a model that has hardly learned may be.
    """
    unit = meshes.row_shards(study.mesh)
    n = math.ceil(samples / unit) * unit
    measure_key, pick_key = jax.random.split(jax.random.fold_in(study.key, 1))
    chosen = tasks(train, test[0][0], judge, measure_key)
    real = [(_by_weight(pick_key, task.goal, train[0], n), 0.0) for task in chosen]
    drawn, spread = {"real images": real, **draw(study, chosen, n)}, _spread(train[0][:1000])
    scores = {
        name: [_score(name, task, *found, spread) for task, found in zip(chosen, results, strict=True)]
        for name, results in drawn.items()
    }
    sheets = {name: [images for images, _ in results] for name, results in drawn.items()}
    path = _draw_figure(folder / "figures" / "steered.png", chosen, sheets, scores, test[0][0])
    return {"Steering": _section(folder, path, chosen, scores, n)}


def _by_weight(key: Array, goal: Goal, images: Images, n: int) -> Images:
    """Images drawn by `exp(r / beta)`: the tilt of the data themselves, as far as there are enough of them."""
    return images[np.asarray(resampling.systematic(key, log_reward(goal, jnp.asarray(images)), n))]


def _draw_figure(
    path: pathlib.Path,
    chosen: Sequence[Task],
    sheets: dict[str, list[Images]],
    scores: dict[str, list[Score]],
    image: Images,
) -> pathlib.Path:
    """A row of samples for each method, a group of columns for each task, and under each group its numbers."""
    shown = min(6, len(sheets["unsteered"][0]))
    spaced = lambda images: images[np.linspace(0, len(images) - 1, shown).astype(int)]  # noqa: E731 neighbours are kin
    blocks = {name: [spaced(images) for images in results] for name, results in sheets.items()}
    captions = [
        [
            f"{task.unit} {score.reward:.2f}, diversity {score.diversity:.2f}"
            for task, score in zip(chosen, row, strict=True)
        ]
        for row in scores.values()
    ]
    # Of real images few have such an upper half: their place is for the image and what was measured of it.
    paper = np.full_like(image, -1 if image.shape[-1] == 1 else 1)
    goal = chosen[-1].goal
    measured = np.where(goal.precision > 0, goal.observed, paper)
    blocks["real images"][-1] = np.stack([image, measured, *[paper] * shown])[:shown]
    captions[0][-1] = "the image, and what is measured"
    labels = ["real images\ndrawn by weight"]
    for name, method in METHODS.items():
        cost = f"{method.evaluations(STEPS)} {'with gradient' if method.gradient else 'evaluations'}"
        labels.append(f"{name}\n{cost}, {np.mean([score.seconds for score in scores[name]]):.1f} s")
    rows = np.stack([np.concatenate(row) for row in blocks.values()])
    return figures.image_grid(rows, labels, [task.name for task in chosen], path, captions=captions)


def _section(
    folder: pathlib.Path, path: pathlib.Path, chosen: Sequence[Task], scores: dict[str, list[Score]], count: int
) -> str:
    rows = []
    for index, task in enumerate(chosen):
        for name, results in scores.items():
            *said, seconds = results[index]
            method = METHODS.get(name)
            cost = method.evaluations(STEPS) if method else 0
            cost = [cost, cost if method and method.gradient else 0, round(seconds, 2)]
            rows.append([f"{task.name}: {task.unit}", name, *said, *cost])
    header = ["goal", "method", "reward", "r / beta", "diversity", "distinct", "evaluations", "gradients", "seconds"]
    body = [
        "The unconditional model, steered to three goals. Each is a reward of clean images, and what is asked for is "
        "the tilt `p(x) exp(r(x) / beta)` of the model's own law, not the largest reward. Weights at the end choose "
        f"among {CANDIDATES} samples of the model for each that is delivered: right, as long as enough of them differ. "
        "TDS and FKC carry as many particles and weigh them on the way. SVDD picks one of as many candidates at each "
        "step, by the reward of what the model expects, which is not quite their value. DPS does not sample the tilt: "
        "it takes what the model expects for certain and so tends to overshoot; where it has more reward than TDS and "
        "FKC, it has more than was asked for.",
        reporting.picture(path, folder, "Samples by method and goal, with reward, diversity and cost"),
        reporting.table(header, rows),
        f"More ink would move a Gaussian law by {INK:g} standard deviations. The class is rewarded by {SHARPNESS:g} "
        "times its log-probability under logistic regression; the share judged so is that of the classifier of the "
        "sections above. The measurement is that of the upper half of a test image, with noise of deviation "
        f"{NOISE:g} for pixels in [-1, 1], in which the root mean square error is given; the steps of DPS towards it "
        f"are of length {ZETA:g}, and others would fit it more or less closely. Diversity is the mean distance between "
        "two samples over that between two real images. Real images are drawn by weight too, as far as there are any. "
        f"Evaluations of the model are for one sample, seconds for all {count} and without compilation.",
    ]
    return "\n\n".join(body)

"""Samples of a class-conditional image denoiser: sheets by guidance weight, quality by solver and budget."""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from esscher.core import figures, meshes, reporting, schedules
from esscher.core.contracts import Predictor, Stepper
from esscher.experiments.quality import Judge, agreement, distance
from esscher.models import preconditioning
from esscher.samplers import guidance, integrate, steppers

__all__ = ["SOLVERS", "Quality", "Study", "by_solver", "by_weight", "draw", "noise_levels", "report", "sampler"]

EDM = schedules.edm()
SOLVERS: dict[str, tuple[Callable[[schedules.Schedule], Stepper], int]] = {  # evaluations a step; 1 in the last step
    "DDIM": (steppers.ddim, 1),
    "Heun": (steppers.heun, 2),
    "DPM-Solver-2": (steppers.dpm_solver_2, 2),
    "DPM-Solver-3": (steppers.dpm_solver_3, 3),
    "DPM-Solver++(2M)": (steppers.dpm_solver_pp_2m, 1),
    "UniPC-2": (steppers.unipc, 1),
    "ancestral": (steppers.ancestral, 1),
    "SDE-DPM-Solver++(2M)": (steppers.sde_dpm_solver_pp_2m, 1),
}
SIGMA_MAX = 20.0  # 25 to 40 times the deviation of small images; training hardly sees more noise than that
SHEET, REFERENCE = ("DPM-Solver++(2M)", 20), ("Heun", 64)  # solver and evaluations


class Study(NamedTuple):
    """A trained model and how to sample it."""

    denoise: Callable[..., Array]  # (params, x, sigma, label) -> E[x_0 | x]; the label after the last means none
    params: Any
    image_shape: tuple[int, int, int]
    classes: int
    mesh: Mesh
    key: Array  # every set of samples starts from the same noise


class Quality(NamedTuple):
    """What the judge says of a set of samples."""

    evaluations: int
    agreement: float
    distance: float


def sampler(
    denoise: Callable[..., Array], image_shape: tuple[int, ...], classes: int, stepper: Stepper
) -> Callable[..., Array]:
    """Builds `sample(params, key, label[B], w, times) -> images[B, H, W, C]`, guided by `w`.

    The starting noise depends on the key alone, so that solvers and weights are compared on the same starts. With
    `w=None` the conditional model is sampled without guidance, at half the cost of `w = 1`.
    """

    def sample(params: Any, key: Array, label: Array, w: Array | None, times: Array) -> Array:
        def predictor(label: Array) -> Predictor:
            return preconditioning.denoiser_predictor(lambda x, t: denoise(params, x, t, label), EDM)

        start_key, path_key = jax.random.split(key)
        x = times[0] * jax.random.normal(start_key, (*label.shape, *image_shape))
        model = predictor(label)
        if w is not None:
            model = guidance.cfg(model, predictor(jnp.full_like(label, classes)), w)
        return integrate(path_key, stepper, model, x, times)

    return sample


def noise_levels(solver: str, evaluations: int) -> Array:
    """EDM's noise levels for as many steps as the budget allows; the last step takes one evaluation."""
    return schedules.edm_times((evaluations - 1) // SOLVERS[solver][1] + 1, sigma_max=SIGMA_MAX)


@functools.lru_cache(maxsize=32)
def _compiled(denoise: Callable, image_shape: tuple[int, ...], classes: int, solver: str) -> Callable[..., Array]:
    return jax.jit(sampler(denoise, image_shape, classes, SOLVERS[solver][0](EDM)))


def draw(study: Study, solver: str, evaluations: int, label: np.ndarray, w: float | None = None) -> np.ndarray:
    """Images `[B, H, W, C]` of the classes `label[B]`, split over the mesh and brought to the host.

    Raises:
      ValueError: a label is not a class.
    """
    if label.min() < 0 or label.max() >= study.classes:
        raise ValueError(f"label must be in 0 .. {study.classes - 1}, got {label.min()} .. {label.max()}")
    sample = _compiled(study.denoise, study.image_shape, study.classes, solver)
    rows = jax.device_put(label.astype(np.int32), NamedSharding(study.mesh, meshes.BATCH))
    images = sample(study.params, study.key, rows, w, noise_levels(solver, evaluations))
    return meshes.gather(images)


def _labels(study: Study, samples: int) -> np.ndarray:
    """At least `samples` labels, every class equally often, a multiple of the devices they are split over."""
    unit = math.lcm(study.classes, meshes.row_shards(study.mesh))
    return np.arange(math.ceil(samples / unit) * unit) % study.classes


def by_weight(
    study: Study, judge: Judge, weights: Sequence[float], samples: int
) -> tuple[dict[float, np.ndarray], dict[float, Quality]]:
    """Samples and their quality at each guidance weight; class `i % classes` is asked of sample `i`."""
    label = _labels(study, samples)
    images = {w: draw(study, *SHEET, label, w) for w in weights}
    return images, {w: _judge(judge, SHEET[1], images[w], label) for w in weights}


def by_solver(study: Study, judge: Judge, evaluations: Sequence[int], samples: int) -> dict[str, list[Quality]]:
    """Quality of the conditional samples (`w = 1`) of every solver at every budget, and of the reference.

    Nothing without a budget.
    """
    if not evaluations:
        return {}
    label = _labels(study, samples)
    runs = [REFERENCE, *((solver, n) for solver in SOLVERS for n in evaluations)]
    table: dict[str, list[Quality]] = {"reference": []} | {solver: [] for solver in SOLVERS}
    with reporting.progress(len(runs), label="sampling") as show:
        for index, (solver, n) in enumerate(runs):
            result = _judge(judge, n, draw(study, solver, n, label), label)
            table[solver if index else "reference"].append(result)
            show(index + 1)
    return table


def _judge(judge: Judge, evaluations: int, images: np.ndarray, label: np.ndarray) -> Quality:
    return Quality(evaluations, agreement(judge, images, label), distance(judge, images))


def report(
    folder: pathlib.Path,
    judge: Judge,
    sheets: dict[float, np.ndarray],
    guided: dict[float, Quality],
    solvers: dict[str, list[Quality]],
    classes: int,
) -> dict[str, str]:
    """Draws the figures and returns the sections of the report.

    Args:
      folder: of the run.
      judge: gives the real images' numbers to compare with.
      sheets: samples by guidance weight, at least one of each class, of `by_weight`.
      guided: their quality.
      solvers: quality of the conditional samples, of `by_solver`.
      classes: those of the study; class `i % classes` was asked of sample `i`.
    """
    shown = min(classes, 10)
    rows = [np.concatenate([images[c::classes][:2] for c in range(shown)]) for images in sheets.values()]
    each = "two samples" if len(rows[0]) == 2 * shown else "one sample"
    which = "each class" if shown == classes else f"each of the first {shown} classes"
    names = ["unguided" if w == 0 else f"w = {w:g}" for w in sheets]
    path = folder / "figures" / "samples.png"
    sheet = figures.image_grid(np.stack(rows), names, [str(c) for c in range(shown)], path)
    weights = [[w, q.agreement, q.distance] for w, q in guided.items()]
    by_weight = [
        f"{SHEET[0]}, {SHEET[1]} evaluations; {each} of {which}.",
        reporting.picture(sheet, folder, "Samples by class and guidance weight"),
        reporting.table(["w", "agreement", "Fréchet distance"], weights),
    ]
    table = [[name, *quality] for name, results in solvers.items() for quality in results]
    by_solver = [
        "Conditional samples (w = 1). Agreement is the share that a classifier trained on real images puts into the "
        f"class asked for; it is right on {judge.accuracy:.1%} of the real test images. The Fréchet distance is that "
        f"from the {len(judge.real_features)} real training images in their first {judge.real_features.shape[1]} "
        f"principal components; the real test images, which are fewer, are {judge.floor:.3g} away. The reference is "
        f"{REFERENCE[0]}.",
        reporting.table(["solver", "evaluations", "agreement", "Fréchet distance"], table),
    ]
    sections = {"Samples by guidance weight": "\n\n".join(by_weight)}
    if solvers:
        real = {"agreement": {"real test images": judge.accuracy}, "distance": {"real train to real test": judge.floor}}
        panels = [
            _against_budget(solvers, "agreement", "share in the asked class", real["agreement"]),
            _against_budget(solvers, "distance", "Fréchet distance", real["distance"], log_y=True),
        ]
        figure = figures.lines(folder / "figures" / "solvers.png", *panels)
        by_solver.append(reporting.picture(figure, folder, "Quality against model evaluations"))
        sections["Solvers"] = "\n\n".join(by_solver)
    return sections


def _against_budget(
    solvers: dict[str, list[Quality]], field: str, label: str, references: dict[str, float], *, log_y: bool = False
) -> figures.Panel:
    series = {
        name: ([q.evaluations for q in results], [getattr(q, field) for q in results])
        for name, results in solvers.items()
        if name != "reference"
    }
    (best,) = solvers["reference"]
    references = references | {f"{REFERENCE[0]}, {best.evaluations} evaluations": getattr(best, field)}
    return figures.Panel(series, "model evaluations", label, log_x=True, log_y=log_y, references=references)

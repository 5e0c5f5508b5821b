"""Learn handwritten digits, then sample them: guided, by every solver at every budget, and steered to new goals.

Trains a class-conditional denoiser with the EDM loss on real digits (or any TFDS image set), then draws a sheet of
samples per class at several guidance weights, a table and figure of solver x evaluations x quality, and samples
steered to more ink, to a class and to a measurement, by particles and by gradients. Several values for a --hyper flag
span a grid that trains as one program. The same command resumes a run that was stopped.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from esscher.core import data, reporting, schedules, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import cli, quality, runs, sampling, steered
from esscher.models import dit, functional, preconditioning, unet
from esscher.objectives import score

__all__ = ["Config", "Hyper", "build", "main"]


@dataclasses.dataclass(frozen=True)
class Hyper(runs.Hyper):
    """Float hyperparameters. Each takes one value, or several, which span a grid trained as one vmapped program."""

    ema_decay: tuple[float, ...] = (0.995,)
    """Decay of the parameters' moving average, which is what samples."""
    label_dropout: tuple[float, ...] = (0.1,)
    """Share of examples whose label is hidden, so that the model learns the unconditional law too."""
    noise_mean: tuple[float, ...] = (-0.5,)
    """Mean of the log noise level in training."""
    noise_std: tuple[float, ...] = (1.2,)
    """Standard deviation of the log noise level in training."""
    sigma_data: tuple[float, ...] = (0.75,)
    """Standard deviation of the data, which scales the network's input and output."""


@dataclasses.dataclass(frozen=True)
class Config(runs.Settings):
    """Settings of the digits experiment."""

    dataset: str = "digits"
    """`digits` (1,797 real ones that scikit-learn carries), or any TFDS set of labelled square 8-bit images of one size
    with splits `train` and `test`, e.g. mnist, cifar10."""
    data_dir: pathlib.Path | None = None
    """Where prepared data sets live; ~/.cache/esscher/data by default."""
    model: Literal["dit", "unet"] = "dit"
    """Network: a small diffusion transformer, or a convolutional U-Net (slow on CPU)."""
    width: int | None = None
    """Width of the network; 96 for the transformer and 32 for the U-Net by default."""
    depth: int = 4
    """Blocks of the transformer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's arithmetic; parameters stay in float32."""
    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Guidance weights of the sample sheet: 0 unconditional, 1 conditional."""
    evaluations: tuple[int, ...] = (10, 20)
    """Budgets of model evaluations in the solver table; empty to leave the table out."""
    samples: int = 600
    """Images behind each number of the solver table."""
    steered: int = 64
    """Images of each steering method for each goal; 0 to leave steering out."""
    hyper: Hyper = dataclasses.field(default_factory=Hyper)


MAY_CHANGE = (*runs.MAY_CHANGE, "data_dir", "weights", "evaluations", "samples", "steered")


def build(
    config: Config, image_shape: tuple[int, ...], classes: int, mesh: Mesh, sweep: sweeps.Sweep
) -> tuple[runs.Program, Callable[..., Array]]:
    """The training program, and `denoise(params, x, sigma, label, sigma_data) -> E[x_0 | x]`; nothing is computed yet.

    Raises:
      UsageError: sizes of the network that do not fit each other or the images.
    """
    try:
        initialize, apply, axes = functional.initializer(functools.partial(_network, config, image_shape, classes))
    except ValueError as error:
        raise UsageError(f"--model {config.model}: {error}") from error

    def denoise(params: Any, x: Array, sigma: Array, label: Array, sigma_data: Array) -> Array:
        return preconditioning.edm_denoiser(apply, sigma_data)(params, x, sigma, label)

    def loss(params: Any, key: Array, batch: dict[str, Array], hyper: dict[str, Array]) -> tuple[Array, dict]:
        level_key, noise_key, drop_key = jax.random.split(key, 3)
        image, label = batch["image"], batch["label"]
        sigma = score.log_normal_noise_levels(level_key, label.shape, hyper["noise_mean"], hyper["noise_std"])
        x = schedules.add_noise(image, jax.random.normal(noise_key, image.shape), sigma, schedules.edm())
        hidden = jax.random.uniform(drop_key, label.shape) < hyper["label_dropout"]
        denoised = denoise(params, x, sigma, jnp.where(hidden, classes, label), hyper["sigma_data"])
        return score.edm_loss(denoised, image, sigma, sigma_data=hyper["sigma_data"]).mean(), {}

    def validate(params: Any, key: Array, batch: dict[str, Array], hyper: dict[str, Array]) -> dict[str, Array]:
        return {"validation_loss": loss(params, key, batch, hyper | {"label_dropout": jnp.zeros(())})[0]}

    optimizer = functools.partial(runs.adamw, config.steps)
    return runs.compile_program(initialize, axes, loss, validate, optimizer, mesh, sweep), denoise


def _network(config: Config, image_shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nnx.Module:
    size, _, channels = image_shape
    shared = {"image_size": size, "channels": channels, "classes": classes, "dtype": jnp.dtype(config.dtype)}
    if config.width is not None:
        shared["width"] = config.width
    if config.model == "unet":
        return unet.UNet(**shared, rngs=rngs)
    return dit.DiT(depth=config.depth, **shared, rngs=rngs)


# --- the run ----------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Trains or resumes, then samples and writes the report."""
    mesh = runs.start(
        config,
        positive=("width", "depth", "samples"),
        signed=("noise_mean",),
        shares=("ema_decay", "label_dropout"),
    )
    if any(budget < 2 for budget in config.evaluations):
        raise UsageError(f"--evaluations must be at least 2 each, got {config.evaluations}")
    if config.steered < 0 or config.steered == 1:
        raise UsageError(f"--steered must be at least 2, or 0 to leave steering out, got {config.steered}")
    if not config.weights or not np.isfinite(config.weights).all() or len(set(config.weights)) < len(config.weights):
        raise UsageError(f"--weights needs finite guidance weights, each of them once, got {config.weights}")
    sweep = sweeps.grid(config.hyper, divisor=mesh.shape["sweep"])
    train, test = (data.load(config.dataset, split, config.data_dir) for split in ("train", "test"))
    if train.shape[0] != train.shape[1] or train.shape[2] not in (1, 3):
        raise UsageError(
            f"--dataset {config.dataset} has images of {train.shape}; square ones, grey or RGB, are needed"
        )
    program, denoise = build(config, train.shape, train.num_classes, mesh, sweep)
    folder = reporting.open_run(config, experiment="digits", name=config.name, root=config.runs, may_change=MAY_CHANGE)
    source = data.batches(train, batch_size=config.batch_size, seed=config.seed)
    held_out = data.batches(test, batch_size=config.batch_size, seed=0, shuffle=False)[0]
    trained = runs.train(config, program, mesh, sweep, source, held_out, folder)
    if trained is not None:
        _evaluate(config, denoise, mesh, sweep, trained, train, test, folder)
        reporting.print_results(folder)


def _evaluate(
    config: Config,
    network: Callable[..., Array],
    mesh: Mesh,
    sweep: sweeps.Sweep,
    trained: runs.Trained,
    train: data.Images,
    test: data.Images,
    folder: pathlib.Path,
) -> None:
    """Samples the best member of the sweep and writes figures and the report."""
    losses = np.atleast_1d(trained.metrics["validation_loss"])
    best = int(np.nanargmin(losses))
    params, sigma_data = trained.state.ema, sweep.values["sigma_data"]
    if sweep.swept:
        params, sigma_data = jax.tree.map(lambda leaf: leaf[best], (params, sigma_data))

    def denoise(params: Any, x: Array, sigma: Array, label: Array) -> Array:
        return network(params, x, sigma, label, sigma_data)

    real = data.arrays(train), data.arrays(test)
    judge = quality.fit_judge(*real)
    study = sampling.Study(denoise, params, train.shape, train.num_classes, mesh, jax.random.key(config.seed + 1))
    sheets, guided = sampling.by_weight(study, judge, config.weights, config.samples)
    solvers = sampling.by_solver(study, judge, config.evaluations, config.samples)
    members = [
        [label or "this run", float(loss), int(skipped)]
        for label, loss, skipped in zip(sweep.labels, losses, np.atleast_1d(trained.metrics["skipped"]), strict=True)
    ]
    caption = "Loss in training, and of the moving average on held-out images"
    curves = runs.curves(folder, sweep, ("loss", "validation_loss"), caption)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = f"{config.model}, {parameters:,} parameters, {config.steps} steps of {config.batch_size} examples."
    table = reporting.table(["run", "validation loss", "steps skipped"], members)
    sections = {
        "Training": "\n\n".join([size, table, curves]),
        **sampling.report(folder, judge, sheets, guided, solvers, study.classes),
    }
    if config.steered:
        sections |= steered.report(folder, study, judge, *real, config.steered)
    reporting.write_report(folder, f"digits: {config.name}", sections)


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.digits", description=__doc__)

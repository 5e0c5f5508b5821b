"""Learn handwritten digits, then sample them: guided, and by every solver at every budget.

Trains a class-conditional denoiser with the EDM loss on real digits (or any TFDS image set), then draws a sheet of
samples per class at several guidance weights, and a table and figure of solver x evaluations x quality. Several values
for a --hyper flag span a grid that trains as one program. The same command resumes a run that was stopped.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esscher.core import checkpoints, data, figures, meshes, reporting, schedules, sweeps, training
from esscher.core.errors import UsageError
from esscher.experiments import cli, quality, sampling
from esscher.models import dit, functional, preconditioning, unet
from esscher.objectives import score

__all__ = ["Config", "Hyper", "Program", "build", "main"]

REPORT_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Float hyperparameters. Each takes one value, or several, which span a grid trained as one vmapped program."""

    lr: tuple[float, ...] = (2e-3,)
    """Peak learning rate of AdamW, reached after 5% of the steps and brought to zero by a cosine."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Decoupled weight decay."""
    clip: tuple[float, ...] = (1.0,)
    """Largest gradient norm."""
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
class Config:
    """Settings of the digits experiment."""

    name: str = "default"
    """Name of the run; its folder is runs/digits/NAME."""
    dataset: str = "digits"
    """`digits` (1,797 real ones that scikit-learn carries) or the name of any TFDS image set, e.g. mnist, cifar10."""
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
    steps: int = 2000
    """Training steps."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    save_every: int = 400
    """Steps between checkpoints, a multiple of 20."""
    seed: int = 0
    """Seed of parameters, noise and data order."""
    mesh: str = ""
    """Devices by axis (sweep, data, fsdp, tensor), e.g. data=8 or sweep=4,data=2; all as data by default."""
    distributed: bool = False
    """Join the other hosts of a pod first; every host runs the same command."""
    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Guidance weights of the sample sheet: 0 unconditional, 1 conditional."""
    evaluations: tuple[int, ...] = (10, 20)
    """Budgets of model evaluations in the solver table; empty to leave the table out."""
    samples: int = 600
    """Images behind each number of the solver table."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs."""
    hyper: Hyper = dataclasses.field(default_factory=Hyper)


class Program(NamedTuple):
    """The functions of a run, compiled on first use, and the layout of its state."""

    init: Callable[..., training.TrainState]  # (key, hyper) -> state
    step: Callable[..., tuple[training.TrainState, dict[str, Array]]]  # (state, key, batch, hyper); donates the state
    validate: Callable[..., Array]  # (ema, key, batch, hyper) -> loss
    denoise: Callable[..., Array]  # (params, x, sigma, label, sigma_data) -> E[x_0 | x]
    state: training.TrainState  # shapes, types and shardings


def build(
    config: Config, image_shape: tuple[int, ...], classes: int, mesh: jax.sharding.Mesh, sweep: sweeps.Sweep
) -> Program:
    """Network, loss and optimiser as functions on a mesh; nothing is computed yet."""
    network = functools.partial(_network, config, image_shape, classes)
    initialize, apply, axes = functional.initializer(network)

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

    def optimizer(hyper: dict[str, Array]) -> optax.GradientTransformation:
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.steps // 20, config.steps)
        adam = optax.adamw(lambda count: hyper["lr"] * shape(count), weight_decay=hyper["weight_decay"])
        return optax.chain(optax.clip_by_global_norm(hyper["clip"]), adam)

    def init(key: Array, hyper: dict[str, Array]) -> training.TrainState:
        return training.init(initialize(key), optimizer(hyper))

    def validate(params: Any, key: Array, batch: dict[str, Array], hyper: dict[str, Array]) -> Array:
        return loss(params, key, batch, hyper | {"label_dropout": jnp.zeros(())})[0]

    key, member = jax.random.key(0), {name: value.reshape(-1)[0] for name, value in sweep.values.items()}
    shapes = jax.eval_shape(initialize, key)
    specs = meshes.like_parameters(
        jax.eval_shape(init, key, member), shapes, meshes.parameter_specs(axes, shapes, mesh)
    )
    layout = meshes.shardings(mesh, specs, swept=sweep.swept)
    members = meshes.shardings(mesh, PartitionSpec(), swept=sweep.swept)
    shared, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, meshes.BATCH)
    lift = functools.partial(sweeps.lift, sweep=sweep)
    lifted_init = lift(init, in_axes=(None, 0))
    return Program(
        init=jax.jit(lifted_init, out_shardings=layout),
        step=jax.jit(
            lift(training.make_step(loss, optimizer), in_axes=(0, None, None, 0)),
            in_shardings=(layout, shared, rows, members),
            out_shardings=(layout, members),
            donate_argnums=0,
        ),
        validate=jax.jit(lift(validate, in_axes=(0, None, None, 0)), in_shardings=(layout.ema, shared, rows, members)),
        denoise=denoise,
        state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lifted_init, key, sweep.values),
            layout,
        ),
    )


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
    _check(config)
    if config.distributed:
        jax.distributed.initialize()
    mesh = meshes.make(**meshes.parse(config.mesh))
    sweep = sweeps.grid(config.hyper, divisor=mesh.shape["sweep"])
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shards:
        raise UsageError(f"--batch-size {config.batch_size} does not split over {shards} devices: take a multiple")
    train, test = (data.load(config.dataset, split, config.data_dir) for split in ("train", "test"))
    if train.shape[0] != train.shape[1]:
        raise UsageError(f"--dataset {config.dataset} has images of {train.shape}; square ones are needed")
    folder = reporting.open_run(config, experiment="digits", name=config.name, root=config.runs, may_change=MAY_CHANGE)
    program = build(config, train.shape, train.num_classes, mesh, sweep)
    state = _train(config, program, mesh, sweep, train, test, folder)
    if state is not None:
        _evaluate(config, program, mesh, sweep, state, train, test, folder)
        reporting.print_results(folder)


MAY_CHANGE = ("data_dir", "mesh", "distributed", "runs", "weights", "evaluations", "samples")


def _check(config: Config) -> None:
    for name in ("steps", "batch_size", "save_every", "width", "depth", "samples"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.save_every % REPORT_EVERY:
        raise UsageError(f"--save-every must be a multiple of {REPORT_EVERY}, got {config.save_every}")
    if any(budget < 2 for budget in config.evaluations):
        raise UsageError(f"--evaluations must be at least 2 each, got {config.evaluations}")
    if not config.weights:
        raise UsageError("--weights needs at least one guidance weight")


def _train(
    config: Config,
    program: Program,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    train: data.Images,
    test: data.Images,
    folder: pathlib.Path,
) -> training.TrainState | None:
    """Trains from the newest checkpoint, if there is one; None if it was stopped before the end."""
    init_key, step_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    recorded = json.loads((folder / "config.json").read_text())
    held_out = meshes.place(data.batches(test, batch_size=config.batch_size, seed=0, shuffle=False)[0], mesh)
    with (
        checkpoints.open(folder / "checkpoints", best="validation_loss", config=recorded) as store,
        training.stop_requested() as stop,
    ):
        restored = store.restore_latest(program.state)
        start, state = restored[:2] if restored else (0, program.init(init_key, sweep.values))
        source = data.batches(train, batch_size=config.batch_size, seed=config.seed)
        batches = (meshes.place(batch, mesh) for batch in data.prefetch(source, start))
        with reporting.log_metrics(folder, start) as log, reporting.progress(config.steps, start=start) as show:

            def report(taken: int, metrics: dict[str, np.ndarray]) -> None:
                log(taken, metrics)
                show(taken, loss=metrics["loss"])

            def save(taken: int, state: training.TrainState) -> None:
                loss = program.validate(state.ema, validation_key, held_out, sweep.values)
                metrics = {"validation_loss": jax.device_get(loss), "skipped": jax.device_get(state.skipped)}
                log(taken, metrics)
                store.save(taken, state, metrics)

            outcome = training.fit(
                state,
                lambda state, batch: program.step(state, step_key, batch, sweep.values),
                batches,
                steps=config.steps,
                every=REPORT_EVERY,
                report=report,
                save=save,
                save_every=config.save_every,
                stop=stop,
            )
    if outcome.reason == "diverged":
        bad = int(np.max(jax.device_get(outcome.state.last_skipped)))
        np.savez(folder / "bad_batch.npz", step=bad, **source[bad])
        raise UsageError(
            f"loss or gradient was not finite in too many steps, last in step {bad} (its batch is in "
            f"{folder / 'bad_batch.npz'}); the last good checkpoint is kept: try a smaller --hyper.lr"
        )
    if outcome.reason == "interrupted":
        print(f"stopped at step {int(np.max(outcome.state.step))} and saved; the same command goes on from there")
        return None
    return outcome.state


def _evaluate(
    config: Config,
    program: Program,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    state: training.TrainState,
    train: data.Images,
    test: data.Images,
    folder: pathlib.Path,
) -> None:
    """Samples the best member of the sweep and writes figures and the report."""
    metrics = reporting.read_metrics(folder)
    losses = np.atleast_1d(metrics["validation_loss"][1][-1])
    best = int(np.nanargmin(losses))
    params, sigma_data = state.ema, sweep.values["sigma_data"]
    if sweep.swept:
        params, sigma_data = jax.tree.map(lambda leaf: leaf[best], (params, sigma_data))

    def denoise(params: Any, x: Array, sigma: Array, label: Array) -> Array:
        return program.denoise(params, x, sigma, label, sigma_data)

    judge = quality.fit_judge(data.arrays(train), data.arrays(test))
    study = sampling.Study(denoise, params, train.shape, train.num_classes, mesh, jax.random.key(config.seed + 1))
    sheets, guided = sampling.by_weight(study, judge, config.weights, config.samples)
    solvers = sampling.by_solver(study, judge, config.evaluations, config.samples)
    members = [[label or "this run", float(loss)] for label, loss in zip(sweep.labels, losses, strict=True)]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    network = f"{config.model}, {parameters:,} parameters, {config.steps} steps of {config.batch_size} examples."
    table = reporting.table(["run", "validation loss"], members)
    sections = {
        "Training": "\n\n".join([network, table, _training_curves(folder, metrics, sweep)]),
        **sampling.report(folder, judge, sheets, guided, solvers),
    }
    reporting.write_report(folder, f"digits: {config.name}", sections)


def _training_curves(folder: pathlib.Path, metrics: dict, sweep: sweeps.Sweep) -> str:
    panels = []
    for name in ("loss", "validation_loss"):
        steps, values = metrics[name]
        columns = values.reshape(len(steps), -1).T
        labels = sweep.labels if sweep.swept else ("this run",)
        series = {label: (steps, column) for label, column in zip(labels, columns, strict=True)}
        panels.append(figures.Panel(series, "training step", name.replace("_", " "), log_y=True))
    path = figures.lines(folder / "figures" / "training.png", *panels)
    return reporting.picture(path, folder, "Loss in training, and of the moving average on held-out images")


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.digits", description=__doc__)

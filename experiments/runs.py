"""What every training script does: set up devices, compile a step on them, resume, train, save, stop when asked."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esscher.core import checkpoints, data, figures, meshes, reporting, sweeps, training
from esscher.core.errors import UsageError

__all__ = [
    "MAY_CHANGE",
    "REPORT_EVERY",
    "Hyper",
    "Program",
    "Settings",
    "Trained",
    "adamw",
    "averaged",
    "compile_program",
    "curves",
    "member",
    "start",
    "train",
]

REPORT_EVERY = 20

MAY_CHANGE = ("mesh", "distributed", "runs")
"""Settings that may differ when a run is continued."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every training script can be told."""

    name: str = "default"
    """Name of the run; its folder is runs/EXPERIMENT/NAME."""
    steps: int = 3000
    """Training steps."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    save_every: int = 500
    """Steps between checkpoints, a multiple of 20."""
    seed: int = 0
    """Seed of parameters, noise and data order."""
    mesh: str = ""
    """Devices by axis (sweep, data, fsdp, tensor), e.g. data=8 or sweep=4,data=2; all as data by default."""
    distributed: bool = False
    """Join the other hosts of a pod first; every host runs the same command."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs."""


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Float hyperparameters. Each takes one value, or several, which span a grid trained as one vmapped program."""

    lr: tuple[float, ...] = (2e-3,)
    """Peak learning rate of AdamW, reached after 5% of the steps and brought to zero by a cosine."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Decoupled weight decay."""
    clip: tuple[float, ...] = (1.0,)
    """Largest gradient norm."""
    ema_decay: tuple[float, ...] = (0.99,)
    """Decay of the parameters' moving average, if one is kept."""


def start(
    settings: Any, *, positive: Sequence[str] = (), signed: Sequence[str] = (), shares: Sequence[str] = ("ema_decay",)
) -> Mesh:
    """Checks the settings, joins the other hosts if asked to, and makes the mesh.

    Elsewhere than on Cloud TPU, GKE and Slurm, which JAX knows, hosts find each other by the environment variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Args:
      settings: with the fields of `Settings`, and perhaps `hyper`.
      positive: further fields that must be at least 1 unless absent.
      signed: hyperparameters that may be negative.
      shares: hyperparameters that are at most 1.

    Raises:
      UsageError: a setting out of range, a mesh that does not fit the devices, or hosts that are not found.
    """
    for name in ("steps", "batch_size", "save_every", *positive):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name, values in vars(getattr(settings, "hyper", Hyper())).items():
        largest = 1 if name in shares else math.inf
        if name not in signed and not all(0 <= value <= largest for value in values):
            allowed = "between 0 and 1" if name in shares else "at least 0"
            raise UsageError(f"--hyper.{name.replace('_', '-')} must be {allowed}, got {' '.join(map(str, values))}")
    reporting.check_name(settings.name)
    if settings.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {settings.seed}")
    if settings.save_every % REPORT_EVERY:
        raise UsageError(f"--save-every must be a multiple of {REPORT_EVERY}, got {settings.save_every}")
    if settings.distributed:
        _join_hosts()
    mesh = meshes.make(**meshes.parse(settings.mesh))
    shards = meshes.row_shards(mesh)
    if settings.batch_size % shards:
        raise UsageError(f"--batch-size {settings.batch_size} does not split over {shards} devices: take a multiple")
    return mesh


def _join_hosts() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name) for name in names)
    try:
        jax.distributed.initialize(address, count and int(count), index and int(index))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--distributed: {reason} Set {', '.join(names)} on every host, or drop the flag") from error


# --- the program ------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """The functions of a run, compiled on first use, and the layout of its state.

    `constants` are arrays that training reads and does not change, such as the weights under an adapter; `pretrained`
    are those that it starts from.
    """

    init: Callable[..., training.TrainState]  # (key, hyper, *pretrained) -> state
    step: Callable[..., tuple[training.TrainState, dict[str, Array]]]  # (state, key, batch, hyper, *constants)
    validate: Callable[..., dict[str, Array]]  # (params, key, batch, hyper, *constants) -> metrics
    state: training.TrainState  # shapes, types and shardings


def compile_program(
    initialize: Callable[[Array], Any],
    axes: Any,
    loss: Callable[..., tuple[Array, dict[str, Array]]],
    validate: Callable[..., dict[str, Array]],
    optimizer: Callable[[dict[str, Array]], optax.GradientTransformation],
    mesh: Mesh,
    sweep: sweeps.Sweep,
    constants: Sequence[Any] = (),
    pretrained: Sequence[Any] = (),
    *,
    average: bool = True,
    own_batches: bool = False,
    repeats: int = 1,
) -> Program:
    """Functions of one run as programs on a mesh, vmapped over the members of a sweep; nothing is computed yet.

    Args:
      initialize: `(key, *pretrained) -> params`.
      axes: logical names of the parameters' axes.
      loss: `(params, key, batch, hyper, *constants) -> (scalar, metrics)`.
      validate: `(params, key, batch, hyper, *constants) -> metrics`, among them `validation_loss`.
      optimizer: `hyper -> GradientTransformation`.
      mesh: the mesh.
      sweep: the members.
      constants: as they will be given, for their shardings.
      pretrained: likewise.
      average: whether to keep a moving average of the parameters; without it the parameters themselves are validated.
      own_batches: whether the members of a sweep learn from different batches, given with an axis of members in front.
      repeats: updates that the optimiser makes on each batch, which count as one step.

    Returns:
      The program; its step donates the state.
    """

    def init(key: Array, hyper: dict[str, Array], *pretrained: Any) -> training.TrainState:
        return training.init(initialize(key, *pretrained), optimizer(hyper), average=average)

    step = _repeat(training.make_step(loss, optimizer), repeats)
    key, member = jax.random.key(0), {name: value.reshape(-1)[0] for name, value in sweep.values.items()}
    shapes = jax.eval_shape(initialize, key, *pretrained)
    specs = meshes.parameter_specs(axes, shapes, mesh)
    specs = meshes.like_parameters(jax.eval_shape(init, key, member, *pretrained), shapes, specs)
    shared, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, meshes.BATCH)
    layout = meshes.shardings(mesh, specs, swept=sweep.swept)
    # Every process reads the counters, so they are whole on every device, in a sweep too; and so are the metrics.
    layout = layout._replace(step=shared, skipped=shared, last_skipped=shared)
    members = meshes.shardings(mesh, PartitionSpec(), swept=sweep.swept)
    learned = meshes.shardings(mesh, meshes.BATCH, swept=sweep.swept and own_batches)
    kept = tuple(jax.tree.map(lambda leaf: leaf.sharding, constant) for constant in constants)
    whole = (None,) * len(constants)
    lift = functools.partial(sweeps.lift, sweep=sweep)
    lifted_init = lift(init, in_axes=(None, 0, *(None,) * len(pretrained)))
    return Program(
        init=jax.jit(lifted_init, out_shardings=layout),
        step=jax.jit(
            lift(step, in_axes=(0, None, 0 if own_batches else None, 0, *whole)),
            in_shardings=(layout, shared, learned, members, *kept),
            out_shardings=(layout, shared),
            donate_argnums=0,
        ),
        validate=jax.jit(
            lift(validate, in_axes=(0, None, None, 0, *whole)),
            in_shardings=(layout.ema if average else layout.params, shared, rows, members, *kept),
            out_shardings=shared,
        ),
        state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lifted_init, key, sweep.values, *pretrained),
            layout,
        ),
    )


def _repeat(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A step that takes several on the same batch and counts as one; with the metrics of the last."""

    def repeated(state: training.TrainState, *arguments: Any) -> tuple[training.TrainState, dict[str, Array]]:
        def again(state: training.TrainState, _: None) -> tuple[training.TrainState, dict[str, Array]]:
            new, metrics = step(state, *arguments)
            return new._replace(step=state.step), metrics

        new, metrics = jax.lax.scan(again, state, length=times)
        return new._replace(step=state.step + 1), jax.tree.map(lambda values: values[-1], metrics)

    return step if times == 1 else repeated


def adamw(steps: int, hyper: dict[str, Array]) -> optax.GradientTransformation:
    """AdamW with the hyperparameters `lr`, `weight_decay` and `clip` (of the gradient's norm).

    The rate rises for 5% of the steps and falls to zero by a cosine.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    adam = optax.adamw(lambda count: hyper["lr"] * shape(count), weight_decay=hyper["weight_decay"])
    return optax.chain(optax.clip_by_global_norm(hyper["clip"]), adam)


# --- the run ----------------------------------------------------------------------------------------------------------


def averaged(state: training.TrainState) -> Any:
    """The moving average of the parameters, or themselves where there is none."""
    return state.params if state.ema is None else state.ema


def member(state: training.TrainState, sweep: sweeps.Sweep, index: int) -> Any:
    """The averaged parameters of one member of a sweep; of a single run its own."""
    return jax.tree.map(lambda leaf: leaf[index], averaged(state)) if sweep.swept else averaged(state)


class Trained(NamedTuple):
    """A finished run."""

    state: training.TrainState
    metrics: dict[str, np.ndarray]  # of the last validation, [] or [S]


def train(
    settings: Any,
    program: Program,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    source: Any,
    held_out: Any,
    folder: pathlib.Path,
    constants: Sequence[Any] = (),
    pretrained: Sequence[Any] = (),
) -> Trained | None:
    """Trains from the newest checkpoint, if there is one, and validates at every checkpoint.

    Args:
      settings: with the fields of `Settings`.
      program: see `compile_program`.
      mesh: the mesh.
      sweep: the members.
      source: `source[step]` is the batch of a step, as `data.batches` makes it.
      held_out: the batch that validates.
      folder: the run's.
      constants: passed on to the program.
      pretrained: likewise, if there is no checkpoint; afterwards those that are no constants are deleted, for their
        memory.

    Returns:
      The last state and validation; None if the run was stopped before its end.

    Raises:
      UsageError: the run diverged; its checkpoints from before are kept and the bad batch written to the folder.
    """
    init_key, step_key, validation_key = jax.random.split(jax.random.key(settings.seed), 3)
    held_out = meshes.place(held_out, mesh)
    with (
        checkpoints.open(folder / "checkpoints", best="validation_loss", config=reporting.plain(settings)) as store,
        training.stop_requested() as stop,
    ):
        restored = store.restore_latest(program.state)
        taken, state = restored[:2] if restored else (0, program.init(init_key, sweep.values, *pretrained))
        _delete(pretrained, constants)
        last = dict(restored.metrics) if restored else {}
        batches = (meshes.place(batch, mesh) for batch in data.prefetch(source, taken))
        with reporting.log_metrics(folder, taken) as log, reporting.progress(settings.steps, start=taken) as show:

            def report(taken: int, metrics: dict[str, np.ndarray]) -> None:
                log(taken, metrics)
                show(taken, loss=metrics["loss"])

            def save(taken: int, state: training.TrainState) -> None:
                if taken % settings.save_every and taken < settings.steps:
                    return store.save(taken, state)  # stopped on the way: what is logged must not depend on that
                values = program.validate(averaged(state), validation_key, held_out, sweep.values, *constants)
                last.update(jax.device_get(values | {"skipped": state.skipped}))
                log(taken, last)
                store.save(taken, state, last)

            outcome = training.fit(
                state,
                lambda state, batch: program.step(state, step_key, batch, sweep.values, *constants),
                batches,
                steps=settings.steps,
                every=REPORT_EVERY,
                report=report,
                save=save,
                save_every=settings.save_every,
                stop=stop,
            )
    _raise_if_diverged(outcome, source, folder)
    if outcome.reason == "interrupted":
        if reporting.writes():
            print(f"stopped at step {int(np.max(outcome.state.step))} and saved; the same command goes on from there")
        return None
    return Trained(outcome.state, {name: np.asarray(value) for name, value in last.items()})


def _delete(trees: Any, kept: Any) -> None:
    ids = {id(leaf) for leaf in jax.tree.leaves(kept)}
    for leaf in jax.tree.leaves(trees):
        if id(leaf) not in ids:
            leaf.delete()


def _raise_if_diverged(outcome: training.Outcome, source: Any, folder: pathlib.Path) -> None:
    if outcome.reason != "diverged":
        return
    bad = int(np.max(jax.device_get(outcome.state.last_skipped)))
    if reporting.writes():
        np.savez(folder / "bad_batch.npz", step=bad, **source[bad])
    raise UsageError(
        f"loss or gradient was not finite in too many steps, last in step {bad} (its batch is in "
        f"{folder / 'bad_batch.npz'}); checkpoints are from before: try a smaller --hyper.lr under another --name"
    )


def curves(
    folder: pathlib.Path, sweep: sweeps.Sweep, names: Sequence[str], caption: str, file: str = "training.png"
) -> str:
    """A figure with a panel for each metric and a line for each member, and the text that shows it in the report."""
    metrics, panels = reporting.read_metrics(folder), []
    for name in names:
        steps, values = metrics.get(name, ([], np.empty(0)))  # a log that somebody has deleted
        columns = values.reshape(len(steps), -1).T
        labels = sweep.labels if sweep.swept else ("this run",)
        series = {label: (steps, column) for label, column in zip(labels, columns, strict=True)}
        panels.append(figures.Panel(series, "training step", name.replace("_", " "), log_y="loss" in name))
    path = figures.lines(folder / "figures" / file, *panels)
    return reporting.picture(path, folder, caption)

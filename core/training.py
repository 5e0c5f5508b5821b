"""The training loop: a pure step, and the loop around it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from esscher.core.arrays import at_least_float32

__all__ = ["Outcome", "TrainState", "fit", "init", "make_step", "stop_requested"]


class TrainState(NamedTuple):
    """Everything that a step changes, and all that a checkpoint must hold."""

    step: Array  # [] steps taken, the skipped ones included
    params: Any
    ema: Any  # moving average of the parameters; None if there is none
    opt_state: Any
    skipped: Array  # [] steps whose loss or gradient was not finite
    last_skipped: Array  # [] number of the last such step, -1 if none


def init(params: Any, optimizer: optax.GradientTransformation, *, average: bool = True) -> TrainState:
    """The state before the first step; the moving average, if wanted, starts at a copy of the parameters.

    It is kept in float32 at least: its small steps would be lost in bfloat16.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda leaf: at_least_float32(leaf).copy(), params) if average else None,
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        last_skipped=jnp.full((), -1, jnp.int32),
    )


def make_step(
    loss: Callable[..., tuple[Array, dict[str, Array]]],
    optimizer: Callable[[dict[str, Array]], optax.GradientTransformation],
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    r"""Builds the pure `step(state, key, batch, hyper, *constants) -> (state, metrics)`.

    The parameters follow the optimiser; their moving average, if the state has one, follows them with the decay
    `min(d, (1 + n) / (10 + n))` after `n` steps, where `d = hyper["ema_decay"]`. A step whose loss, gradient norm or
    update is not finite changes nothing but the counters.

    Args:
      loss: `(params, key, batch, hyper, *constants) -> (scalar, metrics)`; the key is the run's, folded with the step's
        number. Constants are whatever else it reads, such as the weights under an adapter.
      optimizer: `hyper -> GradientTransformation`; built while tracing, so that hyperparameters may be tracers.

    Returns:
      The step. Its metrics are the loss's own, `loss` and `grad_norm`, all scalars.
    """

    def step(
        state: TrainState, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        differentiate = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradient = differentiate(state.params, key, batch, hyper, *constants)
        grad_norm = _norm(gradient)
        updates, opt_state = optimizer(hyper).update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            decay = jnp.minimum(hyper["ema_decay"], (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, state.ema, 1 - decay)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(_norm(updates))
        kept = jax.tree.map(
            lambda new, old: jnp.where(good, new.astype(old.dtype), old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        skipped = state.skipped + jnp.where(good, 0, 1)
        last_skipped = jnp.where(good, state.last_skipped, state.step)
        return TrainState(state.step + 1, *kept, skipped, last_skipped), metrics | {
            "loss": value,
            "grad_norm": grad_norm,
        }

    return step


def _norm(tree: Any) -> Array:
    """Of all leaves together, in float32 at least: in float16 the squares overflow."""
    return optax.tree.norm(jax.tree.map(at_least_float32, tree))


class Outcome(NamedTuple):
    """How a run of `fit` ended."""

    state: TrainState
    reason: str  # "done", "interrupted" or "diverged"


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
    batches: Iterator[Any],
    *,
    steps: int,
    every: int,
    report: Callable[[int, dict[str, np.ndarray]], None],
    save: Callable[[int, TrainState], None],
    save_every: int,
    stop: Callable[[], bool] = lambda: False,
    skip_limit: int = 100,
) -> Outcome:
    """Takes steps until the state counts `steps`, and meets the host only once in `every` of them.

    Args:
      state: where to start; its step counter says how many steps have been taken.
      step: compiled, `(state, batch) -> (state, metrics)`; may donate the state.
      batches: the batches from the state's step on.
      steps: where to end.
      every: steps between two reports; a request to stop is heard at a report.
      report: gets the number of steps taken and the metrics since the last report, averaged over the steps where they
        were finite (`[]`, or `[S]` in a sweep).
      save: gets the number of steps taken and the state; called after every `save_every` steps and at the end, but not
        while steps fail, so that good checkpoints are not pushed out.
      save_every: steps between two checkpoints, a multiple of `every`.
      stop: asked at each report whether to save and end early.
      skip_limit: steps fail while every member of the run skips most of those between two reports; the run has
        diverged when more than so many have failed in a row, or the last `every`.

    Returns:
      The last state and why the loop ended.

    Raises:
      ValueError: `save_every` is no multiple of `every`.
    """
    if save_every % every:
        raise ValueError(f"save_every must be a multiple of every={every}, got {save_every}")
    taken, window, failed = int(np.max(state.step)), [], 0
    skipped = jax.device_get(state.skipped)
    while taken < steps:
        state, metrics = step(state, next(batches))
        window.append(metrics)
        taken += 1
        if taken % every and taken < steps:
            continue
        report(taken, jax.tree.map(_average, *window))
        before, skipped = skipped, jax.device_get(state.skipped)
        failed = failed + len(window) if 2 * np.min(skipped - before) > len(window) else 0
        if failed > (skip_limit if taken < steps else min(every, steps) - 1):
            return Outcome(state, "diverged")
        window, stopping = [], stop()
        if stopping or taken == steps or (failed == 0 and taken % save_every == 0):
            save(taken, state)
        if stopping:
            return Outcome(state, "interrupted")
    return Outcome(state, "done")


def _average(*values: Array) -> np.ndarray:
    """Over the first axis of what is finite; NaN where nothing is. A step that is skipped does not hide the others."""
    rows = np.stack(jax.device_get(values)).astype(np.float64)
    finite = np.isfinite(rows)
    count = finite.sum(0)
    return np.where(count, np.where(finite, rows, 0).sum(0) / np.maximum(count, 1), np.nan)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and the first Ctrl-C only raise a flag; yields the function that reads it.

    With many processes the flag is up if any process's is, so that all of them stop at the same step; all must ask
    equally often. Only the main thread hears signals: opened in another one, the process's own flag is never up.
    """
    requested = threading.Event()

    def handle(number: int, frame: Any) -> None:
        requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it

    def read() -> bool:
        if jax.process_count() == 1:
            return requested.is_set()
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(requested.is_set()))))

    heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    old = {number: signal.signal(number, handle) for number in heard}
    try:
        yield read
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

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
    """The state before the first step; the moving average, if wanted, starts at a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if average else None,
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
    `min(d, (1 + n) / (10 + n))` after `n` steps, where `d = hyper["ema_decay"]`. A step whose loss or gradient norm is
    not finite changes nothing but the counters.

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
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer(hyper).update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            decay = jnp.minimum(hyper["ema_decay"], (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, state.ema, 1 - decay)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
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
      report: gets the number of steps taken and the metrics averaged since the last report (`[]`, or `[S]` in a sweep).
      save: gets the number of steps taken and the state; called after every `save_every` steps and at the end, but not
        when the run diverged.
      save_every: steps between two checkpoints, a multiple of `every`.
      stop: asked at each report whether to save and end early.
      skip_limit: the run has diverged when every member of it has skipped more steps than this.

    Returns:
      The last state and why the loop ended.

    Raises:
      ValueError: `save_every` is no multiple of `every`.
    """
    if save_every % every:
        raise ValueError(f"save_every must be a multiple of every={every}, got {save_every}")
    taken, window = int(np.max(state.step)), []
    while taken < steps:
        state, metrics = step(state, next(batches))
        window.append(metrics)
        taken += 1
        if taken % every and taken < steps:
            continue
        report(taken, jax.tree.map(lambda *values: np.mean(jax.device_get(values), axis=0), *window))
        window = []
        if np.min(jax.device_get(state.skipped)) > skip_limit:
            return Outcome(state, "diverged")
        stopping = stop() and taken < steps
        if stopping or taken % save_every == 0 or taken == steps:
            save(taken, state)
        if stopping:
            return Outcome(state, "interrupted")
    return Outcome(state, "done")


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and the first Ctrl-C only raise a flag; yields the function that reads it.

    With many processes the flag is up if any process's is, so that all of them stop at the same step; all must ask
    equally often.
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

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield read
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

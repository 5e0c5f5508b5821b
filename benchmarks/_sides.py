"""Sides of a comparison, each in a process of its own, that run in turns so that all see the same machine."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["measure"]

WARM_UP = 2


def measure(
    sides: Mapping[str, tuple], jobs: Sequence[tuple[str, Any]], rounds: int
) -> tuple[dict[tuple[str, Any], list[float]], dict[tuple[str, Any], Any]]:
    """Seconds of every round of every job, and its last result.

    Two thread pools in one process would fight for the cores, hence the processes.

    Args:
      sides: name -> `(make, *arguments)`; `make(*arguments)`, called in the side's process, gives functions by name.
      jobs: side and name of the function, in the order of a round.
      rounds: repetitions, beyond those that warm up.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for side, (make, *arguments) in sides.items():
        pipes[side], end = spawn.Pipe()
        spawn.Process(target=_work, args=(end, make, *arguments), daemon=True).start()
    times: dict[tuple[str, Any], list[float]] = {job: [] for job in jobs}
    results = {}
    for round_number in range(rounds + WARM_UP):
        for side, name in jobs:
            time.sleep(0.25)  # until the other side's threads have stopped spinning
            pipes[side].send(name)
            seconds, results[side, name] = pipes[side].recv()
            if round_number >= WARM_UP:
                times[side, name].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)
    return times, results


def _work(pipe: Any, make: Callable, *arguments: Any) -> None:
    functions = make(*arguments)
    for name in iter(pipe.recv, None):
        began = time.perf_counter()
        result = functions[name]()
        pipe.send((time.perf_counter() - began, result))

"""Sides of a comparison, each in a process of its own, that run in turns so that all see the same machine."""

import ctypes
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["measure", "peak_memory"]

WARM_UP = 2


def measure(
    sides: Mapping[str, tuple], jobs: Sequence[tuple[str, Any]], rounds: int, once: Sequence[tuple[str, Any]] = ()
) -> tuple[dict[tuple[str, Any], list[float]], dict[tuple[str, Any], Any]]:
    """Seconds of every round of every job, and the last result of each.

    Two thread pools in one process would fight for the cores, hence the processes.

    Args:
      sides: name -> `(make, *arguments)`; `make(*arguments)`, called in the side's process, gives functions by name.
      jobs: side and name of the function, in the order of a round.
      rounds: repetitions, beyond those that warm up.
      once: jobs to be done once, after the rounds.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for side, (make, *arguments) in sides.items():
        pipes[side], end = spawn.Pipe()
        spawn.Process(target=_work, args=(end, make, *arguments), daemon=True).start()

    def do(side: str, name: Any) -> tuple[float, Any]:
        pipes[side].send(name)
        return pipes[side].recv()

    times: dict[tuple[str, Any], list[float]] = {job: [] for job in jobs}
    results = {}
    for round_number in range(rounds + WARM_UP):
        for side, name in jobs:
            time.sleep(0.25)  # until the other side's threads have stopped spinning
            seconds, results[side, name] = do(side, name)
            if round_number >= WARM_UP:
                times[side, name].append(seconds)
    for side, name in once:
        _, results[side, name] = do(side, name)
    for pipe in pipes.values():
        pipe.send(None)
    return times, results


def _work(pipe: Any, make: Callable, *arguments: Any) -> None:
    functions = make(*arguments)
    for name in iter(pipe.recv, None):
        began = time.perf_counter()
        result = functions[name]()
        pipe.send((time.perf_counter() - began, result))


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes by which the process grows, at its highest, above what it had when the call began. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # else the call would take again what it freed last time, and not grow
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest until now is forgotten
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

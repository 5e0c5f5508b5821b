"""The scoreboard: every sampler of the tilt on the same exact problems, divergence to the tilt against model calls.

Mixtures of Gaussians in 1, 2, 16 and 64 dimensions under linear, quadratic and half-space rewards, and strings under
masked diffusion. Each sampler is told how many calls of the model it may make for a sample; the calls that it makes are
counted as it runs. What it returns is compared with the exact tilt, by KL divergence on the line and of strings, by
sliced Wasserstein and energy distance elsewhere, beside the noise floor: how far apart exact samples are. `--sampler
my_module.my_function` ranks one of your own.
"""

import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core import figures, reporting
from esscher.core.errors import UsageError
from esscher.experiments import cli, named, tilt_problems, tilt_samplers
from esscher.experiments.tilt_problems import PROBLEMS, Problem

__all__ = [
    "Compiled",
    "Config",
    "Measured",
    "Row",
    "check",
    "compile_sampler",
    "floor",
    "main",
    "mean_ratio",
    "measure",
    "race",
]

FULL = {"problems": PROBLEMS, "calls": (16, 64, 256), "samples": 2000, "seeds": 4}
QUICK = {"problems": ("1-D", "16-D", "strings"), "calls": (16, 64), "samples": 1000, "seeds": 2}
EXACT_SETS = 8  # that the floor is the mean distance of


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the scoreboard."""

    name: str = "default"
    """Name of the run; its folder is runs/tilt-bench/NAME."""
    quick: bool = False
    """Three minutes on two cores: fewer problems, budgets, samples and seeds, where these are not given."""
    problems: tuple[str, ...] = ()
    """Problems, such as `1-D linear`, or all of a space, such as `16-D` or `strings`; all by default."""
    methods: tuple[str, ...] = ()
    """Samplers of the library to run; all by default."""
    sampler: tuple[str, ...] = ()
    """Dotted paths of functions `(key, task, n, calls) -> samples` of your own, see experiments/tilt_samplers.py."""
    calls: tuple[int, ...] = ()
    """Budgets of model calls for a sample; 16, 64 and 256 by default."""
    samples: int | None = None
    """Samples that are compared with the tilt; 2000 by default."""
    seeds: int | None = None
    """Runs with other random numbers; 4 by default."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs."""


class Measured(NamedTuple):
    """What runs of one sampler at one budget gave."""

    calls: float  # of the model for a sample, counted
    seconds: float  # median of the runs
    found: dict[str, np.ndarray]  # [seeds] of each divergence


class Row(NamedTuple):
    """A line of the table."""

    space: str
    problem: str
    method: str
    budget: int
    measured: Measured
    floor: dict[str, float]
    ranked: str

    @property
    def ratio(self) -> float:
        """The divergence that the problem is ranked by, in units of its floor."""
        return float(self.measured.found[self.ranked].mean() / self.floor[self.ranked])


# --- one sampler ------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """A sampler with its budget, for all problems of one space."""

    run: Callable[[Array, Any, Array], Array]  # (key, parameters, counting) -> samples
    asked: np.ndarray  # [] how many states the model was asked about, while `counting` was true


def compile_sampler(problem: Problem, sampler: Callable[..., Array], n: int, calls: int) -> Compiled:
    """Compiles a sampler so that one program can be counted and timed.

    Calls of the model are counted by callbacks from the running program: loops, branches and maps as they are taken,
    and calls of which nothing is used, which are never made, not at all. Where `counting` is false nothing leaves the
    program.

    Raises:
      ValueError: as `check`.
    """
    asked = np.zeros((), np.int64)

    def counted(counting: Array, model: Callable) -> Callable:
        def ask(x: Array, t: Array) -> Any:
            def add(_: Array) -> np.ndarray:
                asked[()] += len(x)
                return np.zeros((), np.int32)

            zero = jax.ShapeDtypeStruct((), jnp.int32)
            call = lambda x: jax.pure_callback(add, zero, x, vmap_method="sequential")  # noqa: E731
            zero = jax.lax.cond(counting, call, lambda x: jnp.int32(0), jax.lax.stop_gradient(x.ravel()[0]))
            return model(x + zero.astype(x.dtype), t)

        return ask

    def run(key: Array, parameters: Any, counting: Array) -> Array:
        return sampler(key, problem.task(parameters, functools.partial(counted, counting)), n, calls)

    traced = jax.jit(run).trace(jax.random.key(0), problem.parameters, jnp.asarray(True))
    check(problem, traced.out_info, n)
    return Compiled(traced.lower().compile(), asked)


def check(problem: Problem, returned: Any, n: int) -> None:
    """Raises a ValueError unless a sampler returned samples of the problem's shape and type."""
    wanted, name = (n, *problem.sample.shape), type(returned).__name__
    if getattr(returned, "shape", None) != wanted or returned.dtype != problem.sample.dtype:
        got = f"{returned.dtype}{list(returned.shape)}" if hasattr(returned, "shape") else name
        raise ValueError(f"must return {problem.sample.dtype}{list(wanted)} for {problem.space}, got {got}")


def measure(problem: Problem, compiled: Compiled, exact: Sequence[Array]) -> Measured:
    """Runs a sampler once for each exact set, after a run that counts its calls of the model."""
    compiled.asked[()] = 0
    jax.block_until_ready(compiled.run(jax.random.key(0), problem.parameters, jnp.asarray(True)))
    calls, seconds, found = float(compiled.asked) / len(exact[0]), [], []
    for seed, other in enumerate(exact):
        began = time.perf_counter()
        x = jax.block_until_ready(compiled.run(jax.random.key(1 + seed), problem.parameters, jnp.asarray(False)))
        seconds.append(time.perf_counter() - began)
        found.append(problem.measure(x, other))
    return Measured(calls, float(np.median(seconds)), _stacked(found))


def floor(problem: Problem, exact: Sequence[Array]) -> dict[str, float]:
    """How far apart exact sets are, each from the next, on average."""
    pairs = zip(exact, [*exact[1:], exact[0]], strict=True)
    return {name: float(values.mean()) for name, values in _stacked([problem.measure(*p) for p in pairs]).items()}


def _stacked(found: Sequence[dict[str, Array]]) -> dict[str, np.ndarray]:
    return {name: np.array([float(f[name]) for f in found]) for name in found[0]}


# --- all of them ------------------------------------------------------------------------------------------------------


def race(
    names: Sequence[str], samplers: dict[str, dict[str, Callable]], calls: Sequence[int], n: int, seeds: int
) -> list[Row]:
    """Every sampler of each space at every budget on every problem; one program for all problems of a space.

    Args:
      names: of `PROBLEMS`.
      samplers: of each space, by name.
      calls: budgets.
      n: samples.
      seeds: runs of each.
    """
    rows, made = [], {name: tilt_problems.make(name) for name in names}
    spaces = {space: [name for name in made if made[name].space == space] for space in samplers}
    programs = len(calls) * sum(len(samplers[space]) for space in spaces)
    with reporting.progress(programs, label="sampling") as show:
        done = 0
        for space, members in spaces.items():
            exact = {name: _exact_sets(made[name], n, max(seeds, EXACT_SETS)) for name in members}
            floors = {name: floor(made[name], exact[name]) for name in members}
            for method, sampler in samplers[space].items():
                for budget in calls:
                    compiled = compile_sampler(made[members[0]], sampler, n, budget)
                    for name in members:
                        found = measure(made[name], compiled, exact[name][:seeds])
                        rows.append(Row(space, name, method, budget, found, floors[name], made[name].ranked))
                    done += 1
                    show(done)
    return rows


def _exact_sets(problem: Problem, n: int, count: int) -> list[Array]:
    return [problem.exact(key, n) for key in jax.random.split(jax.random.key(99), count)]


def _settings(config: Config) -> dict[str, Any]:
    """Problems, budgets, samples and seeds, as given or by default.

    Raises:
      UsageError: some that do not exist or are too small.
    """
    for name, least in {"samples": 2 * tilt_problems.BINS, "seeds": 1}.items():
        given = getattr(config, name)
        if given is not None and given < least:
            raise UsageError(f"--{name} must be at least {least}, got {given}")
    settings = {name: getattr(config, name) or value for name, value in (QUICK if config.quick else FULL).items()}
    least = 2 * tilt_samplers.CANDIDATES
    if min(settings["calls"]) < least:
        raise UsageError(f"--calls must be at least {least} each, got {settings['calls']}")
    chosen = [name for name in PROBLEMS if {name, name.split(" ")[0]} & set(settings["problems"])]
    spaces = dict.fromkeys(name.split(" ")[0] for name in PROBLEMS)
    if unknown := sorted(set(settings["problems"]) - {*PROBLEMS, *spaces}):
        raise UsageError(f"--problems: no {', '.join(unknown)}; there are {', '.join((*spaces, *PROBLEMS))}")
    return settings | {"problems": chosen}


def _samplers(config: Config, problems: Sequence[str]) -> dict[str, dict[str, Callable]]:
    """Samplers of each space that has problems, by name; those of the user last, by path where their name is taken.

    Raises:
      UsageError: some that do not exist, or of the user's that do not run on these problems.
    """
    known = tilt_samplers.VECTORS | tilt_samplers.STRINGS
    if unknown := sorted(set(config.methods) - known.keys()):
        raise UsageError(f"--methods: no {', '.join(unknown)}; there are {', '.join(known)}")
    found: dict[str, dict[str, Callable]] = {}
    for name in problems:
        table = tilt_samplers.STRINGS if name.startswith("strings") else tilt_samplers.VECTORS
        found[name.split(" ")[0]] = {method: table[method] for method in config.methods or table if method in table}
    bare = {path: path.rpartition(".")[2] for path in config.sampler}
    taken = [*known, *bare.values()]
    for path, name in bare.items():
        function = named.find("--sampler", path, tilt_samplers.__name__)
        for space in found:
            _try(path, function, tilt_problems.make(next(name for name in problems if name.startswith(space))))
            found[space][name if taken.count(name) == 1 else path] = function
    found = {space: table for space, table in found.items() if table}
    if not found:
        raise UsageError(f"--methods: none of {', '.join(config.methods)} runs on {', '.join(problems)}")
    return found


def _try(path: str, function: Callable, problem: Problem) -> None:
    """Traces a sampler of the user's, so that what is wrong with it is said before anything runs."""
    few = 2 * tilt_samplers.CANDIDATES
    task = problem.task(problem.parameters, lambda model: model)
    try:
        returned = jax.eval_shape(lambda key: function(key, task, few, few), jax.random.key(0))
    except Exception as error:  # whatever it is that the user's code raises
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise UsageError(f"--sampler {path}: {said}") from error
    try:
        check(problem, returned, few)
    except ValueError as error:
        raise UsageError(f"--sampler {path}: {error}") from error


def main(config: Config) -> None:
    """Runs the samplers and writes table and figures."""
    settings = _settings(config)
    samplers = _samplers(config, settings["problems"])
    reporting.check_name(config.name)
    folder = reporting.open_run(
        config, experiment="tilt-bench", name=config.name, root=config.runs, may_change=("runs",)
    )
    began = time.perf_counter()
    rows = race(settings["problems"], samplers, settings["calls"], settings["samples"], settings["seeds"])
    _write_tables(folder, rows)
    sections = _report(folder, settings, rows, time.perf_counter() - began)
    reporting.write_report(folder, f"tilt bench: {config.name}", sections)
    reporting.print_results(folder)


# --- the report -------------------------------------------------------------------------------------------------------


def _lines(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """All that was measured, a line for each sampler, problem and budget."""
    divergences = list(dict.fromkeys(name for row in rows for name in row.floor))
    header = ["problem", "sampler", "budget", "calls", "seconds", "ratio to floor"]
    for name in divergences:
        header += [name, f"{name} error", f"{name} floor"]
    lines = []
    for row in rows:
        line = [row.problem, row.method, row.budget, row.measured.calls, row.measured.seconds, row.ratio]
        for name in divergences:
            if name not in row.floor:
                line += ["", "", ""]
                continue
            values = row.measured.found[name]
            error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else ""
            line += [float(values.mean()), error, row.floor[name]]
        lines.append(line)
    return header, lines


def _write_tables(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    header, lines = _lines(rows)
    if reporting.writes():
        with open(folder / "table.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
        (folder / "table.md").write_text(reporting.table(header, lines) + "\n")


def mean_ratio(rows: Sequence[Row]) -> float:
    """Geometric mean over problems of the divergence in units of its floor."""
    return float(np.exp(np.mean(np.log([row.ratio for row in rows]))))


def _report(folder: pathlib.Path, settings: dict[str, Any], rows: list[Row], seconds: float) -> dict[str, str]:
    text = (
        f"{settings['samples']} samples of each sampler, {settings['seeds']} seeds; {seconds:.0f} s in all. Numbers "
        "are divergences in units of their noise floor, which is that of as many exact samples: 1 cannot be told from "
        "the tilt, and nan says that samples are not finite, or strings not of its tokens. It is KL(samples, tilt) on "
        "the line (in bins that all hold as much of the tilt) and of strings, the energy distance elsewhere; both grow "
        "as the square of an error. The mean is geometric, over problems. Calls are those of the model for a sample, "
        "counted as the program ran; gradients through the model are not counted, but they are timed. Tables are at "
        "the largest budget; `table.csv` and `table.md` have all budgets, errors, floors, and the sliced Wasserstein "
        "distance."
    )
    sections = {"Result": "\n\n".join([text, *_pictures(folder, rows)])}
    for space in dict.fromkeys(row.space for row in rows):
        last = [row for row in rows if row.space == space and row.budget == max(settings["calls"])]
        problems = list(dict.fromkeys(row.problem for row in last))
        table = []
        for method in dict.fromkeys(row.method for row in last):
            own = [row for row in last if row.method == method]
            table.append([method, *(row.ratio for row in own), mean_ratio(own), *_cost(own)])
        table.sort(key=lambda line: (np.isnan(line[-3]), line[-3]))
        header = ["sampler", *problems, "mean", "calls", "seconds"]
        sections[space] = reporting.table(header, table)
    return sections


def _cost(rows: Sequence[Row]) -> tuple[float, float]:
    """Calls and seconds, the mean over problems."""
    return tuple(float(np.mean([getattr(row.measured, name) for row in rows])) for name in ("calls", "seconds"))


def _pictures(folder: pathlib.Path, rows: Sequence[Row]) -> list[str]:
    """Mean ratio against model calls, and against time: a panel for each space."""
    pictures = []
    for index, (file, label) in enumerate((("calls", "model calls for a sample"), ("seconds", "seconds"))):
        panels = []
        for space in dict.fromkeys(row.space for row in rows):
            series = {}
            for method in dict.fromkeys(row.method for row in rows if row.space == space):
                own = [row for row in rows if (row.space, row.method) == (space, method)]
                budgets = [[row for row in own if row.budget == budget] for budget in sorted({r.budget for r in own})]
                points = [(_cost(group)[index], mean_ratio(group)) for group in budgets]
                points = [point for point in points if all(value > 0 for value in point)]  # as the axes are, no nan
                if points:
                    series[method] = tuple(map(list, zip(*points, strict=True)))
            panel = figures.Panel(series, label, f"divergence / floor, {space}", log_x=True, log_y=True)
            panels += [panel._replace(references={"exact samples": 1.0})] if series else []
        if panels:
            path = figures.lines(folder / "figures" / f"{file}.png", *panels)
            pictures.append(reporting.picture(path, folder, f"Divergence from the tilt against {label}"))
    return pictures


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.tilt_bench", description=__doc__)

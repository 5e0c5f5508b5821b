"""What a run leaves behind: its folder, metrics, progress on the terminal, and a report.

Only process 0 writes; the others may make the same calls.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from esscher.core.errors import UsageError

__all__ = [
    "check_name",
    "log_metrics",
    "open_run",
    "picture",
    "plain",
    "print_results",
    "progress",
    "read_metrics",
    "table",
    "write_report",
    "writes",
]


def writes() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def _write_text(path: pathlib.Path, text: str) -> None:
    """Whole or not at all: a killed process leaves the old file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


# --- the run's folder -------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raises a UsageError unless a run's name is a plain file name."""
    if not re.fullmatch(r"\w[\w.,=+-]*", name):
        raise UsageError(f"the run's name {name!r} must be made of letters, digits and . , = + - _")


def open_run(
    config: Any,
    *,
    experiment: str,
    name: str,
    root: str | os.PathLike = "runs",
    may_change: Collection[str] = (),
) -> pathlib.Path:
    """Makes, or returns to, the folder `root/experiment/name` with `config.json` and `figures/` in it.

    The folder is this process's for as long as it lives.

    Args:
      config: a dataclass instance or a mapping, nested if you like; what JSON cannot hold is stored as text.
      experiment: name of the experiment.
      name: name of the run.
      root: folder of all runs.
      may_change: dotted names of the fields that may differ when the run is continued, such as `"steps"`; a name
        stands for everything below it too.

    Returns:
      The folder.

    Raises:
      UsageError: the name is not a plain file name, the folder cannot be written, another process has it, or it holds
        a run of another configuration; the message names the fields.
    """
    check_name(name)
    folder, mine = pathlib.Path(root, experiment, name), plain(config)
    path = folder / "config.json"
    try:
        if path.exists():
            _refuse_other(folder, _flat(json.loads(path.read_text())), _flat(mine), may_change)
        if writes():
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            _lock(folder)
            _write_text(path, json.dumps(mine, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); choose another folder of runs") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}); mend it, or choose another name for the run") from error
    return folder


_locks: dict[tuple[int, int], int] = {}  # descriptors by device and inode; left open, so that they hold until the end


def _lock(folder: pathlib.Path) -> None:
    """Raises a UsageError if another process has the folder; where there are no locks, nobody has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    identity = os.fstat(file).st_dev, os.fstat(file).st_ino
    if identity in _locks:  # ours already
        return os.close(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"another process is running the run in {folder}; end it, or choose another name") from None
    except OSError:  # the file system has none
        pass
    _locks[identity] = file


def plain(config: Any) -> Any:
    """A dataclass instance or mapping as JSON would give it back; what JSON cannot hold becomes text."""
    return json.loads(
        json.dumps(dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config, default=str)
    )


def _refuse_other(
    folder: pathlib.Path, there: dict[str, Any], here: dict[str, Any], may_change: Collection[str]
) -> None:
    def fixed(field):
        return not any(field == name or field.startswith(f"{name}.") for name in may_change)

    absent = object()
    differing = [
        f"{field} is {there.get(field, 'absent')} there, {here.get(field, 'absent')} here"
        for field in {**there, **here}
        if there.get(field, absent) != here.get(field, absent) and fixed(field)
    ]
    if differing:
        raise UsageError(
            f"{folder} holds a run with another configuration ({'; '.join(differing)}); "
            "give the same flags to go on with it, or another name to start anew"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


# --- metrics ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def log_metrics(folder: pathlib.Path, resumed_step: int = -1) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Opens a run's `metrics.jsonl` and TensorBoard events and yields `write(step, values)`.

    Values are scalars, or `[S]` arrays for the members of a sweep; what is not finite is stored as null. Damaged lines
    and those past the step that the run resumed from are cut first, so that in the end the file is that of a run which
    was never interrupted. For that, write a step's metrics before you save its checkpoint.

    Args:
      folder: the run's.
      resumed_step: the step of the checkpoint; -1 for a fresh start, which empties the file.
    """
    if not writes():
        yield lambda step, values: None
        return
    from tensorboardX import SummaryWriter

    path = folder / "metrics.jsonl"
    kept = [line for line in _read_lines(path) if line["step"] <= resumed_step]
    _write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    events = SummaryWriter(
        str(folder / "tensorboard"),
        purge_step=resumed_step + 1,
        flush_secs=10,
        filename_suffix=f".{os.getpid()}.{resumed_step}",  # the name has only seconds: a quick restart would overwrite
    )
    # A line at a time, so that a killed process leaves whole ones.
    with path.open("a", buffering=1) as file, events:

        def write(step: int, values: Mapping[str, Any]) -> None:
            line: dict[str, Any] = {"step": step}
            for name, value in values.items():
                array = np.asarray(value, np.float64)
                line[name] = np.where(np.isfinite(array), array, None).tolist()
                for index, x in np.ndenumerate(array):
                    if np.isfinite(x):  # at anything else tensorboardX prints a warning
                        events.add_scalar("/".join([name, *map(str, index)]), x, step)
            file.write(json.dumps(line) + "\n")

        yield write


def _read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        line = None
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # cut by a full disk, or a crash's zeros
            line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def read_metrics(folder: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps `[n]` and values `[n]` or `[n, S]` of each metric that `metrics.jsonl` holds; null is NaN."""
    columns: dict[str, tuple[list, list]] = {}
    for line in _read_lines(folder / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step":
                steps, values = columns.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return {name: (np.array(steps), np.array(values, np.float64)) for name, (steps, values) in columns.items()}


# --- the terminal -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(total: int, *, start: int = 0, label: str = "training") -> Iterator[Callable[..., None]]:
    """Shows how far a loop is and yields `update(step, **values)`.

    On a terminal this is a bar with rate, values and time left; elsewhere it is one line every ten seconds and one at
    the end, so that logs stay short. Values are looked at only when they are shown: passing device arrays costs nothing
    at the other steps. Arrays, as in a sweep, are shown by their mean.

    Args:
      total: the number of steps when the loop is done.
      start: the number taken before.
      label: what is going on.
    """
    if not writes():
        yield lambda step, **values: None
        return
    bar = _bar(total, start, label) if sys.stdout.isatty() else contextlib.nullcontext(_Lines(total, start, label))
    with bar as show:
        shown = -math.inf

        def update(step: int, **values: Any) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < show.period and step < total:
                return
            shown = now
            show(step, "  ".join(f"{name} {np.mean(jax.device_get(value)):.4g}" for name, value in values.items()))

        yield update


class _Lines:
    period = 10.0

    def __init__(self, total: int, start: int, label: str):
        self._total, self._label = total, label
        self._step, self._time = start, time.monotonic()

    def __call__(self, step: int, values: str) -> None:
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        left = f"{_duration((self._total - step) / rate)} left" if rate > 0 else "-- left"
        print(f"{self._label} {step}/{self._total}  {values}  {rate:.3g}/s  {left}", flush=True)
        self._step, self._time = step, now


@contextlib.contextmanager
def _bar(total: int, start: int, label: str) -> Iterator[Any]:
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[values]}"),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("left"),
    )
    with rich.Progress(*columns) as display:
        task = display.add_task(label, total=total, completed=start, values="", rate="")

        def show(step: int, values: str) -> None:
            speed = display.tasks[0].speed
            display.update(task, completed=step, values=values, rate=f"{speed:.3g}/s" if speed else "")

        show.period = 0.1
        yield show


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def print_results(folder: pathlib.Path) -> None:
    """Prints where the report and the pictures of a run are."""
    if writes():
        print(f"report   {folder / 'report.md'}")
        for path in sorted((folder / "figures").glob("*.png")):
            print(f"picture  {path}")


# --- the report -------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get four significant digits, and columns of numbers stand to the right.

    A `|` in a cell is escaped.

    >>> print(table(["solver", "agreement"], [["heun", 0.98765], ["ddim", 0.5]]))
    | solver | agreement |
    |:-------|----------:|
    | heun   |    0.9877 |
    | ddim   |       0.5 |
    """

    def text(x):
        return f"{x:.4g}" if isinstance(x, float | np.floating) else str(x).replace("|", "\\|")

    head, *cells = [[text(x) for x in row] for row in (header, *rows)]
    numeric = [all(isinstance(row[i], int | float | np.number) for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(header))]

    def line(row):
        padded = (x.rjust(w) if right else x.ljust(w) for x, w, right in zip(row, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    ruler = (f"{'-' * (w + 1)}:" if right else f":{'-' * (w + 1)}" for w, right in zip(widths, numeric, strict=True))
    return "\n".join([line(head), f"|{'|'.join(ruler)}|", *map(line, cells)])


def picture(path: pathlib.Path, folder: pathlib.Path, caption: str) -> str:
    """Markdown that shows a picture in the report of the run in `folder`."""
    return f"![{caption}]({path.relative_to(folder).as_posix()})\n\n*{caption}*"


def write_report(folder: pathlib.Path, title: str, sections: Mapping[str, str]) -> pathlib.Path:
    """Writes `report.md` from Markdown sections by their headings, and returns its path."""
    path = folder / "report.md"
    if writes():
        parts = [f"# {title}", *(f"## {heading}\n\n{body.strip()}" for heading, body in sections.items())]
        _write_text(path, "\n\n".join(parts) + "\n")
    return path

"""Checkpoints: saved in the background, committed at once, checked before they are trusted.

A checkpoint is a folder named after its step: the state as Orbax stores it, and `record.json` with its metrics, the
run's configuration, the layout of the state, and size and checksum of every file. Orbax renames the folder into place
when all of it is written, so a killed process leaves the earlier ones as they were. Only what contradicts its record is
damaged; whatever else goes wrong while one is read is an error, and costs no checkpoint.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from esscher.core.errors import UsageError

__all__ = ["Checkpoints", "Restored", "open"]

_RECORD = "record.json"
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint that was read back."""

    step: int
    state: Any
    metrics: dict[str, Any]  # float, or list of floats in a sweep
    config: Any  # as given to `open`, through JSON


def open(
    directory: Any,
    *,
    keep: int = 3,
    best: str = "loss",
    mode: Literal["min", "max"] = "min",
    config: Any = None,
) -> "Checkpoints":
    """The checkpoints in a folder, which need not exist yet; nothing is written before the first `save`.

    Args:
      directory: local path, or any that Orbax knows, such as `gs://bucket/run`.
      keep: how many of the newest to keep.
      best: the metric that picks the one that is kept besides; in a sweep its mean where it is finite.
      mode: whether the least or the greatest is best.
      config: stored with each checkpoint; anything that JSON can hold.

    Returns:
      A context manager; leaving it waits for the save under way.
    """
    if keep < 1 or mode not in ("min", "max"):
        raise ValueError(f'keep must be at least 1 and mode "min" or "max", got {keep} and {mode!r}')
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be what JSON can hold: {error}") from error
    return Checkpoints(directory, keep, best, -1.0 if mode == "min" else 1.0, config)


class Checkpoints:
    """The checkpoints of one run, see `open`. With many hosts, all of them make every call."""

    def __init__(self, directory: Any, keep: int, best: str, sign: float, config: Any):
        """Use `open`."""
        from etils import epath

        path = epath.Path(directory)
        self.directory = path if "://" in str(directory) else path.absolute()
        self._best, self._sign, self._config = best, sign, config
        self._policy = _Policy(keep)
        self._manager: Any = None
        self._last: int | None = None  # the step last saved or resumed from
        self._pending: tuple[int, dict[str, Any]] | None = None  # the save under way and its record
        self._abandoned: list[int] = []  # damaged, and newer than where the run resumed

    def __enter__(self) -> "Checkpoints":
        """Itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Waits for the save under way."""
        self.close()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, damaged ones among them, oldest first."""
        from orbax.checkpoint.path import step

        return sorted({found.step for found in step.standard_name_format().find_all(self.directory)})

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Copies the state off the devices, then writes it in the background; the buffers may be donated right after.

        Waits for the save before. Saving a step just saved or resumed from does nothing.

        Args:
          step: number of steps taken.
          state: a pytree of arrays; typed keys are fine.
          metrics: scalars, or `[S]` arrays in a sweep; a checkpoint without the metric `best` is never the best.

        Raises:
          UsageError: this save or the one before cannot be written, e.g. for a full disk; the others are intact.
        """
        import orbax.checkpoint as ocp

        if step == self._last:
            return
        self.wait()
        values = {name: np.asarray(value, np.float64).tolist() for name, value in (metrics or {}).items()}
        record = {"metrics": values, "config": self._config, "layout": _layout(state)}
        with self._one_line_error(step):
            self._set_aside()
            if self._manager is None:
                self._open_manager()
            newest = max(self._manager.all_steps(), default=-1)
            if step <= newest:
                raise ValueError(f"step must be past {newest}, the newest checkpoint of {self.directory}, got {step}")
            self._require_space(step, state)
            self._pending = step, record
            self._policy.scores[step] = self._score(record)
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)
        self._last = step

    def wait(self) -> None:
        """Blocks until the save under way is committed.

        Raises:
          UsageError: it could not be written.
        """
        if self._manager is not None and self._pending is not None:
            with self._one_line_error(self._pending[0]):
                self._manager.wait_until_finished()
            self._pending = None

    def close(self) -> None:
        """Waits for the save under way and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def _open_manager(self) -> None:
        import orbax.checkpoint as ocp

        self._policy.scores.update(_together(self._scores))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,  # what a killed process left half-written
                lightweight_initialize=True,  # else a damaged metadata file of Orbax's own stops it
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_record,
                    create_directories_asynchronously=False,  # else a save that fails leaves threads that bar the exit
                ),
            ),
        )

    def _set_aside(self) -> None:
        """Renames the damaged checkpoints that training comes past: their steps are free, and nothing is lost."""

        def rename():
            for step in {*self._abandoned} & {*self.steps()} if jax.process_index() == 0 else ():
                names = (self.directory / f"damaged-{step}-{count}" for count in itertools.count(1))
                aside = next(path for path in names if not path.exists())
                (self.directory / str(step)).rename(aside)
                _log.warning("the damaged checkpoint of step %d is kept as %s", step, aside)

        if self._abandoned:
            self.close()  # Orbax's manager would believe them still there
            _together(rename)
            self._abandoned = []

    def _write_record(self) -> None:
        """Called by Orbax on one host, when every file is written and the folder not yet renamed."""
        step, record = self._pending
        for folder in self.directory.iterdir():
            if folder.name.split(".")[0] == str(step):
                paths = [where / name for where, _, names in (folder / "state").walk() for name in names]
                files = {str(path.relative_to(folder / "state")): _fingerprint(path) for path in paths}
                (folder / _RECORD).write_text(json.dumps(record | {"files": files}))

    def _scores(self) -> dict[int, float]:
        """How good each committed checkpoint is; without the metric, or damaged, minus infinity."""
        records = {step: self._read_record(step) for step in self.steps()}
        return {step: -np.inf if record is None else self._score(record) for step, record in records.items()}

    def _score(self, record: dict[str, Any]) -> float:
        members = np.asarray(record["metrics"].get(self._best, np.nan), np.float64)
        finite = members[np.isfinite(members)]  # one member that diverged must not hide the others
        return float(self._sign * finite.mean()) if finite.size else -np.inf

    def _require_space(self, step: int, state: Any) -> None:
        """Fails before anything is written, because Orbax says the same in a hundred lines and leaves its half."""
        if "://" in str(self.directory):
            return
        shards = [s for x in jax.tree.leaves(state) if isinstance(x, jax.Array) for s in x.addressable_shards]
        needed = 2**20 + 1.05 * sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)  # with Orbax's own
        free = shutil.disk_usage(self.directory).free
        if not _agreed(needed < free):
            mine = f"it needs {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left"
            raise self._failure(step, mine if needed >= free else "another host's disk is full")

    @contextlib.contextmanager
    def _one_line_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            self._pending = self._last = None
            self._policy.scores.pop(step, None)
            if self._manager is not None:
                with contextlib.suppress(ValueError):  # of a damaged file: the full disk is the news
                    self._manager.reload()
            raise self._failure(step, reason) from error

    def _failure(self, step: int, reason: str) -> UsageError:
        steps = self.steps()
        advice = "make room" + (f" and run the same command to go on from step {steps[-1]}" if steps else "")
        return UsageError(f"cannot save the checkpoint of step {step} in {self.directory}: {reason}; {advice}")

    # --- restoring ----------------------------------------------------------------------------------------------------

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole; each newer one that is not is named in a warning of one line.

        Damaged checkpoints stay where they are until the next save, which renames them (`3` to `damaged-3-1`).

        Args:
          abstract_state: arrays, or `jax.ShapeDtypeStruct` with the shardings wanted now, whatever they were at the
            save; without one a leaf goes to the first device.

        Returns:
          The checkpoint, or `None` if there is none at all.

        Raises:
          UsageError: there are checkpoints, but none is whole; or the newest whole one holds another state, or cannot
            be read now. What else Orbax or JAX raise, such as a lack of memory, comes as it is.
        """
        steps = self.steps()[::-1]
        restored = self._first_whole(steps, abstract_state)
        if restored is not None:
            self._last = restored.step
            self._abandoned = [step for step in steps if step > restored.step]
        return restored

    def restore_best(self, abstract_state: Any) -> Restored | None:
        """The whole checkpoint with the best metric; arguments and errors as in `restore_latest`."""
        with _reading(self.directory):
            scores = _together(self._scores)
        return self._first_whole(sorted(scores, key=lambda step: (scores[step], step))[::-1], abstract_state)

    def _first_whole(self, steps: Sequence[int], abstract_state: Any) -> Restored | None:
        for step, following in itertools.pairwise([*steps, None]):
            folder = self.directory / str(step)
            with _reading(folder):
                damage = _together(functools.partial(self._damage, step))
                if _agreed(damage is None):
                    return _together(functools.partial(self._read, step, abstract_state))
            reason = damage or "another host found it so"
            if following is None:
                where = f"no checkpoint in {self.directory} is whole (step {step}: {reason})"
                raise UsageError(f"{where}; to start over, move that folder away or delete it")
            _log.warning("checkpoint %s is damaged (%s); going back to step %d", folder, reason, following)
        return None

    def _damage(self, step: int) -> str | None:
        """How a checkpoint differs from what was saved, if it does; each host looks at its part of the files."""
        record = self._read_record(step)
        if record is None:
            return f"{_RECORD} is not what was saved"
        for name, saved in sorted(record["files"].items())[jax.process_index() :: jax.process_count()]:
            path = self.directory / str(step) / "state" / name
            if not path.exists() or _fingerprint(path) != saved:
                return f"state/{name} is not what was saved"
        return None

    def _read(self, step: int, abstract_state: Any) -> Restored:
        import orbax.checkpoint as ocp

        folder, record = self.directory / str(step), self._read_record(step)
        stored, wanted = record["layout"], _layout(abstract_state)
        differing = sorted(path for path in stored.keys() | wanted.keys() if stored.get(path) != wanted.get(path))
        if differing:
            path = differing[0]
            raise UsageError(
                f"checkpoint {folder} holds another state: {path} is {stored.get(path, 'missing')} there and "
                f"{wanted.get(path, 'missing')} here ({len(differing)} differ); give the flags it was made with"
            )
        # The handler, not the manager: the manager's restore meets the other hosts at a barrier, where a host that
        # fails would never arrive.
        args = ocp.args.StandardRestore(jax.tree.map(_target, abstract_state))
        state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
        return Restored(step, state, record["metrics"], record["config"])

    def _read_record(self, step: int) -> dict[str, Any] | None:
        """The record of a checkpoint; None if it is damaged."""
        path = self.directory / str(step) / _RECORD
        try:
            record = json.loads(path.read_text()) if path.exists() else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(record, dict) or "config" not in record:
            return None
        return record if all(isinstance(record.get(x), dict) for x in ("metrics", "layout", "files")) else None


class _Policy:
    """Orbax's protocol for what to keep: the newest and the best. (Its own best-first option drops the newest.)"""

    def __init__(self, keep: int):
        self.keep = keep
        self.scores: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint is to stay."""
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self.keep :])
        scored = [step for step in steps if self.scores.get(step, -np.inf) > -np.inf]
        if scored:
            kept.add(max(scored, key=lambda step: (self.scores[step], step)))
        return [step in kept for step in steps]


def _agreed(ok: bool) -> bool:
    """Whether it is so on every host."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _together(action: Callable[[], Any]) -> Any:
    """What the action returns, if it succeeds on every host; else all raise, and none waits for one that failed."""
    result = failure = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if not _agreed(failure is None):
        raise failure or UsageError("another host failed at a checkpoint; its own error says why")
    return result


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise UsageError(f"cannot read {path}: {reason}; try again, or move it away to go on without it") from error


def _system_error(error: Exception) -> str | None:
    """What the operating system had to say, if the error is its."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # how TensorStore passes it on
    return os.strerror(int(code[1])) if code else str(error) if isinstance(error, OSError) else None


def _layout(tree: Any) -> dict[str, str]:
    """Type and shape of each leaf by its path, the same for arrays and for their abstract stand-ins."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _target(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _fingerprint(path: Any) -> list[int]:
    """Size and CRC-32 of a file; TensorStore lets a flipped bit in an array pass."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]

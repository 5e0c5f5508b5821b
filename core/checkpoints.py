"""Checkpoints: saved in the background, committed at once, checked before they are trusted.

A checkpoint is a folder named after its step: the state as Orbax stores it, and `record.json` with its metrics, the
run's configuration, the layout of the state, and size and checksum of every file. Orbax renames the folder into place
when all of it is written, so a killed process leaves the earlier ones as they were.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from esscher.core.errors import UsageError

__all__ = ["Checkpoints", "Restored", "open"]

_RECORD = "record.json"
_CHECKSUM_BELOW = 2**30  # bytes of a checkpoint; above, the sizes of its files have to do
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
      best: the metric that picks the one that is kept besides; its mean over the members of a sweep.
      mode: whether the least or the greatest is best.
      config: stored with each checkpoint; anything that JSON can hold.

    Returns:
      A context manager; leaving it waits for the save under way.
    """
    if keep < 1 or mode not in ("min", "max"):
        raise ValueError(f'keep must be at least 1 and mode "min" or "max", got {keep} and {mode!r}')
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
            self._open_manager()
            self._require_space(step, state)
            self._make_way(step)
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

        if self._manager is not None:
            return
        self._policy.scores.update(self._scores())
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

    def _make_way(self, step: int) -> None:
        newest = max(set(self._manager.all_steps()) - self._policy.abandoned, default=-1)
        if step <= newest:
            raise ValueError(f"step must be past {newest}, the newest checkpoint of {self.directory}, got {step}")
        if step in self._policy.abandoned and step in self._manager.all_steps():
            self._manager.delete(step)
        self._policy.abandoned.discard(step)

    def _write_record(self) -> None:
        """Called by Orbax on one host, when every file is written and the folder not yet renamed."""
        step, record = self._pending
        for folder in self.directory.iterdir():
            if folder.name.split(".")[0] == str(step):
                (folder / _RECORD).write_text(json.dumps(record | {"files": _fingerprint(folder / "state")}))

    def _scores(self) -> dict[int, float]:
        """How good each committed checkpoint is; without the metric, or damaged, minus infinity."""
        scores = dict.fromkeys(self.steps(), -np.inf)
        for step in scores:
            with contextlib.suppress(OSError, ValueError):
                scores[step] = self._score(self._read_record(step))
        return scores

    def _score(self, record: dict[str, Any]) -> float:
        value = self._sign * np.mean(record["metrics"].get(self._best, np.nan))
        return float(value) if np.isfinite(value) else -np.inf

    def _require_space(self, step: int, state: Any) -> None:
        """Fails before anything is written, because Orbax says the same in a hundred lines and leaves its half."""
        if "://" in str(self.directory):
            return
        shards = [s for x in jax.tree.leaves(state) if isinstance(x, jax.Array) for s in x.addressable_shards]
        needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
        free = shutil.disk_usage(self.directory).free
        if not _agreed(needed < free):
            mine = f"it needs {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left"
            raise self._failure(step, mine if needed >= free else "another host's disk is full")

    @contextlib.contextmanager
    def _one_line_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # how TensorStore passes the system's errors on
            if not (code or isinstance(error, OSError)):
                raise
            self._pending = self._last = None
            self._policy.scores.pop(step, None)
            if self._manager is not None:
                with contextlib.suppress(ValueError):  # of a damaged file: the full disk is the news
                    self._manager.reload()
            raise self._failure(step, os.strerror(int(code[1])) if code else str(error)) from error

    def _failure(self, step: int, reason: str) -> UsageError:
        steps = self.steps()
        advice = "make room" + (f" and run the same command to go on from step {steps[-1]}" if steps else "")
        return UsageError(f"cannot save the checkpoint of step {step} in {self.directory}: {reason}; {advice}")

    # --- restoring ----------------------------------------------------------------------------------------------------

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole; each newer one that is not is named in a warning of one line.

        A damaged checkpoint stays where it is until training has come past it and saved again.

        Args:
          abstract_state: arrays, or `jax.ShapeDtypeStruct` with the shardings wanted now, whatever they were at the
            save; without one a leaf goes to the first device.

        Returns:
          The checkpoint, or `None` if there is none at all.

        Raises:
          UsageError: there are checkpoints, but none is whole; or the newest whole one holds another state.
        """
        steps = self.steps()[::-1]
        restored = self._first_whole(steps, abstract_state)
        if restored is not None:
            self._last = restored.step
            self._policy.abandoned.update(step for step in steps if step > restored.step)
        return restored

    def restore_best(self, abstract_state: Any) -> Restored | None:
        """The whole checkpoint with the best metric; arguments and errors as in `restore_latest`."""
        scores = self._scores()
        return self._first_whole(sorted(scores, key=lambda step: (scores[step], step))[::-1], abstract_state)

    def _first_whole(self, steps: Sequence[int], abstract_state: Any) -> Restored | None:
        for step, following in itertools.pairwise([*steps, None]):
            folder, restored, reason = self.directory / str(step), None, "another host cannot read it"
            try:
                restored = self._read(step, abstract_state)
            except UsageError:
                raise
            except Exception as error:  # JSON, TensorStore and file system each have their own
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if _agreed(restored is not None):
                return restored
            if following is None:
                where = f"no checkpoint in {self.directory} is whole"
                raise UsageError(f"{where} (step {step}: {reason}); delete that folder to start over")
            _log.warning("checkpoint %s is damaged (%s); going back to step %d", folder, reason, following)
        return None

    def _read(self, step: int, abstract_state: Any) -> Restored:
        import orbax.checkpoint as ocp

        folder, record = self.directory / str(step), self._read_record(step)
        for name, (size, *checksum) in record["files"].items():
            file = folder / "state" / name
            if file.stat().length != size or (checksum and zlib.crc32(file.read_bytes()) != checksum[0]):
                raise ValueError(f"state/{name} is not what was saved")
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

    def _read_record(self, step: int) -> dict[str, Any]:
        record = json.loads((self.directory / str(step) / _RECORD).read_text())
        if not isinstance(record, dict) or {"metrics", "config", "layout", "files"} - record.keys():
            raise ValueError(f"{_RECORD} is not what was saved")
        return record


class _Policy:
    """Orbax's protocol for what to keep: the newest and the best. (Its own best-first option drops the newest.)"""

    def __init__(self, keep: int):
        self.keep = keep
        self.scores: dict[int, float] = {}
        self.abandoned: set[int] = set()  # damaged, and newer than where the run resumed

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint is to stay."""
        steps = [info.step for info in checkpoints]
        alive = sorted(set(steps) - self.abandoned)
        kept = set(alive[-self.keep :])
        scored = [step for step in alive if self.scores.get(step, -np.inf) > -np.inf]
        if scored:
            kept.add(max(scored, key=lambda step: (self.scores[step], step)))
        return [step in kept for step in steps]


def _agreed(ok: bool) -> bool:
    """Whether it is so on every host."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


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


def _fingerprint(folder: Any) -> dict[str, list[int]]:
    """Size and, unless the whole is huge, CRC-32 of every file; TensorStore lets a flipped bit in an array pass."""
    files = sorted(where / name for where, _, names in folder.walk() for name in names)
    sizes = {path: path.stat().length for path in files}
    small = sum(sizes.values()) <= _CHECKSUM_BELOW
    return {
        str(path.relative_to(folder)): [size, zlib.crc32(path.read_bytes())] if small else [size]
        for path, size in sizes.items()
    }

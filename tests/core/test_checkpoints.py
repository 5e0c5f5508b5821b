"""Checkpoints come back bitwise, on any mesh; kills and full disks cost at most the newest one."""

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esscher.core import checkpoints
from esscher.core.errors import UsageError


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any


def state_at(step):
    """Awkward on purpose: a NamedTuple of scalars, bfloat16, empty optimiser states and a typed key."""
    w = jax.random.normal(jax.random.key(step), (64, 24))
    params = {"w": w, "b": w[0, :3].astype(jnp.bfloat16)}
    return State(jnp.asarray(step), params, optax.adamw(1e-3).init(params), jax.random.key(step))


def abstract(state=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(0) if state is None else state)


def leaves(tree):
    typed = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree)]
    return [np.asarray(jax.random.key_data(x) if t else x) for x, t in zip(jax.tree.leaves(tree), typed, strict=True)]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(leaves(one), leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def save_all(folder, steps, **keywords):
    with checkpoints.open(folder, **keywords) as saved:
        for step in steps:
            saved.save(step, state_at(step), {"loss": 1 / step})


def latest(folder):
    with checkpoints.open(folder) as saved:
        return saved.restore_latest(abstract())


# --- what is saved comes back -----------------------------------------------------------------------------------------


def test_the_latest_comes_back_bitwise_with_metrics_and_configuration(tmp_path):
    with checkpoints.open(tmp_path, config={"hyper": {"lr": [0.1, 0.2]}}) as saved:
        saved.save(3, state_at(3), {"loss": jnp.float32(0.25), "grad_norm": np.array([1.0, 2.0])})
    restored = latest(tmp_path)
    assert_same(restored.state, state_at(3))
    assert restored.step == 3
    assert restored.metrics == {"loss": 0.25, "grad_norm": [1, 2]}
    assert restored.config == {"hyper": {"lr": [0.1, 0.2]}}


def test_an_empty_or_missing_folder_holds_nothing_and_is_left_alone(tmp_path):
    assert latest(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()
    with checkpoints.open(tmp_path) as saved:
        assert saved.restore_best(abstract()) is None


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all("runs/one", [1])
    assert latest("runs/one").step == 1


def test_the_three_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 0.9, 2: 0.2, 3: float("nan"), 4: 0.5, 5: 0.4, 6: 0.8, 7: 0.7}
    with checkpoints.open(tmp_path) as saved:
        for step, loss in list(losses.items())[:5]:
            saved.save(step, state_at(step), {"loss": loss})
    with checkpoints.open(tmp_path) as saved:  # another process knows which one was best
        assert saved.restore_latest(abstract()).step == 5
        for step, loss in list(losses.items())[5:]:
            saved.save(step, state_at(step), {"loss": loss})
    assert saved.steps() == [2, 5, 6, 7]
    best = saved.restore_best(abstract())
    assert (best.step, best.metrics) == (2, {"loss": 0.2})
    assert_same(best.state, state_at(2))
    assert saved.restore_latest(abstract()).step == 7


def test_the_greatest_metric_may_be_best_and_a_sweep_counts_by_its_mean(tmp_path):
    with checkpoints.open(tmp_path, keep=1, best="accuracy", mode="max") as saved:
        for step, accuracy in [(1, [0.2, 0.4]), (2, [0.9, 0.1]), (3, [0.0, 0.3])]:
            saved.save(step, state_at(step), {"loss": 1.0, "accuracy": accuracy})
    assert saved.steps() == [2, 3]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 4]), ("max", [3, 4])])
def test_members_that_diverged_do_not_count_towards_the_best(tmp_path, mode, kept):
    nan = float("nan")
    with checkpoints.open(tmp_path, keep=1, mode=mode) as saved:
        for step, loss in [(1, [0.5, 0.6]), (2, [0.1, nan]), (3, [nan, 0.9]), (4, [nan, nan])]:
            saved.save(step, state_at(step), {"loss": loss})
    assert saved.steps() == kept


def test_a_checkpoint_without_the_metric_is_never_the_best(tmp_path):
    with checkpoints.open(tmp_path, keep=1) as saved:
        for step in (1, 2, 3):
            saved.save(step, state_at(step), {"accuracy": 1.0} if step > 1 else {"loss": 9.0})
    assert saved.steps() == [1, 3]


def test_a_save_on_one_device_is_restored_onto_a_mesh_of_eight_and_back(tmp_path):
    save_all(tmp_path / "one", [1])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))

    def spread(leaf):
        spec = PartitionSpec("tensor", "data") if leaf.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with checkpoints.open(tmp_path / "one") as saved:
        state = saved.restore_latest(jax.tree.map(spread, state_at(0))).state
    assert state.params["w"].sharding == NamedSharding(mesh, PartitionSpec("tensor", "data"))
    assert state.params["w"].addressable_shards[0].data.shape == (32, 6)
    assert len(state.key.sharding.device_set) == 8
    assert_same(state, state_at(1))
    with checkpoints.open(tmp_path / "eight") as saved:
        saved.save(2, state)
    assert_same(latest(tmp_path / "eight").state, state_at(1))


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros((512, 1024))
    with checkpoints.open(tmp_path, keep=9) as saved:
        for count in range(4):
            saved.save(count, {"w": w})
            for _ in range(5):
                w = step(w)
    for count in range(4):
        with checkpoints.open(tmp_path) as saved:
            restored = saved._read(count, {"w": w})
        assert (np.asarray(restored.state["w"]) == 5 * count).all()


def test_saving_the_step_just_saved_or_resumed_from_does_nothing_and_an_older_one_is_refused(tmp_path):
    save_all(tmp_path, [1, 2, 2])
    with checkpoints.open(tmp_path) as saved:
        with pytest.raises(ValueError, match=r"step must be past 2, the newest checkpoint of .*, got 1"):
            saved.save(1, state_at(1))
        saved.restore_latest(abstract())
        saved.save(2, state_at(2))
        saved.save(3, state_at(3))
    assert saved.steps() == [1, 2, 3]


def test_options_out_of_range_are_refused(tmp_path):
    for wrong in ({"keep": 0}, {"mode": "least"}):
        with pytest.raises(ValueError, match='keep must be at least 1 and mode "min" or "max"'):
            checkpoints.open(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"config must be what JSON can hold: .*PosixPath"):
        checkpoints.open(tmp_path, config={"data": tmp_path})


# --- kills and full disks ---------------------------------------------------------------------------------------------

SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from esscher.core import checkpoints
w = jnp.arange(2.0**20)
with checkpoints.open(sys.argv[1]) as saved:
    found = saved.restore_latest({"w": w})
    step = found.step if found else 0
    while True:
        step += 1
        saved.save(step, {"w": w + step}, {"loss": 1.0})
        print(step, flush=True)
"""


def test_kill_9_amid_an_asynchronous_save_leaves_the_earlier_ones_whole(tmp_path, caplog):
    w, committed, halves = jnp.arange(2.0**20), 0, 0
    for delay in (0.0, 0.02, 0.05):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                for _ in range(3):
                    started = int(process.stdout.readline())  # its save is under way, the one before is committed
                time.sleep(delay)
            finally:
                process.kill()
        halves += any("tmp" in path.name for path in tmp_path.iterdir())
        with checkpoints.open(tmp_path) as saved:
            restored = saved.restore_latest({"w": w})
        assert restored.step >= started - 1 > committed
        np.testing.assert_array_equal(restored.state["w"], w + restored.step)
        committed = restored.step
    assert halves  # or no save was caught under way
    assert not caplog.messages
    with checkpoints.open(tmp_path) as saved:
        saved.restore_latest({"w": w})
        saved.save(10**6, {"w": w})
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    usage = namedtuple("usage", "total used free")
    with checkpoints.open(tmp_path) as saved:
        saved.restore_latest(abstract())
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**12, 2**12))
            message = r"cannot save the checkpoint of step 3 in .* 0\.0 MiB left; make room .* go on from step 2"
            with pytest.raises(UsageError, match=message):
                saved.save(3, state_at(3))
        assert saved.steps() == [1, 2]
        saved.save(3, state_at(3))  # there is room again
    assert_same(latest(tmp_path).state, state_at(3))


@contextlib.contextmanager
def no_file_larger_than(size):
    """Writes past it fail in the kernel, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old[0])
        signal.signal(signal.SIGXFSZ, old[1])


def test_a_write_that_fails_half_way_gives_one_line_and_leaves_the_others_whole(tmp_path):
    large = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    with checkpoints.open(tmp_path, keep=1) as saved:
        saved.save(1, large)
        saved.wait()
        with no_file_larger_than(100_000):
            saved.save(2, large)
            with pytest.raises(UsageError, match=r"cannot save the checkpoint of step 2 .*: File too large; make room"):
                saved.wait()
        assert saved.steps() == [1]
        saved.save(2, large)  # that it failed is not taken for done
    assert saved.steps() == [2]
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_a_failure_at_the_end_is_raised_on_leaving(tmp_path):
    large = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    caught = pytest.raises(UsageError, match="cannot save the checkpoint of step 1 in")
    with no_file_larger_than(100_000), caught, checkpoints.open(tmp_path) as saved:
        saved.save(1, large)
    assert latest(tmp_path) is None


def test_a_folder_that_cannot_be_made_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with checkpoints.open(tmp_path / "file" / "checkpoints") as saved, pytest.raises(UsageError, match="cannot save"):
        saved.save(1, state_at(1))


def test_a_state_that_cannot_be_stored_is_a_programming_error_and_bars_no_exit(tmp_path):
    program = f"from esscher.core import checkpoints\ncheckpoints.open({str(tmp_path)!r}).save(1, {{'f': print}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "UsageError" in done.stderr) == (1, False)


def test_the_record_is_part_of_the_atomic_commit(tmp_path):
    save_all(tmp_path, [1])
    record = json.loads((tmp_path / "1" / "record.json").read_text())
    names = {
        str(path.relative_to(tmp_path / "1/state")) for path in (tmp_path / "1/state").rglob("*") if path.is_file()
    }
    assert set(record["files"]) == names
    assert all(len(entry) == 2 for entry in record["files"].values())

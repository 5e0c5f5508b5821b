"""What contradicts its record is damaged, named in one line and passed over; no other failure costs a checkpoint."""

import errno
import json
import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from esscher.core import checkpoints
from esscher.core.errors import UsageError


def state_at(step):
    w = jax.random.normal(jax.random.key(step), (64, 24))
    return {"w": w, "b": w[0, :3].astype(jnp.bfloat16)}


def abstract():
    return jax.eval_shape(lambda: state_at(0))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def save_all(folder, steps):
    with checkpoints.open(folder) as saved:
        for step in steps:
            saved.save(step, state_at(step), {"loss": 1 / step})


def latest(folder):
    with checkpoints.open(folder) as saved:
        return saved.restore_latest(abstract())


def data_file(folder, step):
    """The largest file of a checkpoint: the arrays."""
    return max(pathlib.Path(folder, str(step), "state").rglob("*"), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edit_record(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "arrays cut": lambda folder: truncate(data_file(folder, 3)),
    "arrays flipped": lambda folder: flip_a_bit(data_file(folder, 3)),  # which TensorStore does not notice
    "arrays gone": lambda folder: data_file(folder, 3).unlink(),
    "tree emptied": lambda folder: (folder / "3/state/_METADATA").write_bytes(b""),
    "manifest zeroed": lambda folder: (folder / "3/state/manifest.ocdbt").write_bytes(bytes(100)),
    "record cut": lambda folder: truncate(folder / "3/record.json"),
    "record without metrics": lambda folder: edit_record(folder / "3/record.json", metrics=None),
    "record not text": lambda folder: (folder / "3/record.json").write_bytes(b"\xff\xfe{"),
    "record of another kind": lambda folder: (folder / "3/record.json").write_text("[]"),
    "folder emptied": lambda folder: (shutil.rmtree(folder / "3"), (folder / "3").mkdir()),
    "folder a file": lambda folder: (shutil.rmtree(folder / "3"), (folder / "3").write_text("")),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    save_all(folder, [1, 2, 3])
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_is_used(three, tmp_path, damage, caplog, capfd):
    folder = shutil.copytree(three, tmp_path / "copy")
    damage(folder)
    with caplog.at_level(logging.WARNING):
        restored = latest(folder)
    assert restored.step == 2
    assert_same(restored.state, state_at(2))
    if (folder / "3").is_dir():  # else it is no checkpoint at all
        (message,) = caplog.messages
        assert message.startswith(f"checkpoint {folder / '3'} is damaged (")
        assert message.endswith("going back to step 2")
        assert "\n" not in message
    assert capfd.readouterr().err.count("\n") <= 1  # nothing of Orbax's beside it


def test_after_damage_training_comes_past_it_and_the_damaged_are_set_aside(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4])  # 1 is gone by now: loss falls, so the best is the newest
    for step in (3, 4):
        truncate(data_file(tmp_path, step))
    (tmp_path / "damaged-3-1").mkdir()  # from an earlier time
    damaged = {step: (tmp_path / str(step) / "record.json").read_bytes() for step in (3, 4)}
    with checkpoints.open(tmp_path) as saved:
        assert saved.restore_latest(abstract()).step == 2
        assert saved.steps() == [2, 3, 4]
        saved.save(3, state_at(33), {"loss": 0.3})
        saved.wait()
        assert saved.steps() == [2, 3]
        saved.save(4, state_at(44), {"loss": 0.2})
        saved.save(5, state_at(55), {"loss": 0.1})
    assert saved.steps() == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == ["damaged-3-1", "damaged-3-2", "damaged-4-1"]
    assert (tmp_path / "damaged-3-2" / "record.json").read_bytes() == damaged[3]
    assert (tmp_path / "damaged-4-1" / "record.json").read_bytes() == damaged[4]
    restored = latest(tmp_path)
    assert restored.step == 5
    assert_same(restored.state, state_at(55))
    truncate(data_file(tmp_path, 5))
    assert_same(latest(tmp_path).state, state_at(44))


def test_damage_to_what_only_orbax_reads_stops_neither_restoring_nor_saving(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("[]")
    with checkpoints.open(tmp_path) as saved:
        assert_same(saved.restore_latest(abstract()).state, state_at(2))
        saved.save(3, state_at(3))
    assert saved.steps() == [1, 2, 3]


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path, caplog):
    with checkpoints.open(tmp_path) as saved:
        for step, loss in [(1, 0.1), (2, 0.3), (3, 0.2)]:
            saved.save(step, state_at(step), {"loss": loss})
    truncate(data_file(tmp_path, 1))
    assert saved.restore_best(abstract()).step == 3
    assert "going back to step 3" in caplog.messages[0]


def test_when_none_is_whole_the_error_says_so_in_one_line(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(data_file(tmp_path, step))
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole \(step 1: state/.*\); to start over") as caught:
        latest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_system_that_fails_for_a_moment_is_no_damage(three, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(three, tmp_path / "copy")

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with checkpoints.open(folder) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_fingerprint", fail)
            with pytest.raises(UsageError, match=r"cannot read .*/3: .*Input/output error; try again") as caught:
                saved.restore_latest(abstract())
        assert "\n" not in str(caught.value)
        assert saved.restore_latest(abstract()).step == 3
    assert not caplog.messages


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), ValueError("the sharding does not divide")])
def test_what_goes_wrong_after_the_checksums_hold_is_no_damage(three, monkeypatch, caplog, error):
    def fail(self, *arguments, **keywords):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    for restore in ("restore_latest", "restore_best"):
        with checkpoints.open(three) as saved, pytest.raises(type(error)) as caught:
            getattr(saved, restore)(abstract())
        assert caught.value is error
    assert not caplog.messages


def test_hosts_check_a_part_each_and_all_hear_of_damage_and_errors(three, tmp_path, monkeypatch):
    """Of two hosts this one looks at every other file, and the other's answers are given here."""
    folder, agreed = shutil.copytree(three, tmp_path / "copy"), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    looked = []
    fingerprint = checkpoints._fingerprint
    monkeypatch.setattr(checkpoints, "_fingerprint", lambda path: looked.append(path) or fingerprint(path))
    monkeypatch.setattr(checkpoints, "_agreed", lambda ok: agreed.append(ok) or len(agreed) != 2)
    with checkpoints.open(folder) as saved:
        whole = saved._damage(3) is None
        assert (whole, len(looked)) == (True, (len(saved._read_record(3)["files"]) + 1) // 2)
        monkeypatch.setattr(saved, "_read", lambda step, state: checkpoints.Restored(step, state, {}, None))
        assert saved.restore_latest(abstract()).step == 2  # the other found 3 damaged
        agreed.append(True)
        monkeypatch.setattr(checkpoints, "_agreed", lambda ok: False)
        with pytest.raises(UsageError, match="another host failed"):
            saved.restore_latest(abstract())


def test_a_checkpoint_of_another_model_is_refused_not_taken_for_damaged(three):
    other = abstract() | {"w": jax.ShapeDtypeStruct((64, 25), jnp.float32)}
    message = r"\['w'\] is float32\[64, 24\] there and float32\[64, 25\] here"
    with checkpoints.open(three) as saved, pytest.raises(UsageError, match=message):
        saved.restore_latest(other)
    missing = {"w": abstract()["w"]}
    with (
        checkpoints.open(three) as saved,
        pytest.raises(UsageError, match=r"\['b'\] is bfloat16\[3\] there and missing"),
    ):
        saved.restore_latest(missing)

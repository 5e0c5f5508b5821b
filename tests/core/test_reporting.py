"""A run's folder survives kills and mistakes; what it shows is what was written."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import figures, reporting
from esscher.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Hyper:
    lr: tuple[float, ...] = (1e-3,)
    clip: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    data_dir: pathlib.Path | None = pathlib.Path("somewhere")
    hyper: Hyper = dataclasses.field(default_factory=Hyper)


def open_run(root, config=None, **keywords):
    return reporting.open_run(config or Config(), experiment="toy", name="one", root=root, **keywords)


# --- the run's folder -------------------------------------------------------------------------------------------------


def test_a_new_run_gets_its_folder_and_configuration(tmp_path):
    folder = open_run(tmp_path)
    assert folder == tmp_path / "toy" / "one"
    assert (folder / "figures").is_dir()
    assert json.loads((folder / "config.json").read_text()) == {
        "steps": 10,
        "data_dir": "somewhere",
        "hyper": {"lr": [1e-3], "clip": [1.0]},
    }


def test_the_same_configuration_returns_to_the_folder(tmp_path):
    (open_run(tmp_path) / "metrics.jsonl").write_text("kept")
    assert (open_run(tmp_path) / "metrics.jsonl").read_text() == "kept"


def test_another_configuration_is_refused_in_one_line_that_names_the_fields(tmp_path):
    folder = open_run(tmp_path)
    before = (folder / "config.json").read_text()
    other = Config(steps=20, hyper=Hyper(lr=(1e-3, 2e-3)))
    with pytest.raises(UsageError) as caught:
        open_run(tmp_path, other)
    message = str(caught.value)
    assert "\n" not in message
    assert "(steps is 10 there, 20 here; hyper.lr is [0.001] there, [0.001, 0.002] here)" in message
    assert "clip" not in message
    assert (folder / "config.json").read_text() == before


def test_fields_that_may_change_do_and_are_stored(tmp_path):
    open_run(tmp_path)
    folder = open_run(tmp_path, Config(steps=20), may_change={"steps"})
    assert json.loads((folder / "config.json").read_text())["steps"] == 20
    open_run(tmp_path, Config(steps=30, hyper=Hyper(clip=(2.0,))), may_change={"steps", "hyper"})
    with pytest.raises(UsageError, match=r"hyper\.clip is \[2\.0\] there, \[1\.0\] here\)"):
        open_run(tmp_path, Config(steps=30), may_change={"steps"})


def test_fields_that_only_one_side_has_differ(tmp_path):
    folder = open_run(tmp_path, {"a": 1, "b": None})
    with pytest.raises(UsageError, match=r"\(b is None there, absent here; c is absent there, 3 here\)"):
        open_run(tmp_path, {"a": 1, "c": 3})
    (folder / "config.json").write_text("{")
    for damaged in (b"{", b"\xff{}"):
        (folder / "config.json").write_bytes(damaged)
        with pytest.raises(UsageError, match=r"config\.json is damaged"):
            open_run(tmp_path, {"a": 1})


@pytest.mark.parametrize("name", ["", "../other", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="must be made of letters"):
        reporting.open_run(Config(), experiment="toy", name=name, root=tmp_path)


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*file.*; choose another folder"):
        open_run(tmp_path / "file")


OPEN = """
import pathlib, sys
from esscher.core import reporting
reporting.open_run({"a": 1}, experiment="toy", name="one", root=sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "open\n"
        before = (tmp_path / "toy" / "one" / "config.json").stat().st_mtime_ns
        with pytest.raises(UsageError, match=r"another process is running the run in .*; end it, or choose") as caught:
            open_run(tmp_path, {"a": 1})
        assert "\n" not in str(caught.value)
        assert (tmp_path / "toy" / "one" / "config.json").stat().st_mtime_ns == before
    finally:
        first.kill()
        first.communicate()
    for _ in range(2):  # the lock has gone with its process, and is this one's as often as it asks
        folder = open_run(tmp_path, {"a": 1})
    other = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert (other.returncode, "another process is running" in other.stderr) == (1, True)
    assert {path.name for path in folder.iterdir()} == {".lock", "config.json", "figures"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_a_run_is_opened_all_the_same(tmp_path, monkeypatch, number):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert (open_run(tmp_path) / "config.json").exists()


# --- metrics ----------------------------------------------------------------------------------------------------------


def losses(step):
    return {"loss": np.float32(1 / step), "sweep": jnp.array([step, 0.1], jnp.float32)}


def run(folder, first, last, resumed_step):
    with reporting.log_metrics(folder, resumed_step) as write:
        for step in range(first, last + 1):
            write(step, losses(step))


def test_after_a_resume_the_file_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    run(whole, 1, 9, -1)
    run(resumed, 1, 7, -1)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.1')  # killed here
    run(resumed, 5, 9, 4)
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    run(resumed, 1, 2, -1)  # a fresh start empties the file
    assert len((resumed / "metrics.jsonl").read_text().splitlines()) == 2


def test_lines_that_a_crash_damaged_are_left_out(tmp_path):
    run(tmp_path, 1, 3, -1)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        b"null\n",
        b"7\n",
        b'{"loss": 1}\n',
        b'{"step": null}\n',
        b"\xff\xfe\n",
        bytes(9) + b"\n",
        b'{"step": 4, "lo',
    ]
    path.write_bytes(b"".join([*damaged[:3], *lines, *damaged[3:]]))
    np.testing.assert_array_equal(reporting.read_metrics(tmp_path)["loss"][0], [1, 2, 3])
    run(tmp_path, 3, 3, 2)
    assert path.read_bytes() == b"".join(lines)


KILLED = """
import os, pathlib, signal, sys
from esscher.core import reporting
with reporting.log_metrics(pathlib.Path(sys.argv[1])) as write:
    for step in range(1, 4):
        write(step, {"loss": 1 / step})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lines_written_before_kill_9_are_there(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    steps, values = reporting.read_metrics(tmp_path)["loss"]
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [1, 1 / 2, 1 / 3])


def test_metrics_are_read_as_written_and_what_is_not_finite_as_nan(tmp_path):
    with reporting.log_metrics(tmp_path) as write:
        write(5, {"loss": 0.5, "sweep": [1.0, float("inf")]})
        write(10, {"loss": float("nan")})
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    metrics = reporting.read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics["loss"][0], [5, 10])
    np.testing.assert_array_equal(metrics["loss"][1], [0.5, np.nan])
    np.testing.assert_array_equal(metrics["sweep"][0], [5])
    np.testing.assert_array_equal(metrics["sweep"][1], [[1, np.nan]])
    assert reporting.read_metrics(tmp_path / "none") == {}


def events(folder):
    """Step, session status and scalars of every TensorBoard event, in the order of files and of writing."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_ctime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # a record is: length, its checksum, the event, its checksum
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found.append((event.step, event.session_log.status, {x.tag: x.simple_value for x in event.summary.value}))
            at += size + 16
    return found


def test_tensorboard_gets_every_scalar_and_is_told_what_a_resumed_run_repeats(tmp_path):
    run(tmp_path, 1, 3, -1)
    run(tmp_path, 3, 4, 2)  # within the same second: it must not overwrite the first file
    scalars = [(step, values) for step, _, values in events(tmp_path) if values]
    assert [step for step, values in scalars if "loss" in values] == [1, 2, 3, 3, 4]
    sweep = [(step, values["sweep/0"]) for step, values in scalars if "sweep/0" in values]
    assert sweep == [(1, 1), (2, 2), (3, 3), (3, 3), (4, 4)]
    assert [step for step, status, _ in events(tmp_path) if status] == [0, 3]  # what is to be forgotten, each time


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    with reporting.progress(100, start=20, label="training") as update:
        for step in range(21, 101):
            clock.now += 0.5
            update(step, loss=jnp.float32(1 / step), lr=np.array([0.1, 0.3]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "training 21/100  loss 0.04762  lr 0.2  2/s  0:00:40 left"
    assert [line.split()[1] for line in printed] == ["21/100", "41/100", "61/100", "81/100", "100/100"]
    assert printed[-1].endswith("2/s  0:00:00 left")


def test_values_are_looked_at_only_when_shown(capsys):
    class Costly:
        looks = 0

        def __array__(self, *arguments, **keywords):
            Costly.looks += 1
            return np.zeros(())

    with reporting.progress(1000) as update:
        for step in range(1, 1001):
            update(step, loss=Costly())
    shown = len(capsys.readouterr().out.splitlines())
    assert shown <= 3
    assert Costly.looks <= 2 * shown


def test_on_a_terminal_progress_is_a_bar_with_rate_values_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with reporting.progress(50, start=10) as update:
        for step in range(11, 51):
            time.sleep(0.005)
            update(step, loss=0.25)
    printed = capsys.readouterr().out
    assert "50/50" in printed
    assert "loss 0.25" in printed
    assert "/s" in printed
    assert "left" in printed


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting.jax, "process_index", lambda: 1)
    folder = open_run(tmp_path)
    run(folder, 1, 3, -1)
    with reporting.progress(3) as update:
        update(3, loss=1.0)
    reporting.write_report(folder, "title", {"a": "b"})
    figures.lines(folder / "figures" / "a.png", figures.Panel({"a": ([1], [2])}, "x", "y"))
    figures.image_grid(np.zeros((1, 1, 2, 2, 1)), ["a"], ["b"], folder / "figures" / "b.png")
    reporting.print_results(folder)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


# --- report and figures -----------------------------------------------------------------------------------------------


def test_the_report_has_its_sections_and_pictures_that_exist(tmp_path, capsys):
    folder = open_run(tmp_path)
    figure = figures.lines(folder / "figures" / "loss.png", figures.Panel({"a": ([1, 2], [2, 1])}, "x", "y"))
    body = reporting.picture(figure, folder, "Loss.")
    path = reporting.write_report(folder, "Digits", {"Training": body, "Table": "| a |\n"})
    text = path.read_text()
    assert text == "# Digits\n\n## Training\n\n![Loss.](figures/loss.png)\n\n*Loss.*\n\n## Table\n\n| a |\n"
    reporting.print_results(folder)
    assert capsys.readouterr().out.split() == ["report", str(path), "picture", str(figure)]


def test_a_table_has_four_digits_and_numbers_to_the_right():
    table = reporting.table(["solver", "n", "distance"], [["heun", 20, np.float32(1.23456)], ["ddim (0.5)", 5, 1e-7]])
    assert table.splitlines() == [
        "| solver     |  n | distance |",
        "|:-----------|---:|---------:|",
        "| heun       | 20 |    1.235 |",
        "| ddim (0.5) |  5 |    1e-07 |",
    ]
    assert reporting.table(["a"], []).splitlines() == ["| a |", "|--:|"]
    assert reporting.table(["a|b"], [["|"], ["x"]]).splitlines() == ["| a\\|b |", "|:-----|", "| \\|   |", "| x    |"]

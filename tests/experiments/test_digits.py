"""The digits run trains, samples and reports; it resumes bitwise, and is the same on any mesh and in any sweep."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import checkpoints, meshes, reporting, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import cli, digits, quality, sampling, steered

TINY = digits.Config(steps=40, save_every=20, batch_size=16, width=16, depth=1, samples=20, evaluations=(4,), steered=8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def config(tmp_path, data_dir):
    return dataclasses.replace(TINY, runs=tmp_path, data_dir=data_dir, mesh="data=1")


def folder(config):
    return config.runs / "digits" / config.name


def losses(config):
    return reporting.read_metrics(folder(config))["loss"][1]


def saved_state(config):
    """The leaves of the last checkpoint, as they lie on disk."""
    mesh = meshes.make(**meshes.parse(config.mesh))
    program, _ = digits.build(config, (8, 8, 1), 10, mesh, sweeps.grid(config.hyper))
    with checkpoints.open(folder(config) / "checkpoints") as store:
        return store.restore_latest(program.state)


def train_only(config, **changes):
    """Trains without the evaluation, whose compilations would dominate the test."""
    config = dataclasses.replace(config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_evaluate", lambda *_: None)
        digits.main(config)
    return config


def test_a_whole_run_writes_everything_it_promises(config, capsys):
    digits.main(dataclasses.replace(config, weights=(0.0, 2.0)))
    run = folder(config)
    assert json.loads((run / "config.json").read_text())["steps"] == 40
    figures = {path.name for path in (run / "figures").glob("*.png")}
    assert figures == {"samples.png", "solvers.png", "steered.png", "training.png"}
    assert list((run / "tensorboard").glob("events*"))
    report = (run / "report.md").read_text()
    for solver in sampling.SOLVERS:
        assert re.search(rf"\| {re.escape(solver)} +\| +4 \|", report), solver
    for method in steered.METHODS:
        assert len(re.findall(rf"\| {re.escape(method)} +\|", report)) == 3, method
    steps, values = reporting.read_metrics(run)["loss"]
    assert steps.tolist() == [20, 40]
    assert values[1] < values[0]
    out = capsys.readouterr().out
    assert f"picture  {run / 'figures' / 'samples.png'}" in out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "40"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_u_net_is_built_by_flag(dtype):
    """Traced only: compiling it takes a minute on two cores, and tests/models runs it."""
    config = dataclasses.replace(TINY, model="unet", width=8, dtype=dtype)
    mesh, sweep = meshes.make(data=1), sweeps.grid(config.hyper)
    program, _ = digits.build(config, (8, 8, 1), 10, mesh, sweep)
    batch = {"image": jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32), "label": jax.ShapeDtypeStruct((16,), jnp.int32)}
    state, metrics = jax.eval_shape(program.step, program.state, jax.random.key(0), batch, sweep.values)
    assert metrics["loss"].shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    assert any("conv" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params))


def test_the_same_command_after_the_end_changes_no_parameter(config):
    config = train_only(config)
    before, lines = saved_state(config), (folder(config) / "metrics.jsonl").read_text()
    train_only(config)
    jax.tree.map(np.testing.assert_array_equal, saved_state(config).state, before.state)
    assert (folder(config) / "metrics.jsonl").read_text() == lines


COMMAND = [
    sys.executable,
    "-m",
    "esscher.experiments.digits",
    "--evaluations",
    "4",
    "--weights",
    "1",
    "--samples",
    "10",
    "--steered",
    "0",
]


def start(config, name, steps=200):
    """The command line in a process of its own, on one device."""
    flags = {"name": name, "runs": config.runs, "data-dir": config.data_dir, "steps": steps, "save-every": 40}
    flags |= {"batch-size": 16, "width": 16, "depth": 1}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_checkpoint(run, process):
    while not any(path.name.isdigit() for path in run.glob("checkpoints/*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_and_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(config, number):
    runs = config.runs / "digits"
    whole, broken = start(config, "whole"), start(config, "broken")
    wait_for_checkpoint(runs / "broken", broken)
    broken.send_signal(number)
    output = broken.communicate()[0]
    if number == signal.SIGTERM:
        assert broken.returncode == 0, output
        assert re.search(r"stopped at step \d+ and saved", output)
    assert not (runs / "broken" / "report.md").exists()
    resumed = start(config, "broken")
    for process in (resumed, whole):
        output = process.communicate()[0]
        assert process.returncode == 0, output
    ends = [saved_state(dataclasses.replace(config, name=name, steps=200)) for name in ("whole", "broken")]
    assert ends[0].step == ends[1].step == 200
    jax.tree.map(np.testing.assert_array_equal, ends[0].state, ends[1].state)
    assert (runs / "whole" / "metrics.jsonl").read_text() == (runs / "broken" / "metrics.jsonl").read_text()


def test_eight_devices_give_the_loss_curve_of_one(config):
    alone = losses(train_only(config))
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        together = losses(train_only(config, mesh=mesh, name=mesh.replace(",", "+")))
        np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_members_of_a_sweep_over_devices_have_the_loss_curves_of_single_runs(config):
    rates = (1e-3, 4e-3)
    swept = train_only(config, mesh="sweep=2,data=4", name="sweep", hyper=digits.Hyper(lr=rates))
    for index, rate in enumerate(rates):
        alone = train_only(config, name=f"lr={rate}", hyper=digits.Hyper(lr=(rate,)))
        np.testing.assert_allclose(losses(swept)[:, index], losses(alone), rtol=1e-4)
    assert abs(losses(swept)[1, 0] / losses(swept)[1, 1] - 1) > 1e-3


@pytest.mark.parametrize("best", [0, 1])
def test_a_sweep_is_evaluated_at_its_best_member(config, monkeypatch, best):
    rates = (4e-3, 1e-9)[:: 1 - 2 * best]
    seen = []
    monkeypatch.setattr(sampling, "by_weight", lambda study, *_: seen.append(study.params) or ({}, []))
    monkeypatch.setattr(sampling, "report", lambda *_: {})
    digits.main(dataclasses.replace(config, evaluations=(), steered=0, hyper=digits.Hyper(lr=rates)))
    swept = dataclasses.replace(config, hyper=digits.Hyper(lr=rates))
    expected = jax.tree.map(lambda leaf: leaf[best], saved_state(swept).state.ema)
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)


def test_a_diverging_run_stops_keeps_its_checkpoint_and_writes_the_bad_batch(config, monkeypatch):
    train_only(config)
    before = saved_state(config).state
    images = digits.data.normalise
    monkeypatch.setattr(digits.data, "normalise", lambda x: images(x) * np.float32("nan"))
    monkeypatch.setattr(digits, "MAY_CHANGE", (*digits.MAY_CHANGE, "steps"))
    with pytest.raises(UsageError, match=r"not finite in too many steps.*bad_batch\.npz"):
        train_only(config, steps=400)
    with np.load(folder(config) / "bad_batch.npz") as bad:
        assert np.isnan(bad["image"]).all()
    jax.tree.map(np.testing.assert_array_equal, saved_state(config).state.params, before.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -5}, "--steps must be at least 1, got -5"),
        ({"save_every": 30}, "--save-every must be a multiple of 20, got 30"),
        ({"evaluations": (1,)}, "--evaluations must be at least 2 each"),
        ({"mesh": "date=8"}, "--mesh date=8: write axis=size"),
        ({"mesh": "data=8", "batch_size": 12}, "--batch-size 12 does not split over 8 devices"),
        ({"mesh": "sweep=2"}, "1 sweep members do not split over sweep=2"),
        ({"dataset": "digit"}, "unknown data set 'digit'; did you mean"),
        ({"data_dir": pathlib.Path("/nowhere/at/all")}, "data folder /nowhere/at/all does not exist"),
        ({"name": "../up"}, "the run's name '../up' must be made of"),
        ({"weights": ()}, "--weights needs finite guidance weights, each of them once, got ()"),
        ({"weights": (1.0, float("nan"))}, "--weights needs finite"),
        ({"weights": (1.0, 1.0)}, "--weights needs finite"),
        ({"hyper": digits.Hyper(lr=(-1.0,))}, "--hyper.lr must be at least 0, got -1.0"),
        ({"hyper": digits.Hyper(lr=(float("nan"),))}, "--hyper.lr must be at least 0, got nan"),
        ({"hyper": digits.Hyper(ema_decay=(0.9, 2.0))}, "--hyper.ema-decay must be between 0 and 1, got 0.9 2.0"),
        ({"hyper": digits.Hyper(label_dropout=(1.5,))}, "--hyper.label-dropout must be between 0 and 1"),
        ({"hyper": digits.Hyper(lr=(0.1, 0.1))}, "--hyper.lr needs numbers, each of them once, got 0.1 0.1"),
        ({"steered": -1}, "--steered must be at least 2, or 0 to leave steering out, got -1"),
        ({"steered": 1}, "--steered must be at least 2, or 0"),
        ({"width": 90}, "--model dit: width must be a multiple of 4, got 90"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"distributed": True}, "--distributed: "),
    ],
)
def test_what_a_user_got_wrong_is_one_line_before_anything_is_made(config, changes, message):
    with pytest.raises(UsageError) as error:
        digits.main(dataclasses.replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not folder(config).exists()


def test_another_configuration_in_the_same_folder_is_refused(config):
    train_only(config)
    with pytest.raises(UsageError, match="batch_size is 16 there, 32 here"):
        train_only(config, batch_size=32)


def test_the_command_line_shows_errors_in_one_line_and_exits_with_two(config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(digits.main, digits.Config, ["--steps", "0", "--runs", str(config.runs)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1, got 0\n"


def test_the_command_lists_experiments_and_names_unknown_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["esscher"])
    cli.main()
    assert "digits" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["esscher", "digit"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    known = "arithmetic, digits, policy-race, preference-race"
    assert f"no experiment 'digit'; there are: {known}" in capsys.readouterr().err


def test_several_values_of_a_flag_span_a_grid(capsys):
    seen = []
    cli.run(seen.append, digits.Config, ["--hyper.lr", "1e-3", "2e-3", "--hyper.clip", "1", "--mesh", "data=8"])
    assert seen[0].hyper.lr == (1e-3, 2e-3)
    assert seen[0].mesh == "data=8"


@pytest.mark.parametrize("label", [[0, 10], [-1, 3]])
def test_a_label_that_is_no_class_is_refused(label):
    study = sampling.Study(None, None, (8, 8, 1), 10, meshes.make(data=1), jax.random.key(0))
    with pytest.raises(ValueError, match=r"label must be in 0 \.\. 9, got"):
        sampling.draw(study, "Heun", 4, np.array(label))


@pytest.mark.parametrize("solver", sampling.SOLVERS)
@pytest.mark.parametrize("budget", [4, 20])
def test_a_solver_spends_its_budget_and_no_more(solver, budget):
    calls = []

    def denoise(params, x, sigma, label):
        jax.debug.callback(lambda: calls.append(None))
        return 0.5 * x

    sample = jax.jit(sampling.sampler(denoise, (2, 2, 1), 10, sampling.SOLVERS[solver][0](sampling.EDM)))
    sample(None, jax.random.key(0), jnp.zeros(3, jnp.int32), None, sampling.noise_levels(solver, budget))
    jax.effects_barrier()
    per_step = sampling.SOLVERS[solver][1]
    assert budget - per_step < len(calls) <= budget


def test_the_judge_knows_real_digits_from_mislabelled_ones():
    x, y = digits.data.arrays(digits.data.load("digits", "train"))
    judge = quality.fit_judge((x[:1000], y[:1000]), (x[1000:], y[1000:]))
    assert judge.accuracy > 0.95
    assert quality.agreement(judge, x[1000:], y[1000:]) == judge.accuracy
    assert quality.agreement(judge, x[1000:], (y[1000:] + 1) % 10) < 0.05
    assert quality.distance(judge, x[:1000]) < 1e-3 < judge.floor < quality.distance(judge, x[1000:] * 0.8)

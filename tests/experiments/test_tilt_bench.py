"""The scoreboard counts what is asked, runs all samplers within their budgets, ranks a user's, says what is wrong."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.errors import UsageError
from esscher.experiments import tilt_bench, tilt_problems, tilt_samplers

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = tilt_bench.Config(
    problems=("1-D linear", "strings"), methods=("model", "importance"), calls=(8, 16), samples=256, seeds=2
)
LINE, STRINGS = (tilt_problems.make(name) for name in ("1-D quadratic", "strings additive"))


def asked(problem, sampler, n=64, calls=8):
    compiled = tilt_bench.compile_sampler(problem, sampler, n, calls)
    exact = [problem.exact(jax.random.key(9), n)] * 2
    return tilt_bench.measure(problem, compiled, exact)


def looking(look):
    """A sampler that asks the model and returns the start."""

    def sample(key, task, n, calls):
        x = task.start(key, n)
        data = look(lambda x: task.model(x, jnp.full(len(x), 0.5)).data, x)
        return x + 0 * data.sum()

    return sample


@pytest.mark.parametrize(
    ("look", "calls"),
    [
        (lambda ask, x: ask(x), 1),
        (lambda ask, x: ask(x[:16]), 1 / 4),
        (lambda ask, x: jax.lax.scan(lambda x, _: (ask(x), None), x, length=5)[0], 5),
        (lambda ask, x: jax.lax.fori_loop(0, 3, lambda _, x: ask(x), x), 3),
        (lambda ask, x: jax.lax.cond(x[0, 0] > 100, ask, lambda x: x, x), 0),
        (lambda ask, x: jax.vmap(lambda shift: ask(x + shift))(jnp.arange(4.0)), 4),
        (lambda ask, x: jax.vmap(lambda point: ask(point[None]))(x), 1),
        (lambda ask, x: jax.grad(lambda x: ask(x).sum())(x), 1),
        (lambda ask, x: (ask(x), x)[1], 0),
        (lambda ask, x: ask(x) + ask(x), 2),
    ],
    ids=["once", "a part", "scan", "loop", "branch", "vmap", "one by one", "gradient", "unused", "twice"],
)
def test_calls_are_counted_as_the_program_runs(look, calls):
    assert asked(LINE, looking(look)).calls == calls


TABLES = [(LINE, tilt_samplers.VECTORS), (STRINGS, tilt_samplers.STRINGS)]


@pytest.mark.parametrize(
    ("problem", "sampler"),
    [
        pytest.param(problem, sampler, id=f"{problem.space} {name}")
        for problem, table in TABLES
        for name, sampler in table.items()
    ],
)
def test_every_sampler_keeps_to_its_budget_and_finds_the_reward(problem, sampler):
    """A rough check of the wiring; laws are tested beside the samplers. The model is some ten floors from the tilt."""
    found, model = (asked(problem, wanted, n=512, calls=24) for wanted in (sampler, tilt_samplers.base))
    assert 10 <= found.calls <= 24
    kl, start = found.found["KL"].mean(), model.found["KL"].mean()
    collapsing = [tilt_samplers.VECTORS[name] for name in ("SVDD 4 greedy", "FK sum")]
    if sampler in collapsing:
        assert np.isfinite(kl)
    elif sampler is not tilt_samplers.base:
        assert kl < 0.9 * start


def test_a_small_race_writes_its_tables_and_pictures(tmp_path):
    tilt_bench.main(dataclasses.replace(TINY, runs=tmp_path))
    folder = tmp_path / "tilt-bench" / "default"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 2 * 2 * 3  # methods, budgets, problems
    for row in rows:
        np.testing.assert_allclose(float(row["ratio to floor"]), float(row["KL"]) / float(row["KL floor"]), rtol=1e-6)
        assert float(row["calls"]) == float(row["budget"])
    ratio = {(row["problem"], row["sampler"], row["budget"]): float(row["ratio to floor"]) for row in rows}
    assert ratio["1-D linear", "importance", "16"] < 0.5 * ratio["1-D linear", "model", "16"]
    report = (folder / "report.md").read_text()
    line = report.index("## 1-D")
    assert line < report.index("| importance ", line) < report.index("| model ", line) < report.index("## strings")
    assert len(list((folder / "figures").glob("*.png"))) == 2


MINE = """
import jax.numpy as jnp

def still(key, task, n, calls):
    return task.start(key, n)

def short(key, task, n, calls):
    return task.start(key, n)[:-1]

def narrow(key, task, n, calls):
    return task.start(key, n) @ jnp.ones(3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_samplers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_sampler_of_the_users_own_is_ranked_beside_the_others(tmp_path, mine):
    config = dataclasses.replace(
        TINY, problems=("1-D linear",), calls=(8,), sampler=("my_samplers.still",), runs=tmp_path
    )
    tilt_bench.main(config)
    rows = list(csv.DictReader((tmp_path / "tilt-bench" / "default" / "table.csv").open()))
    assert [row["sampler"] for row in rows] == ["model", "importance", "still"]
    assert float(rows[-1]["calls"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": ("3-D",)}, "--problems: no 3-D; there are 1-D, 2-D, 16-D, 64-D, strings, 1-D linear"),
        ({"methods": ("TDS", "TSD")}, "--methods: no TSD; there are model, importance"),
        ({"methods": ("APS",)}, "--methods: none of APS runs on 1-D linear"),
        ({"calls": (64, 4)}, r"--calls must be at least 8 each, got \(64, 4\)"),
        ({"samples": 10}, "--samples must be at least 64, got 10"),
        ({"samples": 0}, "--samples must be at least 64, got 0"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"sampler": ("nowhere.at_all",)}, "--sampler nowhere.at_all: there is no module 'nowhere'"),
        ({"sampler": ("my_samplers.other",)}, "--sampler: my_samplers has no function 'other'"),
        (
            {"sampler": ("my_samplers.short",)},
            r"my_samplers.short: must return float32\[8, 1\] for 1-D, got float32\[7, 1\]",
        ),
        ({"sampler": ("my_samplers.narrow",)}, "--sampler my_samplers.narrow: .*dot"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, mine, changes, message):
    runs = tmp_path / "runs"
    with pytest.raises(UsageError, match=message):
        tilt_bench.main(dataclasses.replace(TINY, **{"problems": ("1-D linear",), "runs": runs} | changes))
    assert not runs.exists()

"""The scoreboard counts what is asked, runs all samplers within their budgets, ranks a user's, says what is wrong."""

import csv
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.errors import UsageError
from esscher.core.exact import masked
from esscher.experiments import tilt_bench, tilt_problems, tilt_samplers

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = tilt_bench.Config(
    problems=("1-D linear", "strings"), methods=("model", "importance"), calls=(8, 16), samples=256, seeds=2
)
LINE, STRINGS = PROBLEMS = tuple(tilt_problems.make(name) for name in ("1-D quadratic", "strings additive"))


def asked(problem, sampler, n=64, calls=8):
    compiled = tilt_bench.compile_sampler(problem, sampler, n, calls)
    exact = [problem.exact(jax.random.key(9), n)] * 2
    return tilt_bench.measure(problem._replace(measure=functools.partial(said, problem)), compiled, exact)


def said(problem, x, exact=None):
    """What the problem measures, and the mean reward."""
    reward = problem.task(problem.parameters, lambda model: model).log_reward(x).mean()
    return problem.measure(x, x) | {"reward": reward}


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


TABLES = {"1-D": tilt_samplers.VECTORS, "strings": tilt_samplers.STRINGS}
KEYS = jax.random.split(jax.random.key(5), 16)


@functools.cache
def ends(space):
    """Of exact samples of the model, then of the tilt: 16 sets of 512, KL to the tilt and mean reward of each."""
    (problem,) = (problem for problem in PROBLEMS if problem.space == space)
    given, states = problem.parameters, masked.states(tilt_problems.SYMBOLS, tilt_problems.LENGTH)
    if problem is LINE:
        model = lambda key, n: given.mixture().sample(key, n)  # noqa: E731
    else:
        model = lambda key, n: states[jax.random.categorical(key, given.log_probs, shape=(n,))]  # noqa: E731
    sets = [[said(problem, law(key, 512)) for key in KEYS] for law in (model, problem.exact)]
    return [{name: np.array([float(one[name]) for one in of]) for name in ("KL", "reward")} for of in sets]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["1-D", "strings"])
def test_the_row_of_the_model_is_the_model(problem):
    """Two runs against exact samples, to 5 standard errors and 0.05 for the steps; the tilt is far away."""
    found, (model, tilt) = asked(problem, tilt_samplers.base, n=512, calls=128), ends(problem.space)
    assert found.calls == 128
    for name in ("KL", "reward"):
        allowed = 0.05 + 5 * model[name].std(ddof=1) * (1 / 2 + 1 / len(KEYS)) ** 0.5
        assert abs(found.found[name].mean() - model[name].mean()) < allowed
        assert abs(tilt[name].mean() - model[name].mean()) > 3 * allowed


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        pytest.param(problem, name, id=f"{problem.space} {name}")
        for problem in PROBLEMS
        for name in TABLES[problem.space]
        if name != "model"
    ],
)
def test_every_sampler_keeps_to_its_budget_and_finds_the_reward(problem, name):
    """A rough check of the wiring; laws are tested beside the samplers. The model is some hundred floors from the tilt.

    On the line choices among runs of six steps leave most of the bins empty, whatever they gain, and the sum of rewards
    on the way overshoots: the KL of these says nothing.
    """
    found = asked(problem, TABLES[problem.space][name], n=512, calls=24)
    assert 10 <= found.calls <= 24
    model, tilt = ends(problem.space)
    start, end = model["reward"].mean(), tilt["reward"].mean()
    gone = (found.found["reward"].mean() - start) / (end - start)
    assert gone > 0.4
    if name == "FK sum":
        assert gone > 1.01
    elif (problem.space, name) not in [("1-D", "best of 4"), ("1-D", "tree 4")]:
        assert found.found["KL"].mean() < 0.9 * model["KL"].mean()


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

def lost(key, task, n, calls):
    return {}["beta"]

def silent(key, task, n, calls):
    assert n > calls ** 9

importance = still
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    for name in ("my_samplers", "others"):
        (tmp_path / f"{name}.py").write_text(MINE)
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


def test_a_name_that_is_taken_gives_way_to_the_path(mine):
    paths = ("my_samplers.still", "others.still", "my_samplers.importance")
    config = dataclasses.replace(TINY, methods=("model",), sampler=paths)
    for table in tilt_bench._samplers(config, ["1-D linear", "strings additive"]).values():
        assert list(table) == ["model", *paths]
        assert table["model"] is tilt_samplers.base


def test_strings_with_masks_left_have_no_rank(tmp_path, mine, monkeypatch, recwarn):
    """They stand last, as nan; figures leave out what has no place on logarithmic axes, such as no calls."""
    drawn, draw = [], tilt_bench.figures.lines
    monkeypatch.setattr(tilt_bench.figures, "lines", lambda path, *panels: drawn.append(panels) or draw(path, *panels))
    config = dataclasses.replace(TINY, methods=("twisted",), calls=(8,), sampler=("my_samplers.still",), runs=tmp_path)
    tilt_bench.main(config)
    folder = tmp_path / "tilt-bench" / "default"
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    unranked = {(row["problem"], row["sampler"]) for row in rows if row["ratio to floor"] == "nan"}
    assert unranked == {("strings additive", "still"), ("strings pairwise", "still")}
    last = (folder / "report.md").read_text().strip().splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:6]] == ["still", "nan", "nan", "nan", "0"]
    shown = [[list(panel.series) for panel in panels] for panels in drawn]
    assert shown == [[["twisted"]], [["still"], ["twisted"]]]
    assert not [str(warning.message) for warning in recwarn]


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
        ({"sampler": ("my_samplers.narrow",)}, "--sampler my_samplers.narrow: TypeError: .*dot"),
        ({"sampler": ("my_samplers.lost",)}, "^--sampler my_samplers.lost: KeyError: 'beta'$"),
        ({"sampler": ("my_samplers.silent",)}, "^--sampler my_samplers.silent: AssertionError$"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, mine, changes, message):
    runs = tmp_path / "runs"
    with pytest.raises(UsageError, match=message):
        tilt_bench.main(dataclasses.replace(TINY, **{"problems": ("1-D linear",), "runs": runs} | changes))
    assert not runs.exists()

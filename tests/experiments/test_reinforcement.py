"""The rl stage samples, verifies and learns; by any objective, in sweeps, on any mesh, with adapters and hints."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes, reporting, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import (
    arithmetic,
    language,
    reinforcement,
    rollouts,
    runs,
    setups,
    verifiers,
)
from esscher.objectives import policy as objectives

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = arithmetic.Config(
    stage="rl",
    steps=20,
    save_every=20,
    batch_size=16,
    group=8,
    epochs=1,
    digits=1,
    length=16,
    problems=32,
    samples=4,
    mesh="data=1",
    hyper=arithmetic.Hyper(lr=(1e-3,)),
)


@pytest.fixture
def config(tmp_path, model):
    return dataclasses.replace(TINY, runs=tmp_path / "runs", model=model)


@pytest.fixture
def from_file(config, llama, write_lines):
    """Sums of a file for a tiny Llama with an adapter."""
    lines = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    return dataclasses.replace(config, digits=2, model=llama, data=write_lines("sums.jsonl", lines), lora=2)


def folder(config):
    return config.runs / "arithmetic-rl" / config.name


def prepared(config):
    config = arithmetic.settled(config)
    mesh = meshes.make(**meshes.parse(config.mesh))
    return config, setups.prepare(config, mesh), mesh


def train_only(config, **changes):
    """Trains without solving, whose compilations would dominate the test."""
    config = dataclasses.replace(config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforcement, "_evaluate", lambda *_: None)
        arithmetic.main(config)
    return config


def metric(config, name):
    return reporting.read_metrics(folder(config))[name][1]


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(model):
    """Sixteen groups, plain and with a hint, and the texts that they should have been."""
    config, setup, mesh = prepared(dataclasses.replace(TINY, model=model))
    columns = {name: column[:16] for name, column in reinforcement._columns(setup.train).items()}
    batch = [jnp.asarray(columns[name]) for name in ("prompt", "mask", "answer")]
    params = setup.policy.pretrained[0]
    plain, hinted = (
        jax.jit(rollouts.sampler(setup, mesh, 3, 8, hint))(params, jax.random.key(hint), *batch) for hint in (0, 1)
    )
    wanted = [setup.task.train[i].completion for i in columns["index"]]
    return config, setup, params, columns, plain, hinted, wanted


def test_what_the_sampler_says_of_its_answers_is_what_the_model_says(played):
    config, setup, params, _, plain, hinted, _ = played
    for answers, first in ((plain, 0), (hinted, 1)):
        logp, mask = reinforcement.answer_logps(config, setup, params, answers, ())
        np.testing.assert_array_equal(mask, answers.mask.reshape(mask.shape))
        sampled = answers.logp.reshape(mask.shape)
        difference = np.where(mask, logp - sampled, 0)[:, first:]
        np.testing.assert_allclose(difference, 0, atol=1e-5)
    assert np.asarray(plain.logp)[plain.mask].mean() < -0.1


def test_in_bfloat16_the_sampler_is_the_model_that_learns_up_to_rounding(played):
    config, setup, params, columns, *_ = played
    half = setup._replace(policy=setup.policy._replace(dtype="bfloat16"))
    batch = [jnp.asarray(columns[name]) for name in ("prompt", "mask", "answer")]
    answers = jax.jit(rollouts.sampler(half, meshes.make(data=1), 3, 8))(params, jax.random.key(0), *batch)
    apart = {}
    for name, each in {"itself": half, "float32": setup}.items():
        logp, mask = reinforcement.answer_logps(config, each, params, answers, ())
        apart[name] = np.abs(np.asarray(logp - answers.logp.reshape(mask.shape), np.float32))[mask].mean()
    assert 0 < apart["itself"] < 0.5 * apart["float32"] < 0.05


def test_hints_give_the_beginning_of_the_answer_away_and_count_as_certain(played):
    _, setup, _, columns, plain, hinted, wanted = played
    np.testing.assert_array_equal(hinted.tokens[:, :, 0], np.repeat(columns["answer"][:, :1], 8, axis=1))
    np.testing.assert_array_equal(hinted.logp[:, :, 0], 0)
    np.testing.assert_array_equal(hinted.given, np.broadcast_to([True, False, False], hinted.given.shape))
    assert not plain.given.any()
    assert hinted.tokens.shape == plain.tokens.shape
    rewards = [rollouts.verify(setup, verifiers.exact, answers, wanted) for answers in (plain, hinted)]
    assert rewards[1].mean() > rewards[0].mean() + 0.1
    chosen = rollouts.replace_failed(plain, hinted, jnp.asarray(rewards[0]))
    failed = rewards[0].max(-1) == 0
    assert 0 < failed.sum() < 16
    for name in ("tokens", "mask", "logp", "given"):
        expected = np.where(failed[:, None, None], getattr(hinted, name), getattr(plain, name))
        np.testing.assert_array_equal(getattr(chosen, name), expected)


def test_rewards_are_those_of_the_texts_in_groups_and_in_sweeps(played):
    _, setup, _, _, plain, hinted, wanted = played
    expected = np.zeros((16, 8))
    for i, j in np.ndindex(16, 8):
        text = language.decode(
            setup.tokenizer, np.asarray(plain.tokens[i, j])[None], np.asarray(plain.mask[i, j])[None], setup.stop
        )
        expected[i, j] = text[0] == wanted[i]
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(rollouts.verify(setup, verifiers.exact, plain, wanted), expected)
    both = jax.tree.map(lambda *x: jnp.stack(x), plain, hinted)
    swept = rollouts.verify(setup, lambda answer, want: 2.0 * (answer == want), both, wanted)
    np.testing.assert_array_equal(swept[0], 2 * expected)


@pytest.mark.parametrize(
    ("answer", "wanted", "exact", "number"),
    [
        ("42", " 42\n", 1, 1),
        ("it is 42.", "42", 0, 1),
        ("-3", "3", 0, 0),
        ("1,000", "1000", 0, 1),
        ("", "7", 0, 0),
        ("999999998000000000", "999999998000000001", 0, 0),  # one number in double precision
        ("10-3", "3", 0, 1),
        ("1.50", "1.5", 0, 1),
    ],
)
def test_verifiers(answer, wanted, exact, number):
    assert verifiers.exact(answer, wanted) == exact
    assert verifiers.last_number(answer, wanted) == number


# --- the update -------------------------------------------------------------------------------------------------------


def loss_of(config, setup, mesh, **changes):
    """The loss that the program would train, a pure function."""
    config = dataclasses.replace(config, **changes)
    objective, advantage = reinforcement.resolve(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "compile_program", lambda *args, **_: args[2])
        return reinforcement.learning(config, setup, objective, advantage, mesh, sweeps.Sweep({}, ("",)), None)


def test_the_objective_is_given_the_answers_and_what_the_flags_say(played):
    config, setup, params, _, plain, hinted, wanted = played
    mesh = meshes.make(data=1)
    rewards = jnp.asarray(rollouts.verify(setup, verifiers.exact, plain, wanted))
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(3), x.shape), params)
    logp, mask = reinforcement.answer_logps(config, setup, moved, plain, ())
    old = plain.logp.reshape(mask.shape)
    rows = {"logp": logp, "logp_old": old, "mask": mask}

    def at(hyper=None, **changes):
        loss = loss_of(config, setup, mesh, **changes)
        return loss(moved, None, (plain, rewards), hyper or {}, params)

    value, metrics = at()
    divide = lambda fraction: fraction[0] / fraction[1]  # noqa: E731
    np.testing.assert_allclose(value, divide(objectives.grpo(rewards, **rows)), rtol=1e-5)
    value, _ = at(hyper={"objective.low": 0.05}, objective="dr_grpo", options=("low=0.05",))
    expected = divide(objectives.dr_grpo(rewards, **rows, length=3.0, low=0.05))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    options = {"objective": "ppo", "advantage_options": ("center=loo", "scale=none"), "reduce": "seq-mean-token-sum"}
    losses = objectives.ppo(**rows, advantages=(rewards - (rewards.sum(1, keepdims=True) - rewards) / 7).ravel())
    value, _ = at(**options)
    np.testing.assert_allclose(value, jnp.where(mask, losses, 0).sum() / len(mask), rtol=1e-4)
    value, _ = at(hyper={"objective.beta": 0.5}, reference=True, options=("beta=0.5",))
    expected = divide(objectives.grpo(rewards, **rows, logp_ref=old, beta=0.5))  # the model that sampled
    np.testing.assert_allclose(value, expected, rtol=1e-4)

    ratio = np.exp(np.asarray(logp - old))[mask]
    assert metrics["clip_fraction"] == pytest.approx(np.mean(np.abs(ratio - 1) > 0.2), abs=1e-6)
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["reward"] == pytest.approx(rewards.mean())
    assert metrics["zero_variance"] == pytest.approx(np.mean(rewards.max(1) == rewards.min(1)))
    assert metrics["length"] == pytest.approx(np.asarray(mask).sum(1).mean())
    assert metrics["entropy"] == pytest.approx(-np.asarray(logp)[mask].mean())

    loss = loss_of(config, setup, mesh)
    _, metrics = loss(moved, None, (hinted, rewards), {}, params)
    logp, mask = reinforcement.answer_logps(config, setup, moved, hinted, ())
    assert metrics["entropy"] == pytest.approx(-np.asarray(logp)[:, 1:][mask[:, 1:]].mean())  # of what was sampled


def test_several_updates_on_a_batch_are_several_steps_that_count_as_one():
    def step(state, key, batch, hyper):
        taken, value = state.step, state.params * hyper + batch
        return state._replace(step=taken + 1, params=value), {"loss": value}

    start = runs.training.TrainState(jnp.int32(4), jnp.float32(1.0), None, None, jnp.int32(0), jnp.int32(-1))
    state, metrics = runs._repeat(step, 3)(start, None, jnp.float32(2.0), jnp.float32(3.0))
    assert state.step == 5
    assert state.params == metrics["loss"] == 3 * (3 * (3 * 1 + 2) + 2) + 2


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_whole_run_solves_more_and_reports_what_the_rewards_did(config):
    config = dataclasses.replace(config, steps=100, epochs=2, hyper=arithmetic.Hyper(lr=(3e-3,)))
    arithmetic.main(config)
    run = folder(config)
    assert {path.name for path in (run / "figures").glob("*.png")} == {"attempts.png", "training.png", "health.png"}
    rewards = metric(config, "reward")
    assert rewards[-1] > rewards[0] + 0.1
    assert metric(config, "kl")[-1] > 0.01
    assert np.all(metric(config, "zero_variance") < 1)
    report = (run / "report.md").read_text()
    assert all(f"| {label} " in report for label in ("reference", "this run"))
    assert prepared(dataclasses.replace(config, model=str(run / "model")))[1].policy.config


def test_a_resumed_run_ends_where_it_did(config):
    config = train_only(config, steps=40)
    logged = (folder(config) / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder(config) / "checkpoints" / "40")
    train_only(config)
    assert (folder(config) / "metrics.jsonl").read_bytes() == logged


def test_members_of_a_sweep_over_devices_have_the_rewards_of_single_runs(from_file, monkeypatch):
    monkeypatch.setattr(runs, "REPORT_EVERY", 5)
    options = {"reference": True, "options": ("beta=0.1",), "verifier": "last_number"}
    config = dataclasses.replace(from_file, steps=10, hint=1, **options)
    rates = (1e-4, 1e-2)
    alone = [train_only(config, name=f"{rate}", hyper=arithmetic.Hyper(lr=(rate,))) for rate in rates]
    mesh = "sweep=2,data=2,tensor=2"
    together = train_only(config, name="together", mesh=mesh, hyper=arithmetic.Hyper(lr=rates))
    for name in ("reward", "length", "entropy"):
        expected = np.stack([metric(each, name) for each in alone], 1)
        np.testing.assert_allclose(metric(together, name), expected, rtol=2e-3, err_msg=name)
    assert metric(together, "reward").mean() > 0
    assert abs(metric(together, "entropy")[-1] @ [1, -1]) > 1e-3


# --- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--stage rl needs --model, e.g. runs/arithmetic/default/model"),
        ({"objective": "grop"}, "esscher.objectives.policy has no function 'grop'; close: grpo"),
        ({"objective": "a2po_loss"}, "--objective a2po_loss needs"),
        ({"options": ("scale=nope",)}, "--objective grpo: scale must be"),
        (
            {"objective": "ppo", "advantage": "gae"},
            "--advantage gae needs values, discounts, lam: give a number or a word by",
        ),
        ({"objective": "ppo", "advantage_options": ("center=nope",)}, "--advantage group_advantage: center must be"),
        ({"objective": "esscher.objectives.policy.signed_advantage"}, "needs correct"),
        ({"verifier": "nope"}, "--verifier: esscher.experiments.verifiers has no function 'nope'"),
        ({"hint": 2}, "--hint must be 0 to 1, below the tokens of the shortest answer"),
        ({"hint": -1}, "--hint must be 0 to 1, below the tokens of the shortest answer"),
        ({"hint": 1, "tokens": 1}, "--hint must be 0 to 0, below the tokens of the shortest answer or --tokens"),
        ({"options": ("beta=0.1",)}, "--options beta=... of grpo needs --reference"),
        ({"objective": "ppo", "reference": True}, "--reference: ppo does not ask for logp_ref"),
        ({"objective": "gpg", "epochs": 2}, "gpg is for answers of the policy itself (no logp_old): give --epochs 1"),
        ({"objective": "gpg", "hint": 1}, "gpg is for answers of the policy itself (no logp_old): give no --hint"),
        ({"reduce": "constant"}, "--reduce: grpo has its own reduction"),
        ({"advantage_options": ("center=loo",)}, "--advantage and --advantage-options: grpo has its own advantages"),
        ({"objective": "performance_gate"}, "--objective performance_gate"),
        ({"options": ("low=0.1", "low=0.2")}, "--options: an option is given twice"),
        ({"group": 0}, "--group must be at least 1, got 0"),
        ({"prompts": 3}, "--prompts belongs to --stage dpo"),
        ({"stage": "sft", "group": 3}, "--group belongs to --stage rl"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_before_anything_is_made(config, changes, message):
    with pytest.raises(UsageError) as error:
        arithmetic.main(dataclasses.replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not config.runs.exists()


def test_a_line_without_an_answer_is_named(from_file):
    with from_file.data.open("a") as file:
        file.write('{"prompt": "1+1="}\n')
    with pytest.raises(UsageError, match=r"sums.jsonl, line 101: 'answer' is missing"):
        arithmetic.main(from_file)

"""The dpo stage finds pairs, asks the reference once, learns, resumes bitwise, and is the same on any mesh."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes, reporting, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import arithmetic, language, policies, preference, preference_pairs, setups

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = arithmetic.Config(
    stage="dpo",
    steps=40,
    save_every=20,
    batch_size=16,
    digits=1,
    length=16,
    problems=32,
    samples=16,
    prompts=64,
    mesh="data=1",
    hyper=arithmetic.Hyper(lr=(1e-3,)),
)


@pytest.fixture
def config(tmp_path, model):
    return dataclasses.replace(TINY, runs=tmp_path / "runs", model=model)


@pytest.fixture
def from_file(config, llama, write_lines):
    """Pairs of a file for a tiny Llama with an adapter: the right sum against zeros."""
    lines = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "000"} for a in range(10) for b in range(10)]
    hyper, data = arithmetic.Hyper(lr=(1e-2,), keep=(1.0,)), write_lines("pairs.jsonl", lines)
    prompts = arithmetic.Config().prompts  # nothing is sampled
    return dataclasses.replace(config, digits=2, model=llama, data=data, lora=2, prompts=prompts, hyper=hyper)


def folder(config):
    return config.runs / "arithmetic-dpo" / config.name


def prepared(config, mesh=None):
    config = arithmetic.settled(config)
    mesh = mesh or meshes.make(**meshes.parse(config.mesh))
    return config, setups.prepare(config, mesh), mesh


def train_only(config, **changes):
    """Trains without solving, whose compilations would dominate the test."""
    config = dataclasses.replace(config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "_evaluate", lambda *_: None)
        arithmetic.main(config)
    return config


def metric(config, name):
    return reporting.read_metrics(folder(config))[name][1]


# --- pairs ------------------------------------------------------------------------------------------------------------


def texts(setup, columns, member):
    """Prompt and completion of each pair's member."""
    rows, inside = columns["tokens"][:, member], columns["segments"][:, member] == 0
    completion = columns["completion"][:, member]
    prompts, completions = (
        language.decode(setup.tokenizer, rows, mask, setup.stop) for mask in (inside & ~completion, completion)
    )
    return list(zip(prompts, completions, strict=True))


def test_sampled_pairs_are_a_right_and_a_wrong_answer_and_the_reference_is_the_model(config):
    config, setup, mesh = prepared(config)
    pairs = preference_pairs.make(config, setup, mesh, mismatched=True)
    assert pairs.asked == 64
    assert 0 < pairs.exact_match < 1
    for columns, problems in ((pairs.train, setup.task.train[:64]), (pairs.test, setup.task.test)):
        assert 4 < len(columns["tokens"]) <= len(problems)
        answers = dict(problems)
        chosen, rejected, mismatched = (texts(setup, columns, member) for member in range(3))
        assert len({prompt for prompt, _ in chosen}) == len(chosen)
        assert all(answers[prompt] == completion for prompt, completion in chosen)
        assert all(answers[prompt] != completion for prompt, completion in rejected)
        assert [prompt for prompt, _ in mismatched] == [prompt for prompt, _ in chosen]
        assert [x for _, x in mismatched] == [x for _, x in [*rejected[1:], rejected[0]]]
        assert np.array_equal(np.sort(columns["rank"]), np.arange(len(chosen), dtype=np.float32) / len(chosen))
        length = columns["tokens"].shape[-1]
        batch = {name: columns[name].reshape(-1, length) for name in ("tokens", "segments", "completion")}
        expected = policies.completions(setup.policy, setup.policy.pretrained[0], batch)
        logps = np.where(expected.mask, expected.logps, 0).reshape(columns["ref"].shape)
        np.testing.assert_allclose(columns["ref"], logps, rtol=1e-5, atol=1e-6)


def test_confident_pairs_are_the_surest_right_and_the_least_sure_wrong_answer(config):
    config, setup, mesh = prepared(dataclasses.replace(config, judge="confidence", problems=8))
    any_of_them = preference_pairs.make(dataclasses.replace(config, judge="verifier"), setup, mesh, mismatched=False)
    surest = preference_pairs.make(config, setup, mesh, mismatched=False)

    def confidence(pairs, member):
        probability = np.exp(pairs.train["ref"][:, member])
        inside = pairs.train["ref"][:, member] != 0
        return np.sum(probability, where=inside, axis=-1) / inside.sum(-1)

    np.testing.assert_allclose(confidence(surest, 0), confidence(any_of_them, 0), rtol=1e-5)  # one right text each
    assert np.all(confidence(surest, 1) <= confidence(any_of_them, 1) + 1e-5)
    assert confidence(surest, 1).mean() < confidence(any_of_them, 1).mean() - 0.02


def test_flipped_labels_exchange_that_share_of_the_pairs_to_learn_from_alone(from_file):
    config, setup, mesh = prepared(dataclasses.replace(from_file, problems=16))
    clean, noisy = (
        preference_pairs.make(dataclasses.replace(config, flip=flip), setup, mesh, mismatched=False)
        for flip in (0.0, 0.4)
    )
    flipped = np.any(clean.train["tokens"][:, 0] != noisy.train["tokens"][:, 0], axis=-1)
    assert 0.2 < flipped.mean() < 0.6
    for name in ("tokens", "ref"):
        expected = np.where(flipped[:, None, None], clean.train[name][:, ::-1], clean.train[name])
        np.testing.assert_allclose(noisy.train[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clean.test["tokens"], noisy.test["tokens"])


def test_pairs_that_are_kept_come_back_and_damage_is_said(config, tmp_path):
    columns = {"tokens": np.arange(8, dtype=np.int32).reshape(1, 2, 4), "rank": np.zeros(1, np.float32)}
    pairs = preference_pairs.Pairs(columns, columns, 3, 0.25)
    path = tmp_path / "pairs.npz"
    preference_pairs.save(path, pairs)
    jax.tree.map(np.testing.assert_array_equal, preference_pairs.load(path), pairs)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"pairs\.npz is damaged"):
        preference_pairs.load(path)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_whole_run_learns_and_reports_beside_it_what_a_filtered_one_does(config, capsys):
    arithmetic.main(config)
    run = folder(config)
    assert {path.name for path in (run / "figures").glob("*.png")} == {
        "attempts.png",
        "training.png",
        "displacement.png",
    }
    report = (run / "report.md").read_text()
    assert all(f"| {label} " in report for label in ("reference", "keep=1", "keep=0.5"))
    accuracy, margin = (metric(config, name) for name in ("accuracy", "margin"))
    assert accuracy.shape == (2, 2)
    assert np.all(margin[-1] > 0)
    assert np.all(metric(config, "loss")[-1] < np.log(2))
    assert metric(config, "validation_margin").shape == (2, 2)
    assert "picture" in capsys.readouterr().out
    assert not np.allclose(margin[-1, 0], margin[-1, 1])
    saved, solved = prepared(dataclasses.replace(config, model=str(run / "model")))[1], metric(config, "exact_match")
    assert saved.policy.config == prepared(config)[1].policy.config
    assert solved.shape == (2, 2)


def test_a_resumed_run_goes_on_with_the_pairs_it_had_and_ends_where_it_did(config, monkeypatch):
    config = dataclasses.replace(config, problems=16)
    train_only(config)
    logged, pairs = ((folder(config) / name).read_bytes() for name in ("metrics.jsonl", "pairs.npz"))
    shutil.rmtree(folder(config) / "checkpoints" / "40")
    monkeypatch.setattr(preference_pairs, "make", lambda *_, **__: pytest.fail("pairs were made again"))
    train_only(config)
    assert (folder(config) / "metrics.jsonl").read_bytes() == logged
    assert (folder(config) / "pairs.npz").read_bytes() == pairs


def test_an_adapter_learns_from_a_file_against_the_model_without_it(from_file):
    config = train_only(
        from_file, objective="ipo", options=("normalize=true", "beta=0.5"), mesh="data=2,fsdp=2,tensor=2"
    )
    assert metric(config, "loss")[-1] < metric(config, "loss")[0]
    assert metric(config, "validation_accuracy")[-1] > 0.8
    assert "exact_match" not in reporting.read_metrics(folder(config))


def test_eight_devices_give_the_losses_of_one_and_a_sweep_those_of_single_runs(from_file):
    config = dataclasses.replace(from_file, steps=20, problems=16)
    alone = [train_only(config, name=f"alone{beta}", options=(f"beta={beta}",)) for beta in (0.1, 0.5)]
    together = train_only(config, name="together", mesh="sweep=2,data=4", options=("beta=0.1,0.5",))
    for name in ("loss", "margin", "validation_loss"):
        expected = np.stack([metric(each, name) for each in alone], 1)
        np.testing.assert_allclose(metric(together, name), expected, rtol=2e-4, atol=1e-5, err_msg=name)
    assert abs(metric(alone[0], "loss")[-1] - metric(alone[1], "loss")[-1]) > 1e-3


def test_pairs_with_a_high_score_are_left_out_of_the_loss_and_of_no_metric(from_file):
    config, setup, mesh = prepared(from_file)
    objective, sweep = preference.resolve("dpo"), sweeps.grid(config.hyper)
    pairs = preference_pairs.make(config, setup, mesh, mismatched=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference.runs, "compile_program", lambda *args, **_: args[2])
        loss = preference.learning(config, setup, objective, mesh, sweep)
    trainable = setup.policy.initialize(jax.random.key(0))
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), trainable)
    batch = {name: column[:16] for name, column in pairs.train.items()} | {"rank": np.arange(16) / 16}

    def at(batch, keep):
        return loss(trainable, None, batch, {"keep": jnp.float32(keep)}, *setup.policy.constants)

    (half, metrics), (whole, all_metrics) = at(batch, 0.5), at(batch, 1.0)
    first = {name: column[:8] for name, column in batch.items()}
    np.testing.assert_allclose(half, at(first, 1.0)[0], rtol=1e-5)
    assert abs(half - whole) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, metrics, all_metrics)


# --- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--stage dpo needs --model, e.g. runs/arithmetic/default/model"),
        ({"name": "../up"}, "the run's name '../up' must be made of"),
        ({"objective": "dpoo"}, "has no function 'dpoo'; close: dpo"),
        ({"options": ("beta=x", "gamma=1")}, "dpo has no option 'gamma'; it has beta"),
        ({"flip": 1.5}, "--flip must be between 0 and 1, got 1.5"),
        ({"prompts": 0}, "--prompts must be at least 1, got 0"),
        ({"hyper": arithmetic.Hyper(keep=(0.0,))}, "--hyper.keep must be above 0 and at most 1"),
        ({"samples": 1, "prompts": 1}, "there must be some of both"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_before_anything_is_made(config, changes, message):
    with pytest.raises(UsageError) as error:
        arithmetic.main(dataclasses.replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not config.runs.exists()


def test_flags_for_sampling_are_refused_beside_pairs_of_a_file(from_file):
    with pytest.raises(UsageError, match="--judge is for answers that are sampled"):
        arithmetic.main(dataclasses.replace(from_file, judge="confidence"))


def test_a_line_without_a_rejected_completion_is_named(from_file):
    with from_file.data.open("a") as file:
        file.write('{"prompt": "1+1=", "chosen": "2"}\n')
    with pytest.raises(UsageError, match=r"pairs.jsonl, line 101: 'rejected' is missing"):
        arithmetic.main(from_file)

"""The arithmetic run trains, solves and reports; it resumes bitwise, and is the same on any mesh and in any sweep."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import checkpoints, meshes, reporting, sequences, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import arithmetic, cli, language, policies, runs, setups, solving, supervised
from esscher.models import adapters, decoder, hf
from esscher.samplers import decoding

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = arithmetic.Config(
    steps=40, save_every=20, batch_size=16, width=32, depth=1, digits=1, length=32, problems=16, samples=4
)
NEW = {name: getattr(arithmetic.Config(), name) for name in arithmetic.NEW}  # said of new models and problems only
LLAMA = pathlib.Path(__file__).parents[1] / "models" / "fixtures" / "llama"


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(TINY, runs=tmp_path / "runs", mesh="data=1")


@pytest.fixture
def pretrained(config, llama, write_lines):
    """A configuration that fine-tunes a tiny Llama on sums in a file."""
    data = write_lines("sums.jsonl", [x._asdict() for x in language.arithmetic(1, "+", 10, 99, 0).test])
    return dataclasses.replace(config, **NEW, model=llama, data=data, hyper=arithmetic.Hyper(lr=(1e-2,)), steps=20)


def folder(config):
    return config.runs / "arithmetic" / config.name


def losses(config, name="loss"):
    return reporting.read_metrics(folder(config))[name][1]


def program_of(config):
    config, mesh = arithmetic.settled(config), meshes.make(**meshes.parse(config.mesh))
    setup = setups.prepare(config, mesh)
    return setup, supervised.fine_tuning(config, setup, mesh, sweeps.grid(config.hyper))


def saved_state(config):
    """The leaves of the last checkpoint, as they lie on disk."""
    with checkpoints.open(folder(config) / "checkpoints") as store:
        return store.restore_latest(program_of(config)[1].state)


def silent(policy, length, stop, mesh):
    """In place of a generator: compiles at once and says nothing."""

    def generate(key, trainable, prompt, mask, *constants, **options):
        empty = jnp.zeros((len(prompt), length))
        return decoding.Generation(empty.astype(jnp.int32), empty > 0, empty, empty)

    return generate


def train_only(config, **changes):
    """Trains without generating, whose compilations would dominate the test."""
    config = dataclasses.replace(config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "_evaluate", lambda *_: None)
        patch.setattr(policies, "generator", silent)
        arithmetic.main(config)
    return config


def train_and_save(config, **changes):
    """Likewise, and saves the model and writes the report, as if it had solved something."""
    config = dataclasses.replace(config, **changes)
    examples = [sequences.Example("1+1=", "2")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "generator", silent)
        patch.setattr(solving, "solve", lambda *_, **__: solving.Solved(examples, ["2"], [["2"]]))
        arithmetic.main(config)
    return config


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_whole_run_writes_everything_it_promises(config, capsys, monkeypatch):
    solve, solved = solving.solve, []
    monkeypatch.setattr(solving, "solve", lambda *args, **options: solved.append(solve(*args, **options)) or solved[-1])
    arithmetic.main(config)
    run = folder(config)
    assert json.loads((run / "config.json").read_text())["digits"] == 1
    assert {path.name for path in (run / "figures").glob("*.png")} == {"attempts.png", "training.png"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "40"]
    assert list((run / "tensorboard").glob("events*"))
    steps, values = reporting.read_metrics(run)["loss"]
    assert steps.tolist() == [20, 40]
    assert values[1] < values[0]
    report = (run / "report.md").read_text()
    exact = solved[0].exact_match.mean()
    assert f"{exact:.1%} of 16 problems never seen are solved greedily" in report
    assert all(f"| {k} |" in report for k in (1, 2, 4))
    assert reporting.read_metrics(run)["exact_match"][1][-1] == pytest.approx(exact)
    assert f"picture  {run / 'figures' / 'attempts.png'}" in capsys.readouterr().out

    mesh, setup = meshes.make(data=1), program_of(config)[0]
    architecture, params = hf.load(run / "model", mesh=mesh)
    tokenizer, stop = language.open_tokenizer(run / "model")
    kept = setup._replace(tokenizer=tokenizer, stop=stop, policy=policies.full(architecture, params))
    again = solve(kept, params, mesh, key=jax.random.key(config.seed + 1), samples=config.samples)
    assert again == solved[0]
    assert len(set(again.greedy)) > 1


def test_an_interrupted_and_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(config, capsys, monkeypatch):
    config = dataclasses.replace(config, steps=80, save_every=40)
    whole = train_only(config, name="whole")
    progress = reporting.progress

    @contextlib.contextmanager
    def terminated_at_60(*args, **options):
        with progress(*args, **options) as show:
            yield lambda step, **values: show(step, **values) or (step == 60 and os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "progress", terminated_at_60)
        broken = train_only(config, name="broken")
    assert "stopped at step 60 and saved" in capsys.readouterr().out
    assert saved_state(broken).step == 60
    train_only(broken)
    ends = [saved_state(each) for each in (whole, broken)]
    assert ends[0].step == ends[1].step == 80
    jax.tree.map(np.testing.assert_array_equal, ends[0].state, ends[1].state)
    assert (folder(whole) / "metrics.jsonl").read_text() == (folder(broken) / "metrics.jsonl").read_text()


@pytest.fixture
def short(config, monkeypatch):
    """Few steps, each fifth of them reported."""
    monkeypatch.setattr(runs, "REPORT_EVERY", 5)
    return dataclasses.replace(config, steps=20)


def test_eight_devices_give_the_loss_curve_of_one(short):
    alone = train_only(short)
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        together = train_only(short, mesh=mesh, name=mesh.replace(",", "+"))
        for name in ("loss", "validation_loss"):
            np.testing.assert_allclose(losses(together, name), losses(alone, name), rtol=1e-4)


def test_members_of_a_sweep_over_devices_have_the_loss_curves_of_single_runs(short):
    rates = (1e-3, 4e-3)
    swept = train_only(short, mesh="sweep=2,data=4", name="sweep", hyper=arithmetic.Hyper(lr=rates))
    for index, rate in enumerate(rates):
        alone = train_only(short, name=f"lr={rate}", hyper=arithmetic.Hyper(lr=(rate,)))
        np.testing.assert_allclose(losses(swept)[:, index], losses(alone), rtol=1e-4)
    assert abs(losses(swept)[-1, 0] / losses(swept)[-1, 1] - 1) > 1e-3


def test_a_sweep_is_saved_and_solved_at_its_best_member(config):
    swept = train_and_save(config, hyper=arithmetic.Hyper(lr=(4e-3, 1e-9)), steps=20)
    expected = jax.tree.map(lambda leaf: leaf[0], saved_state(swept).state.ema)
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder(swept) / "model")[1], expected)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_packed_sequences_have_the_loss_that_each_has_alone_in_its_row():
    tokenizer, task = language.tokenizer_of("+-*", 10), language.arithmetic(2, "+-*", 10, 40, 0).test
    encoded = language.encode(tokenizer, language.END, task)
    shape = {"vocabulary": tokenizer.get_vocab_size(), "width": 32, "depth": 2, "mlp": 64, "tied": True}
    policy = policies.new(decoder.Config(heads=2, kv_heads=1, head_dim=16, **shape))
    params = policy.initialize(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), params)

    @jax.jit
    def logps(batch):
        return policies.completions(policy, params, batch)[:2]

    def of_examples(batch):
        """Sum for each example, by its tokens."""
        found = {}
        rows = zip(*map(np.asarray, (batch["tokens"], batch["segments"], *logps(batch))), strict=True)
        for tokens, segments, logp, mask in rows:
            for segment in range(segments.max() + 1):
                there = segments == segment
                found[tuple(tokens[there])] = logp[there & mask].sum(), (there & mask).sum()
        return found

    packed, alone = sequences.pack(encoded, 32), {}
    for example in encoded:
        for name, array in sequences.pack([example], 32).items():
            alone.setdefault(name, []).append(array[0])
    alone = {name: np.stack(rows) for name, rows in alone.items()}
    assert len(packed["tokens"]) < len(encoded) / 2
    together, apart = of_examples(packed), of_examples(alone)
    assert together.keys() == apart.keys() == {(*ids.prompt, *ids.completion) for ids in encoded}
    for ids in encoded:
        (left, count), (right, other) = (found[(*ids.prompt, *ids.completion)] for found in (together, apart))
        assert count == other == len(ids.completion)
        np.testing.assert_allclose(left, right, rtol=1e-5)
    means = [np.sum(np.where(mask, logp, 0)) / np.sum(mask) for logp, mask in map(logps, (packed, alone))]
    np.testing.assert_allclose(*means, rtol=1e-5)
    blind = packed | {"segments": np.where(packed["segments"] < 0, -1, 0).astype(np.int32)}
    assert abs(np.mean(logps(blind)[0] - logps(packed)[0], where=packed["completion"])) > 1e-2


# --- pretrained models ------------------------------------------------------------------------------------------------


def test_all_of_a_model_is_fine_tuned_and_saved(pretrained, monkeypatch):
    made, prepare = [], setups.prepare
    monkeypatch.setattr(setups, "prepare", lambda *args: made.append(prepare(*args)) or made[-1])
    config = train_and_save(pretrained, steps=60)
    monkeypatch.undo()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made[0].policy.pretrained))
    assert losses(config)[-1] < losses(config)[0] - 0.5
    architecture, params = hf.load(folder(config) / "model")
    before = hf.load(config.model, dtype="float32")
    assert architecture == before[0]
    jax.tree.map(np.testing.assert_array_equal, params, saved_state(config).state.ema)
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(params), strict=True):
        assert np.abs(old - new).max() > 1e-3
    assert language.open_tokenizer(folder(config) / "model")[1] == (language.END,)


def test_an_adapter_is_all_that_is_trained_and_is_merged_into_what_is_saved(pretrained, monkeypatch):
    made, prepare = [], setups.prepare
    monkeypatch.setattr(setups, "prepare", lambda *args: made.append(prepare(*args)) or made[-1])
    config = train_and_save(pretrained, lora=2, mesh="data=2,fsdp=2,tensor=2")
    _, base = hf.load(config.model, dtype="float32")
    policy = made[0].policy
    jax.tree.map(np.testing.assert_array_equal, policy.constants[0], base)
    state = saved_state(config).state
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)}
    assert paths == {f"['layers']['{name}']['{part}']" for name in adapters.TARGETS for part in "ab"}
    trained = adapters.count(state.params)
    assert trained < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(base))
    counters = 3 + sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.opt_state))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 4 * trained + counters
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(state.params))

    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 67)
    architecture, merged = hf.load(folder(config) / "model")
    params, layer_weights = policy.network(state.ema, *policy.constants)
    layered = decoder.hidden(params, architecture, tokens, layer_weights=layer_weights)
    left = decoder.logits(params, architecture, layered)
    right, before = (decoder.logits(p, architecture, decoder.hidden(p, architecture, tokens)) for p in (merged, base))
    np.testing.assert_allclose(left, right, atol=1e-5)
    assert np.abs(np.asarray(left) - np.asarray(before)).max() > 0.1


def test_in_bfloat16_what_is_trained_stays_in_float32(pretrained):
    for lora in (0, 2):
        setup, program = program_of(dataclasses.replace(pretrained, dtype="bfloat16", lora=lora))
        assert {leaf.dtype for leaf in jax.tree.leaves(program.state.params)} == {jnp.dtype("float32")}
        assert {leaf.dtype for leaf in jax.tree.leaves(setup.policy.constants)} <= {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("lora", [0, 2])
def test_it_trains_in_bfloat16_without_an_average(pretrained, lora):
    config = train_and_save(pretrained, dtype="bfloat16", average=False, lora=lora, remat=bool(lora), steps=40)
    state = saved_state(config).state
    assert state.ema is None
    assert losses(config)[-1] < losses(config)[0]
    saved = hf.load(folder(config) / "model")[1]
    expected = (
        state.params if lora == 0 else program_of(config)[0].policy.merged(state.params, hf.load(config.model)[1])
    )
    jax.tree.map(np.testing.assert_array_equal, saved, expected)


# --- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (NEW | {"data": pathlib.Path("sums.jsonl")}, "--data needs --model, the folder"),
        ({"lora": 2}, "--lora needs --model, the folder"),
        ({"lora": -1}, "--lora must be at least 0, got -1"),
        ({"width": 30}, "--width must be a multiple of 32, got 30"),
        ({"operations": "x"}, "--operations must be made of + - *, got 'x'"),
        ({"base": 99}, "--base must be 2 to 36, got 99"),
        ({"digits": 0}, "--digits must be 1 to 9, got 0"),
        ({"problems": 100}, "--problems 100 leaves none of 100 problems"),
        ({"problems": 12, "mesh": "data=8"}, "--problems 12 does not split over 8 devices"),
        ({"length": 4}, "tokens, a row has 4: raise --length or shorten it"),
        (NEW | {"model": "/nowhere/at/all"}, "no folder /nowhere/at/all"),
        (NEW | {"model": str(LLAMA)}, "has no tokenizer.json"),
        ({"model": str(LLAMA)}, "--width says nothing of what is read from --model: leave it out"),
        (NEW | {"base": 8, "model": "-", "data": pathlib.Path("sums.jsonl")}, "--base says nothing of what is read"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"name": "../up"}, "the run's name '../up' must be made of"),
        ({"flip": 0.1}, "--flip belongs to --stage dpo"),
        ({"hyper": arithmetic.Hyper(keep=(0.5,))}, "--hyper.keep belongs to --stage dpo"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_before_anything_is_made(config, changes, message):
    with pytest.raises(UsageError) as error:
        arithmetic.main(dataclasses.replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not config.runs.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1="}', "sums.jsonl, line 100: 'completion' is missing"),
        (json.dumps({"prompt": "1" * 30, "completion": "22"}), "sums.jsonl, line 100, has 33 tokens, a row has 32"),
        (json.dumps({"prompt": "@", "completion": "2"}), "sums.jsonl, line 100, has the token 67, the model 67"),
        (json.dumps({"prompt": "1" * 24, "completion": "2"}), "line 100, has 26 tokens, the context of the model 25"),
    ],
)
def test_a_line_of_the_data_that_does_not_do_is_named(pretrained, line, message):
    with pretrained.data.open("a") as file:
        file.write(f"{line}\n")
    tokenizer = pathlib.Path(pretrained.model, "tokenizer.json")
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["@"] = 67
    tokenizer.write_text(json.dumps(content))
    architecture = pathlib.Path(pretrained.model, "config.json")
    content = json.loads(architecture.read_text()) | {"max_position_embeddings": 25, "rope_scaling": None}
    architecture.write_text(json.dumps(content | {"rope_parameters": None}))
    with pytest.raises(UsageError) as error:
        arithmetic.main(pretrained)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not pretrained.runs.exists()


def test_another_configuration_in_the_same_folder_is_refused(config):
    reporting.open_run(config, experiment="arithmetic", name=config.name, root=config.runs)
    with pytest.raises(UsageError, match="digits is 1 there, 2 here"):
        arithmetic.main(dataclasses.replace(config, digits=2))


def test_files_that_have_changed_since_a_run_began_are_refused(pretrained):
    setup = setups.prepare(arithmetic.settled(pretrained), meshes.make(data=1))
    setups.open_run(pretrained, setup)
    setups.open_run(pretrained, setup)
    with pretrained.data.open("a") as file:
        file.write(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    with pytest.raises(UsageError, match=r"content of --data is \d+ bytes, crc \w+ there, \d+ bytes"):
        setups.open_run(pretrained, setup)


def test_the_ends_of_large_files_tell_them_apart(tmp_path):
    path, content = tmp_path / "weights", bytearray(9 * 2**20)
    path.write_bytes(content)
    before = setups._fingerprint(path)
    for place in (0, -1):
        changed = content.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert setups._fingerprint(path) != before


def test_the_command_line_shows_errors_in_one_line_and_exits_with_two(config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(arithmetic.main, arithmetic.Config, ["--base", "99", "--runs", str(config.runs)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --base must be 2 to 36, got 99\n"
    assert cli.experiments()["arithmetic"].startswith("Teach a language model to calculate")

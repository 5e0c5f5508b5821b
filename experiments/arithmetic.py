"""Teach a language model to calculate, or to complete prompts of your own, and measure what it solves.

Makes problems like `37+58=`, trains a small decoder on them by supervised fine-tuning with packed sequences, and solves
problems that it has not seen: greedily, and with many samples each (pass@k, maj@k). With --model PATH --data FILE.jsonl
the same script fine-tunes a Hugging Face model, whole or by --lora RANK, on a laptop or on a pod. Several values for a
--hyper flag span a grid that trains as one program. The same command resumes a run that was stopped.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import data, reporting, sequences, sweeps, tokens
from esscher.core.errors import UsageError
from esscher.experiments import cli, language, policies, runs, solving
from esscher.models import decoder, hf, hf_files
from esscher.samplers import decoding

__all__ = ["Config", "Setup", "main", "prepare"]


@dataclasses.dataclass(frozen=True)
class Config(runs.Settings):
    """Settings of the arithmetic experiment."""

    steps: int = 1000
    """Training steps."""
    batch_size: int = 16
    """Rows of packed sequences per step, over all devices."""
    save_every: int = 200
    """Steps between checkpoints, a multiple of 20."""
    digits: int = 2
    """Digits of the operands, at most."""
    operations: str = "+"
    """Which of + - * the problems use, e.g. +-."""
    base: int = 10
    """Base of the numbers."""
    data: pathlib.Path | None = None
    """A jsonl file, each line {"prompt": "...", "completion": "..."}, in place of arithmetic; needs --model."""
    model: str | None = None
    """A folder with a Hugging Face model and its tokenizer, or a name on the hub; a new small model by default."""
    lora: int = 0
    """Rank of low-rank adapters to train on --model in place of all its parameters."""
    alpha: float = 16.0
    """Strength of the adapters: they add alpha / rank times their product."""
    width: int = 128
    """Width of a new model; heads are 32 wide."""
    depth: int = 3
    """Layers of a new model."""
    length: int = 128
    """Tokens in a row of packed sequences."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the arithmetic, and of the weights under an adapter; what is trained stays in float32."""
    remat: bool = False
    """Save memory: compute layers again for the gradient."""
    average: bool = True
    """Keep a moving average of the parameters, and judge that; it takes the memory of another copy."""
    problems: int = 256
    """Problems held out, which judge the model."""
    samples: int = 16
    """Samples of each of them for pass@k and maj@k."""
    hyper: runs.Hyper = dataclasses.field(default_factory=runs.Hyper)


MAY_CHANGE = (*runs.MAY_CHANGE, "samples")


class Setup(NamedTuple):
    """What a stage starts from."""

    task: language.Task
    tokenizer: Any
    stop: tuple[int, ...]
    policy: policies.Policy
    origin: pathlib.Path | None  # folder of the pretrained model
    train: list[sequences.Tokens]
    test: list[sequences.Tokens]


def prepare(config: Config, mesh: Mesh) -> Setup:
    """Problems, tokenizer and model of a configuration.

    Raises:
      UsageError: flags that do not go together, or files that are not as they should be.
    """
    if config.model is None and (config.data is not None or config.lora):
        flag = "--data" if config.data else "--lora"
        raise UsageError(f"{flag} needs --model, the folder or the name on the hub of a pretrained one")
    if config.data is None:
        task = language.arithmetic(config.digits, config.operations, config.base, config.problems, config.seed)
    else:
        task = language.from_file(config.data, config.problems, config.seed)
    folder = None
    if config.model is None:
        tokenizer, stop = language.tokenizer_of(config.operations, config.base), (language.END,)
        policy = policies.new(_architecture(config, tokenizer.get_vocab_size()))
    else:
        folder = hf_files.find_folder(config.model, None)
        tokenizer, stop = language.open_tokenizer(folder)
        # What is trained is kept in float32: in bfloat16 small updates, and all of the average's, would round to none.
        architecture, params = hf.load(folder, dtype=config.dtype if config.lora else "float32", mesh=mesh)
        if config.lora:
            policy = policies.adapted(architecture, params, config.lora, config.alpha)
        else:
            policy = policies.full(architecture, params)
    encoded = [language.encode(tokenizer, stop[0], part) for part in task]
    for part, coded in zip(task, encoded, strict=True):
        for example, ids in zip(part, coded, strict=True):
            _check_fit(config, policy, example, [*ids.prompt, *ids.completion])
    return Setup(task, tokenizer, stop, policy, folder, *encoded)


def _check_fit(config: Config, policy: policies.Policy, example: sequences.Example, ids: list[int]) -> None:
    where = f"the example that begins {example.prompt[:40]!r}"
    if len(ids) > config.length:
        raise UsageError(f"{where} has {len(ids)} tokens, a row has {config.length}: raise --length or shorten it")
    if max(ids) >= policy.config.vocabulary:
        raise UsageError(f"{where} has the token {max(ids)}, the model {policy.config.vocabulary}: mind the tokenizer")


def _architecture(config: Config, vocabulary: int) -> decoder.Config:
    heads, rest = divmod(config.width, 32)
    if rest:
        raise UsageError(f"--width must be a multiple of 32, got {config.width}")
    return decoder.Config(
        vocabulary=vocabulary,
        width=config.width,
        depth=config.depth,
        heads=heads,
        kv_heads=heads,
        head_dim=32,
        mlp=4 * config.width,
        tied=True,
    )


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


def fine_tuning(config: Config, setup: Setup, mesh: Mesh, sweep: sweeps.Sweep) -> runs.Program:
    """Maximum likelihood of the completions, `-sum log p(token) / number of tokens`, as a program."""
    policy = setup.policy
    length = max(len(example.completion) for example in setup.test)
    generate = policies.generator(policy, length, setup.stop)

    def loss(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> tuple[Array, dict]:
        logp, mask = policies.completion_logps(
            policy, trainable, batch, *constants, dtype=config.dtype, remat=config.remat
        )
        total, count = tokens.aggregate(-logp, mask, "token-mean")
        return total / jnp.maximum(count, 1), {}

    def validate(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> dict[str, Array]:
        value, _ = loss(trainable, key, batch["packed"], hyper, *constants)
        answers = generate(key, trainable, *batch["prompt"], *constants, choose=decoding.greedy)
        return {"validation_loss": value, "exact_match": solving.exact_match(answers, *batch["answer"]).mean()}

    return runs.compile_program(
        policy.initialize,
        policy.axes,
        loss,
        validate,
        functools.partial(runs.adamw, config.steps),
        mesh,
        sweep,
        policy.constants,
        policy.pretrained,
        average=config.average,
    )


def held_out(config: Config, setup: Setup, shards: int) -> dict[str, Any]:
    """The batch that validates: the test problems packed, and their prompts and answers apart."""
    packed = sequences.pack(setup.test, config.length)
    rows = -(-len(packed["tokens"]) // shards) * shards
    filled = {"tokens": 0, "segments": -1, "completion": False}
    packed = {
        name: np.concatenate([array, np.full((rows - len(array), config.length), filled[name], array.dtype)])
        for name, array in packed.items()
    }
    prompts, answers = zip(*setup.test, strict=True)
    return {"packed": packed, "prompt": sequences.pad_left(prompts), "answer": sequences.pad_right(answers)}


# --- the run ----------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Trains or resumes, then solves the problems held out and writes the report."""
    mesh = runs.start(config, positive=("width", "depth", "length", "problems", "samples"))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.problems % shards:
        raise UsageError(f"--problems {config.problems} does not split over {shards} devices: take a multiple")
    if config.lora < 0:
        raise UsageError(f"--lora must be at least 0, got {config.lora}")
    sweep = sweeps.grid(config.hyper, divisor=mesh.shape["sweep"])
    setup = prepare(config, mesh)
    packed, judged = sequences.pack(setup.train, config.length), held_out(config, setup, shards)
    program = fine_tuning(config, setup, mesh, sweep)
    folder = reporting.open_run(
        config, experiment="arithmetic", name=config.name, root=config.runs, may_change=MAY_CHANGE
    )
    source = data.batches(data.Table(packed), batch_size=config.batch_size, seed=config.seed)
    constants, pretrained = setup.policy.constants, setup.policy.pretrained
    trained = runs.train(config, program, mesh, sweep, source, judged, folder, constants, pretrained)
    if trained is not None:
        _evaluate(config, setup, mesh, sweep, trained, packed, folder)
        reporting.print_results(folder)


def _evaluate(
    config: Config,
    setup: Setup,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    trained: runs.Trained,
    packed: dict[str, np.ndarray],
    folder: pathlib.Path,
) -> None:
    """Solves with the best member of the sweep, keeps it as a Hugging Face folder, and writes the report."""
    losses, exact = (np.atleast_1d(trained.metrics[name]) for name in ("validation_loss", "exact_match"))
    best = int(np.nanargmin(losses))
    trainable = runs.averaged(trained.state)
    if sweep.swept:
        trainable = jax.tree.map(lambda leaf: leaf[best], trainable)
    policies.save(folder / "model", setup.policy, trainable, setup.tokenizer, setup.stop, setup.origin)
    members = [
        [label or "this run", float(loss), float(match)]
        for label, loss, match in zip(sweep.labels, losses, exact, strict=True)
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    filled = (packed["segments"] >= 0).mean()
    size = (
        f"{count:,} trained parameters, {config.steps} steps of {config.batch_size} rows of {config.length} tokens "
        f"({filled:.1%} of them used), {len(setup.train):,} problems to learn from."
    )
    table = reporting.table(["run", "validation loss", "exact match"], members)
    curves = runs.curves(
        folder, sweep, ("loss", "validation_loss", "exact_match"), "Loss per token in training and on problems held out"
    )
    solved = solving.solve(
        setup.task.test,
        setup.test,
        setup.tokenizer,
        setup.policy,
        setup.stop,
        trainable,
        mesh,
        key=jax.random.key(config.seed + 1),
        samples=config.samples,
    )
    sections = {"Training": "\n\n".join([size, table, curves]), **solving.report(folder, solved)}
    reporting.write_report(folder, f"arithmetic: {config.name}", sections)


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.arithmetic", description=__doc__)

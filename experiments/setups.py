"""What a stage of a language model's training starts from: task, tokenizer and model, as the flags ask for them."""

import functools
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from esscher.core import data, reporting, sequences, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import language, policies, runs
from esscher.models import decoder, hf, hf_files

__all__ = ["Setup", "compile_program", "experiment", "open_run", "prepare", "train"]

MAY_CHANGE = (*runs.MAY_CHANGE, "samples")
KINDS = {"sft": sequences.Example, "dpo": language.Pair, "rl": language.Problem}  # of the lines of --data


class Setup(NamedTuple):
    """What a stage starts from."""

    task: language.Task
    tokenizer: Any
    stop: tuple[int, ...]
    policy: policies.Policy
    origin: pathlib.Path | None  # folder of the pretrained model
    train: list[sequences.Tokens]
    test: list[sequences.Tokens]
    rejected: tuple[list[sequences.Tokens], list[sequences.Tokens]] | None = None  # beside train and test, from a file


def prepare(config: Any, mesh: Mesh) -> Setup:
    """Problems, tokenizer and model of a configuration of `arithmetic`.

    Raises:
      UsageError: flags that do not go together, or files that are not as they should be.
    """
    if config.model is None and (config.data is not None or config.lora):
        flag = "--data" if config.data else "--lora"
        raise UsageError(f"{flag} needs --model, the folder or the name on the hub of a pretrained one")
    if config.data is None:
        task = language.arithmetic(config.digits, config.operations, config.base, config.problems, config.seed)
    else:
        task = language.from_file(config.data, config.problems, config.seed, KINDS[config.stage])
    folder = None
    if config.model is None:
        tokenizer, stop = language.tokenizer_of(config.operations, config.base), (language.END,)
        policy = policies.new(_architecture(config, tokenizer.get_vocab_size()))
    else:
        folder = hf_files.find_folder(config.model, None)
        tokenizer, stop = language.open_tokenizer(folder)
        policy = _pretrained(config, folder, mesh)
    policy = policy._replace(dtype=config.dtype)

    def encode(part: list[Any], completion: int) -> list[sequences.Tokens]:
        examples = [sequences.Example(fields[0], fields[completion]) for fields in part]
        encoded = language.encode(tokenizer, stop[0], examples)
        for fields, ids in zip(part, encoded, strict=True):
            _check_fit(config, policy.config, fields, [*ids.prompt, *ids.completion])
        return encoded

    train, test = (encode(part, 1) for part in task)
    of_pairs = config.data is not None and config.stage == "dpo"
    rejected = (encode(task.train, 2), encode(task.test, 2)) if of_pairs else None
    if config.stage == "rl":
        task = language.Task(*([sequences.Example(*fields) for fields in part] for part in task))
    return Setup(task, tokenizer, stop, policy, folder, train, test, rejected)


def _pretrained(config: Any, folder: pathlib.Path, mesh: Mesh) -> policies.Policy:
    # What is trained is kept in float32: in bfloat16 small updates, and all of the average's, would round to none.
    architecture, params = hf.load(folder, dtype=config.dtype if config.lora else "float32", mesh=mesh)
    if config.lora:
        return policies.adapted(architecture, params, config.lora, config.alpha)
    return policies.full(architecture, params)


def experiment(config: Any) -> str:
    """Name of the folder of a stage's runs, beside those of the others."""
    return "arithmetic" if config.stage == "sft" else f"arithmetic-{config.stage}"


def open_run(config: Any, setup: Setup) -> pathlib.Path:
    """The folder of a run, see `reporting.open_run`; files given by name must hold what they held when it began."""
    may_change = runs.MAY_CHANGE if config.stage == "dpo" else MAY_CHANGE  # the samples are where its pairs come from
    read = {} if config.data is None else {"content of --data": _fingerprint(config.data)}
    if setup.origin is not None:
        weights = sorted(setup.origin.glob("*.safetensors"))
        read["content of --model"] = " ".join(_fingerprint(path) for path in (setup.origin / "config.json", *weights))
    return reporting.open_run(
        reporting.plain(config) | read,
        experiment=experiment(config),
        name=config.name,
        root=config.runs,
        may_change=may_change,
    )


def _fingerprint(path: pathlib.Path) -> str:
    """Size of a file and a checksum of it, or of its first and last four megabytes where it is larger."""
    size, edge = path.stat().st_size, 2**22
    with path.open("rb") as file:
        checksum = zlib.crc32(file.read(edge if size > 2 * edge else size))
        if size > 2 * edge:
            file.seek(-edge, os.SEEK_END)
            checksum = zlib.crc32(file.read(), checksum)
    return f"{size} bytes, crc {checksum:08x}"


def compile_program(
    config: Any,
    setup: Setup,
    loss: Callable[..., Any],
    validate: Callable[..., Any],
    mesh: Mesh,
    sweep: sweeps.Sweep,
    *constants: Any,
    updates: int = 1,
    **options: Any,
) -> runs.Program:
    """`runs.compile_program` for a setup's policy and AdamW, with the policy's constants and then others.

    Args:
      config: of `arithmetic`.
      setup: whose policy learns.
      loss: as there, and so `validate`, `mesh` and `sweep`.
      validate: see above.
      mesh: see above.
      sweep: see above.
      *constants: beside those of the policy.
      updates: that the optimiser makes in a step, all on its batch.
      **options: passed on.
    """
    policy, optimizer = setup.policy, functools.partial(runs.adamw, config.steps * updates)
    every = (*policy.constants, *constants)
    return runs.compile_program(
        policy.initialize,
        policy.axes,
        loss,
        validate,
        optimizer,
        mesh,
        sweep,
        every,
        policy.pretrained,
        average=config.average,
        repeats=updates,
        **options,
    )


def train(
    config: Any,
    setup: Setup,
    program: runs.Program,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    columns: dict[str, Any],
    held_out: Any,
    folder: pathlib.Path,
    *constants: Any,
) -> runs.Trained | None:
    """`runs.train` on the rows of a table, with the policy's constants and then others."""
    source = data.batches(data.Table(columns), batch_size=config.batch_size, seed=config.seed)
    every = (*setup.policy.constants, *constants)
    return runs.train(config, program, mesh, sweep, source, held_out, folder, every, setup.policy.pretrained)


def _check_fit(config: Any, architecture: decoder.Config, fields: tuple[str, ...], ids: list[int]) -> None:
    """Refuses an example that a row, the model's context or its vocabulary has no room for."""
    # Where positions are stretched by "linear" or "yarn", a checkpoint may state its context from before that.
    stated = architecture.context if architecture.rope.scaling in ("none", "llama3") else None
    context = stated or config.length
    if len(ids) <= min(config.length, context) and max(ids) < architecture.vocabulary:
        return
    where = f"the problem {fields[0][:40]!r}"
    if config.data is not None:
        lines = sequences.read_jsonl(config.data, KINDS[config.stage]._fields).items()
        where = f"{config.data}, line {next(number for number, found in lines if found == tuple(fields))},"
    if max(ids) >= architecture.vocabulary:
        raise UsageError(f"{where} has the token {max(ids)}, the model {architecture.vocabulary}: mind the tokenizer")
    if len(ids) > config.length:
        raise UsageError(f"{where} has {len(ids)} tokens, a row has {config.length}: raise --length or shorten it")
    raise UsageError(f"{where} has {len(ids)} tokens, the context of the model {context}: shorten it")


def _architecture(config: Any, vocabulary: int) -> decoder.Config:
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

"""Supervised fine-tuning: maximum likelihood of completions, on packed sequences."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import meshes, reporting, sequences, sweeps, tokens
from esscher.experiments import policies, runs, setups, solving
from esscher.experiments.setups import Setup
from esscher.samplers import decoding

__all__ = ["fine_tuning", "held_out", "run"]


def fine_tuning(config: Any, setup: Setup, mesh: Mesh, sweep: sweeps.Sweep) -> runs.Program:
    """Maximum likelihood of the completions, `-sum log p(token) / number of tokens`, as a program."""
    policy = setup.policy
    length = max(len(example.completion) for example in setup.test)
    generate = policies.generator(policy, length, setup.stop, mesh)

    def loss(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> tuple[Array, dict]:
        found = policies.completions(policy, trainable, batch, *constants, remat=config.remat)
        total, count = tokens.aggregate(-found.logps, found.mask, "token-mean")
        return total / jnp.maximum(count, 1), {}

    def validate(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> dict[str, Array]:
        value, _ = loss(trainable, key, batch["packed"], hyper, *constants)
        answers = generate(key, trainable, *batch["prompt"], *constants, choose=decoding.greedy)
        return {"validation_loss": value, "exact_match": solving.exact_match(answers, *batch["answer"]).mean()}

    return setups.compile_program(config, setup, loss, validate, mesh, sweep)


def held_out(config: Any, setup: Setup, shards: int) -> dict[str, Any]:
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


def run(config: Any, mesh: Mesh) -> None:
    """Trains or resumes, then solves the problems held out and writes the report."""
    sweep = sweeps.grid(config.hyper, divisor=mesh.shape["sweep"])
    setup = setups.prepare(config, mesh)
    packed = sequences.pack(setup.train, config.length)
    judged = held_out(config, setup, meshes.row_shards(mesh))
    program = fine_tuning(config, setup, mesh, sweep)
    folder = setups.open_run(config, setup)
    trained = setups.train(config, setup, program, mesh, sweep, packed, judged, folder)
    if trained is not None:
        _evaluate(config, setup, mesh, sweep, trained, packed, folder)
        reporting.print_results(folder)


def _evaluate(
    config: Any,
    setup: Setup,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    trained: runs.Trained,
    packed: dict[str, np.ndarray],
    folder: pathlib.Path,
) -> None:
    """Solves with the best member of the sweep, keeps it as a Hugging Face folder, and writes the report."""
    losses, exact, skipped = (
        np.atleast_1d(trained.metrics[name]) for name in ("validation_loss", "exact_match", "skipped")
    )
    best = int(np.nanargmin(losses))
    trainable = runs.member(trained.state, sweep, best)
    policies.save(folder / "model", setup.policy, trainable, setup.tokenizer, setup.stop, setup.origin)
    members = [
        [label or "this run", float(loss), float(match), int(steps)]
        for label, loss, match, steps in zip(sweep.labels, losses, exact, skipped, strict=True)
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    filled = (packed["segments"] >= 0).mean()
    size = (
        f"{count:,} trained parameters, {config.steps} steps of {config.batch_size} rows of {config.length} tokens "
        f"({filled:.1%} of them used), {len(setup.train):,} problems to learn from."
    )
    table = reporting.table(["run", "validation loss", "exact match", "steps skipped"], members)
    curves = runs.curves(
        folder, sweep, ("loss", "validation_loss", "exact_match"), "Loss per token in training and on problems held out"
    )
    solved = solving.solve(setup, trainable, mesh, key=jax.random.key(config.seed + 1), samples=config.samples)
    if sweep.swept:
        table += f"\n\nThe one with the least validation loss, {sweep.labels[best]}, is saved and solves what follows."
    sections = {"Training": "\n\n".join([size, table, curves]), **solving.report(folder, solved)}
    reporting.write_report(folder, f"arithmetic: {config.name}", sections)

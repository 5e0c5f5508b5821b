"""Learning from preferences: any loss on pairs, against a reference whose log-probabilities are computed once."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import data, reporting, sequences, sweeps
from esscher.core.errors import UsageError
from esscher.experiments import named_objective, policies, preference_pairs, runs, setups, solving
from esscher.experiments.named_objective import Objective
from esscher.experiments.preference_pairs import Pairs
from esscher.experiments.setups import Setup
from esscher.samplers import decoding

__all__ = ["learning", "run"]

OPTION = "objective."  # in front of the names of an objective's options, among those of the optimiser


def learning(config: Any, setup: Setup, objective: Objective, mesh: Mesh, sweep: sweeps.Sweep) -> runs.Program:
    """The mean of the objective over the pairs that are kept, as a program."""
    policy, generated = setup.policy, setup.rejected is None
    length = max(len(example.completion) for example in setup.test)
    generate = policies.generator(policy, length, setup.stop)

    def losses(
        trainable: Any, batch: dict[str, Array], hyper: dict[str, Array], *constants: Any
    ) -> tuple[Array, dict[str, Array]]:
        shape = batch["tokens"].shape
        flat = {name: batch[name].reshape(-1, shape[-1]) for name in ("tokens", "segments", "completion")}
        found = policies.completions(policy, trainable, flat, *constants, dtype=config.dtype, remat=config.remat)
        logps, mask = (x.reshape(shape) for x in (found.logps, found.mask))
        options = {name.removeprefix(OPTION): value for name, value in hyper.items() if name.startswith(OPTION)}
        logp, ref = (jnp.where(mask, x, 0).sum(-1) for x in (logps, batch["ref"]))
        gained = logp - ref
        metrics = {
            "accuracy": jnp.mean(gained[:, 0] > gained[:, 1], dtype=jnp.float32),
            "margin": jnp.mean(gained[:, 0] - gained[:, 1]),
            "chosen_logp": logp[:, 0].mean(),
            "rejected_logp": logp[:, 1].mean(),
            "chosen_gain": gained[:, 0].mean(),
            "rejected_gain": gained[:, 1].mean(),
        }
        return named_objective.apply(objective, logps, batch["ref"], mask, options), metrics

    def loss(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> tuple[Array, dict]:
        values, metrics = losses(trainable, batch, hyper, *constants)
        kept = batch["rank"] < hyper["keep"]
        return jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(kept.sum(), 1), metrics

    def validate(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> dict[str, Array]:
        values, metrics = losses(trainable, batch["pairs"], hyper, *constants)
        metrics = {f"validation_{name}": value for name, value in (metrics | {"loss": values.mean()}).items()}
        if generated:
            answers = generate(key, trainable, *batch["prompt"], *constants, choose=decoding.greedy)
            metrics["exact_match"] = solving.exact_match(answers, *batch["answer"]).mean()
        return metrics

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


# --- the run ----------------------------------------------------------------------------------------------------------


def run(config: Any, mesh: Mesh) -> None:
    """Makes pairs, trains or resumes, and writes the report.

    Raises:
      UsageError: no model to begin with, an objective that is not there or lacks an option, or no pairs.
    """
    if config.model is None:
        raise UsageError(
            "--stage dpo needs --model, e.g. runs/arithmetic/default/model once the command without --stage has made it"
        )
    objective = named_objective.resolve(config.objective, config.options)
    hyper = vars(config.hyper) | {f"{OPTION}{name}": values for name, values in objective.swept.items()}
    sweep = sweeps.grid(hyper, divisor=mesh.shape["sweep"])
    setup = setups.prepare(config, mesh)
    kept = pathlib.Path(config.runs, "arithmetic", config.name, "pairs.npz")
    if known := kept.exists():
        pairs = preference_pairs.load(kept)
    else:
        pairs = preference_pairs.make(config, setup, mesh, mismatched=objective.mismatched)
    program = learning(config, setup, objective, mesh, sweep)
    folder = setups.open_run(config)
    if not known:
        preference_pairs.save(kept, pairs)
    source = data.batches(data.Table(pairs.train), batch_size=config.batch_size, seed=config.seed)
    prompts, answers = zip(*setup.test, strict=True)
    judged: dict[str, Any] = {"pairs": pairs.test}
    judged |= {"prompt": sequences.pad_left(prompts), "answer": sequences.pad_right(answers)}
    constants, pretrained = setup.policy.constants, setup.policy.pretrained
    trained = runs.train(config, program, mesh, sweep, source, judged, folder, constants, pretrained)
    if trained is not None:
        _evaluate(config, setup, mesh, sweep, trained, pairs, folder)
        reporting.print_results(folder)


def _evaluate(
    config: Any,
    setup: Setup,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    trained: runs.Trained,
    pairs: Pairs,
    folder: pathlib.Path,
) -> None:
    """Keeps the best member of the sweep as a Hugging Face folder, solves with it, and writes the report."""
    judge = "validation_accuracy" if setup.rejected else "exact_match"
    best = int(np.nanargmax(np.atleast_1d(trained.metrics[judge])))
    trainable = runs.member(trained.state, sweep, best)
    policies.save(folder / "model", setup.policy, trainable, setup.tokenizer, setup.stop, setup.origin)
    sections = {
        "Preferences": "\n\n".join([_summary(config, pairs), _table(sweep, trained, pairs), *_pictures(folder, sweep)])
    }
    if setup.rejected is None:
        options = {"key": jax.random.key(config.seed + 1), "samples": config.samples}
        solved = solving.solve(setup, trainable, mesh, **options)
        sections |= solving.report(folder, solved)
    reporting.write_report(folder, f"arithmetic: {config.name}", sections)


def _summary(config: Any, pairs: Pairs) -> str:
    count = len(pairs.train["rank"])
    origin = f", from {pairs.asked} problems with {config.samples} answers each" if pairs.asked else " of the file"
    return (
        f"{config.objective} on {count} pairs{origin}; {len(pairs.test['rank'])} pairs held out; {config.steps} steps "
        f"of {config.batch_size} pairs. The reference is the model at the start. A pair is ranked rightly where the "
        "log-probability of the chosen response has grown by more than that of the rejected one; the margin is the "
        "difference, in nats."
    )


def _before(columns: dict[str, np.ndarray]) -> tuple[float, float]:
    """Mean log-probability of chosen and rejected responses under the reference."""
    return tuple(columns["ref"][:, i].sum(-1).mean() for i in (0, 1))


def _table(sweep: sweeps.Sweep, trained: runs.Trained, pairs: Pairs) -> str:
    """What the pairs held out say of each member, and of the reference."""
    metrics = {name: np.atleast_1d(values) for name, values in trained.metrics.items()}
    names = ["validation_loss", "validation_accuracy", "validation_margin", "validation_chosen_logp"]
    names += ["validation_rejected_logp", *(["exact_match"] if pairs.asked else [])]
    header = ["run", *(name.removeprefix("validation_").replace("_", " ") for name in names)]
    solved = [pairs.exact_match] if pairs.asked else []
    rows: list[list[Any]] = [["reference", "-", "-", 0.0, *_before(pairs.test), *solved]]
    for i, label in enumerate(sweep.labels):
        rows.append([label or "this run", *(float(metrics[name][i]) for name in names)])
    return reporting.table(header, rows)


def _pictures(folder: pathlib.Path, sweep: sweeps.Sweep) -> list[str]:
    learned = runs.curves(
        folder,
        sweep,
        ("loss", "accuracy", "margin"),
        "Loss, share of pairs ranked rightly, and margin, on pairs as they are learned from",
    )
    displaced = runs.curves(
        folder,
        sweep,
        ("chosen_gain", "rejected_gain"),
        "What the log-probability of chosen and of rejected responses has gained; below 0 chosen ones are displaced",
        file="displacement.png",
    )
    return [learned, displaced]

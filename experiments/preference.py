"""Learning from preferences: any loss on pairs, against a reference whose log-probabilities are computed once."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import reporting, sequences, sweeps
from esscher.experiments import named, policies, preference_pairs, runs, setups, solving
from esscher.experiments.named import Named
from esscher.experiments.preference_pairs import Pairs
from esscher.experiments.setups import Setup
from esscher.objectives import preference
from esscher.samplers import decoding

__all__ = ["learning", "losses", "resolve", "run"]

PAIRED = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
MASKS = ("chosen_mask", "rejected_mask")
SINGLE = ("policy", "reference", "desirable", "kl_baseline")
OBJECTIVE = named.Place(
    flag="--objective",
    options="--options",
    home="esscher.objectives.preference",
    known=(*PAIRED, "len_chosen", "len_rejected", "nll", *MASKS, *SINGLE),
    prefix="objective.",
)


# --- the objective ----------------------------------------------------------------------------------------------------


def resolve(path: str, options: Sequence[str] = ()) -> Named:
    """The objective that the flags name, tried on pairs of no content.

    Raises:
      UsageError: see `named.resolve`; or the objective objects to its options, or is no loss for each pair.
    """
    objective = named.resolve(OBJECTIVE, path, options)
    logps, mask = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4), bool)
    options = {name: jnp.zeros(()) for name in objective.numbers}
    named.attempt(objective, lambda *arrays: losses(objective, *arrays, options), logps, logps, mask)
    return objective


def losses(objective: Named, policy: Array, ref: Array, mask: Array, options: Mapping[str, Array]) -> Array:
    """The loss of each pair, `[B]`; of a loss of single responses the mean of the two.

    A loss that asks for masks gets log-probabilities token by token, others their sums.

    Args:
      objective: the loss.
      policy: log-probability of each token of the chosen and the rejected response, and where the objective asks for a
        baseline of one to another prompt, `[B, 2 or 3, T]`.
      ref: likewise, of the reference.
      mask: the tokens of the response.
      options: values of the objective's options that are numbers.

    Raises:
      ValueError: what comes back is no loss for each pair.
    """
    policy, ref = (jnp.where(mask, x, 0) for x in (policy, ref))
    pairs, length, sums = len(policy), mask.sum(-1), [x.sum(-1) for x in (policy, ref)]
    of_pair = (policy, ref) if set(MASKS) & set(objective.arguments) else sums
    known = dict(zip(PAIRED, (x[:, i] for x in of_pair for i in (0, 1)), strict=True))
    for i, name in enumerate(("chosen", "rejected")):
        known |= {f"{name}_mask": mask[:, i], f"len_{name}": length[:, i]}
    known["nll"] = preference.nll(policy[:, 0], mask[:, 0], normalize=True)
    known |= {name: x[:, :2].T.reshape(-1) for name, x in zip(("policy", "reference"), sums, strict=True)}
    known["desirable"] = jnp.repeat(jnp.array([1.0, 0.0]), pairs)
    if "kl_baseline" in objective.arguments:
        known["kl_baseline"] = preference.kto_baseline(*(x[:, 2] for x in sums))
    found = named.call(objective, known, options)
    if jnp.shape(found) not in ((pairs,), (2 * pairs,)):
        raise ValueError(f"gives {jnp.shape(found)} for {pairs} pairs; it must give one loss each")
    return found if len(found) == pairs else found.reshape(2, pairs).mean(0)


# --- the program ------------------------------------------------------------------------------------------------------


def learning(config: Any, setup: Setup, objective: Named, mesh: Mesh, sweep: sweeps.Sweep) -> runs.Program:
    """The mean of the objective over the pairs that are kept, as a program."""
    policy, generated = setup.policy, setup.rejected is None
    length = max(len(example.completion) for example in setup.test)
    generate = policies.generator(policy, length, setup.stop, mesh)

    def judge(
        trainable: Any, batch: dict[str, Array], hyper: dict[str, Array], *constants: Any
    ) -> tuple[Array, dict[str, Array]]:
        shape = batch["tokens"].shape
        flat = {name: batch[name].reshape(-1, shape[-1]) for name in ("tokens", "segments", "completion")}
        found = policies.completions(policy, trainable, flat, *constants, remat=config.remat)
        logps, mask = (x.reshape(shape) for x in (found.logps, found.mask))
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
        return losses(objective, logps, batch["ref"], mask, named.options_of(objective, hyper)), metrics

    def loss(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> tuple[Array, dict]:
        values, metrics = judge(trainable, batch, hyper, *constants)
        kept = batch["rank"] < hyper["keep"]
        return jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(kept.sum(), 1), metrics

    def validate(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> dict[str, Array]:
        values, metrics = judge(trainable, batch["pairs"], hyper, *constants)
        metrics = {f"validation_{name}": value for name, value in (metrics | {"loss": values.mean()}).items()}
        if generated:
            answers = generate(key, trainable, *batch["prompt"], *constants, choose=decoding.greedy)
            metrics["exact_match"] = solving.exact_match(answers, *batch["answer"]).mean()
        return metrics

    return setups.compile_program(config, setup, loss, validate, mesh, sweep)


# --- the run ----------------------------------------------------------------------------------------------------------


def run(config: Any, mesh: Mesh) -> None:
    """Makes pairs, trains or resumes, and writes the report.

    Raises:
      UsageError: an objective that is not there or lacks an option, or no pairs.
    """
    objective = resolve(config.objective, config.options)
    sweep = sweeps.grid(vars(config.hyper) | named.swept(objective), divisor=mesh.shape["sweep"])
    setup = setups.prepare(config, mesh)
    kept = pathlib.Path(config.runs, setups.experiment(config), config.name, "pairs.npz")
    if kept.parent.exists():
        setups.open_run(config, setup)  # before pairs are made for a run that was begun with other flags
    if known := kept.exists():
        pairs = preference_pairs.load(kept)
    else:
        mismatched = "kl_baseline" in objective.arguments
        pairs = preference_pairs.make(config, setup, mesh, mismatched=mismatched)
    program = learning(config, setup, objective, mesh, sweep)
    folder = setups.open_run(config, setup)
    if not known:
        preference_pairs.save(kept, pairs)
    prompts, answers = zip(*setup.test, strict=True)
    judged: dict[str, Any] = {"pairs": pairs.test}
    judged |= {"prompt": sequences.pad_left(prompts), "answer": sequences.pad_right(answers)}
    trained = setups.train(config, setup, program, mesh, sweep, pairs.train, judged, folder)
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
    reporting.write_report(folder, f"arithmetic, dpo: {config.name}", sections)


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

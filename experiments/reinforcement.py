"""Learning from verified rewards: sample answers, verify them, and take the steps of any policy loss."""

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import meshes, reporting, sequences, sweeps, tokens
from esscher.core.errors import UsageError
from esscher.experiments import named, policies, rollouts, runs, setups, solving
from esscher.experiments.named import Named
from esscher.experiments.rollouts import Rollouts
from esscher.experiments.setups import Setup
from esscher.objectives.policy import keep_mixed_groups, kl_estimate
from esscher.samplers import decoding

__all__ = ["learning", "resolve", "run"]

OBJECTIVE = named.Place(
    flag="--objective",
    options="--options",
    home="esscher.objectives.policy",
    known=("rewards", "logp", "logp_old", "advantages", "mask", "length"),
    prefix="objective.",
)
WITH_REFERENCE = OBJECTIVE._replace(known=(*OBJECTIVE.known, "logp_ref"))
ADVANTAGE = named.Place(
    flag="--advantage",
    options="--advantage-options",
    home="esscher.objectives.advantages",
    known=("rewards",),
    prefix="advantage.",
)


def resolve(config: Any) -> tuple[Named, Named]:
    """Objective and advantage that the flags name, tried on answers of no content.

    Raises:
      UsageError: see `named.resolve`; or one of them objects to its options, or gives arrays of a wrong shape.
    """
    place = WITH_REFERENCE if config.reference else OBJECTIVE
    objective = named.resolve(place, config.objective, config.options)
    advantage = named.resolve(ADVANTAGE, config.advantage, config.advantage_options)
    _refuse_idle(config, objective)
    rewards, logp, mask = jnp.zeros((2, 4)), jnp.zeros((8, 3)), jnp.ones((8, 3), bool)
    options = {name: jnp.ones(()) for name in [*named.swept(objective), *named.swept(advantage)]}
    find = functools.partial(advantages, advantage, hyper=options)
    if (shape := named.attempt(advantage, find, rewards).shape) != rewards.shape:
        raise UsageError(f"--advantage {config.advantage} gives {shape} for rewards of shape {rewards.shape}")
    ask = functools.partial(losses, objective, hyper=options, length=3)
    found = named.attempt(objective, ask, rewards, logp, logp, logp, rewards, mask)
    named.attempt(objective, functools.partial(mean_loss, how=config.reduce), found, mask)
    if isinstance(found, tuple) and config.reduce != "token-mean":
        raise UsageError(f"--reduce: {config.objective} has its own reduction")
    return objective, advantage


def _refuse_idle(config: Any, objective: Named) -> None:
    """Raises a UsageError for flags that the objective would not hear of."""
    path, asks = config.objective, objective.arguments
    if config.reference and "logp_ref" not in asks:
        raise UsageError(f"--reference: {path} does not ask for logp_ref; leave the flag out")
    optional = "logp_ref" in inspect.signature(objective.function).parameters
    idle = [name for name in ("beta", "kl") if name in objective.fixed or name in objective.numbers]
    if optional and idle and not config.reference:
        raise UsageError(f"--options {idle[0]}=... of {path} needs --reference, from which the divergence is taken")
    if "logp_old" not in asks and (config.epochs > 1 or config.hint):
        flag = "--epochs 1" if config.epochs > 1 else "no --hint"
        raise UsageError(f"--objective {path} is for answers of the policy itself (no logp_old): give {flag}")
    if "advantages" not in asks and (config.advantage, config.advantage_options) != ("group_advantage", ()):
        raise UsageError(f"--advantage and --advantage-options: {path} has its own advantages")


def advantages(advantage: Named, rewards: Array, hyper: dict[str, Array]) -> Array:
    """Of each answer, `[P, G]`."""
    return named.call(advantage, {"rewards": rewards}, named.options_of(advantage, hyper))


def losses(
    objective: Named,
    rewards: Array,
    logp: Array,
    logp_old: Array,
    logp_ref: Array,
    advantage: Array,
    mask: Array,
    hyper: dict[str, Array],
    length: int,
) -> Any:
    """What the objective gives of answers: numerator and denominator, or losses `[B, T]`."""
    known = {"rewards": rewards, "logp": logp, "logp_old": logp_old, "logp_ref": logp_ref, "mask": mask}
    known |= {"advantages": advantage.ravel(), "length": float(length)}
    return named.call(objective, known, named.options_of(objective, hyper))


def mean_loss(found: Any, mask: Array, how: tokens.How) -> Array:
    """What an objective gives as a number, its losses reduced as asked.

    Raises:
      ValueError: it gives neither losses nor numerator and denominator.
    """
    if not isinstance(found, tuple):
        if jnp.shape(found) != mask.shape:
            raise ValueError(
                f"gives {jnp.shape(found)} for tokens of shape {mask.shape}; it must give a loss for each, or a "
                "numerator and a denominator"
            )
        found = tokens.aggregate(found, mask, how, length=float(mask.shape[1]) if how == "constant" else None)
    numerator, denominator = found
    if jnp.shape(numerator) or jnp.shape(denominator):
        raise ValueError(f"gives {jnp.shape(numerator)} and {jnp.shape(denominator)} in place of two numbers")
    return numerator / jnp.where(denominator > 0, denominator, 1)


# --- the programs -----------------------------------------------------------------------------------------------------


def answer_logps(config: Any, setup: Setup, trainable: Any, batch: Rollouts, constants: Any) -> tuple[Array, Array]:
    """Log-probability of each token of the answers, and their mask, `[P G, T]`."""
    group, length = batch.tokens.shape[1:]
    repeat = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    flat = lambda x: x.reshape(-1, length)  # noqa: E731
    prompt, prompt_mask, mask = repeat(batch.prompt), repeat(batch.prompt_mask), flat(batch.mask)
    inside = jnp.concatenate([prompt_mask, mask], 1)
    rows = {
        "tokens": jnp.concatenate([prompt, flat(batch.tokens)], 1),
        "segments": jnp.where(inside, 0, -1),
        "completion": jnp.concatenate([jnp.zeros_like(prompt_mask), mask], 1),
    }
    first = prompt.shape[1] - 1  # the place that is about the first token of an answer
    found = policies.completions(setup.policy, trainable, rows, *constants, first=first, remat=config.remat)
    return found.logps[:, :-1], mask


def learning(
    config: Any, setup: Setup, objective: Named, advantage: Named, mesh: Mesh, sweep: sweeps.Sweep, reference: Any
) -> runs.Program:
    """The updates on rollouts with their rewards, as a program; `reference` is the last of its constants."""

    def loss(trainable: Any, key: Array, batch: Any, hyper: dict[str, Array], *constants: Any) -> tuple[Array, dict]:
        *constants, reference = constants
        played, rewards = batch
        logp, mask = answer_logps(config, setup, trainable, played, constants)
        old = played.logp.reshape(mask.shape)
        ref = answer_logps(config, setup, reference, played, constants)[0] if config.reference else old
        chosen = advantages(advantage, rewards, hyper)
        found = losses(objective, rewards, logp, old, ref, chosen, mask, hyper, length=mask.shape[1])
        value = mean_loss(found, mask, config.reduce)
        sampled = mask & ~played.given.reshape(mask.shape)
        moved = jnp.where(mask, jnp.abs(jnp.expm1(logp - old)) > 0.2, False)
        count = jnp.maximum(mask.sum(), 1)
        return value, {
            "reward": jnp.nanmean(rewards),
            "entropy": -tokens.masked_mean(logp, sampled),
            "length": mask.sum() / len(mask),
            "clip_fraction": moved.sum() / count,
            "zero_variance": jnp.mean(~keep_mixed_groups(rewards), dtype=jnp.float32),
        }

    never = lambda *_: {}  # noqa: E731  # `_judge` validates, since the verifier is on the host
    options = {"updates": config.epochs, "own_batches": True}
    return setups.compile_program(config, setup, loss, never, mesh, sweep, reference, **options)


def _stepper(
    config: Any, setup: Setup, update: Callable, verifier: rollouts.Verifier, length: int, mesh: Mesh, sweep: Any
) -> Callable[..., Any]:
    """A step: sample, verify, update. Tokens go to the verifier and rewards come back; all else stays on the device."""
    whole, where = (None,) * len(setup.policy.constants), rollouts.layout(mesh, sweep)
    replace_failed = jax.jit(rollouts.replace_failed, out_shardings=where)

    def sampled(hint: int) -> Callable[..., Rollouts]:
        sample = rollouts.sampler(setup, mesh, length, config.group, hint)

        def of_state(state: Any, key: Array, batch: dict[str, Array], *constants: Any) -> Rollouts:
            key = jax.random.fold_in(jax.random.fold_in(key, state.step), hint)
            return sample(state.params, key, batch["prompt"], batch["mask"], batch["answer"], *constants)

        return jax.jit(sweeps.lift(of_state, sweep, in_axes=(0, None, None, *whole)), out_shardings=where)

    sample, with_hints = sampled(0), sampled(config.hint)
    completions = [example.completion for example in setup.task.train]

    def step(state: Any, key: Array, batch: dict[str, Array], hyper: Any, *constants: Any) -> tuple[Any, dict]:
        wanted = [completions[i] for i in meshes.gather(batch["index"])]
        played = sample(state, key, batch, *constants[:-1])
        rewards = rollouts.verify(setup, verifier, played, wanted)
        if config.hint and rollouts.unsolved(rewards).any():
            hinted = with_hints(state, key, batch, *constants[:-1])
            played = replace_failed(played, hinted, rollouts.place(rewards, where))
            rewards = rollouts.verify(setup, verifier, played, wanted)
        return update(state, key, (played, rollouts.place(rewards, where)), hyper, *constants)

    return step


def _judge(
    config: Any, setup: Setup, verifier: rollouts.Verifier, length: int, mesh: Mesh, sweep: Any
) -> Callable[..., dict[str, Any]]:
    """Validation: reward of greedy answers, and divergence of the policy from the reference on sampled ones."""
    generate = policies.generator(setup.policy, length, setup.stop, mesh)
    sample = rollouts.sampler(setup, mesh, length, 1)
    whole = (None,) * (len(setup.policy.constants) + 1)

    def of_params(params: Any, key: Array, batch: dict[str, Array], *constants: Any) -> tuple[Rollouts, Array]:
        *constants, reference = constants
        greedy = generate(key, params, batch["prompt"], batch["mask"], *constants, n=1, choose=decoding.greedy)
        played = sample(params, key, batch["prompt"], batch["mask"], batch["answer"], *constants)
        ref, mask = answer_logps(config, setup, reference, played, constants)
        divergence = kl_estimate(played.logp.reshape(mask.shape), ref, "k3")
        answers = played._replace(tokens=greedy.tokens, mask=greedy.mask, logp=greedy.logp)
        return answers, jnp.where(mask, divergence, 0).sum(-1).mean()

    judge = jax.jit(sweeps.lift(of_params, sweep, in_axes=(0, None, None, *whole)))
    wanted = [example.completion for example in setup.task.test]

    def validate(params: Any, key: Array, batch: Any, hyper: Any, *constants: Any) -> dict[str, Any]:
        answers, divergence = judge(params, key, batch, *constants)
        reward = np.nan_to_num(rollouts.verify(setup, verifier, answers, wanted)).mean((-2, -1))
        return {"validation_reward": reward, "validation_loss": -reward, "kl": meshes.gather(divergence)}

    return validate


# --- the run ----------------------------------------------------------------------------------------------------------


def _columns(examples: list[sequences.Tokens]) -> dict[str, np.ndarray]:
    prompt, mask = sequences.pad_left([example.prompt for example in examples])
    answer, _ = sequences.pad_right([example.completion for example in examples])
    return {"prompt": prompt, "mask": mask, "answer": answer, "index": np.arange(len(examples))}


def run(config: Any, mesh: Mesh) -> None:
    """Trains or resumes, and writes the report.

    Raises:
      UsageError: functions that are not there or lack an option, or hints as long as answers.
    """
    objective, advantage = resolve(config)
    verifier = named.find("--verifier", config.verifier, "esscher.experiments.verifiers")
    hyper = vars(config.hyper) | named.swept(objective) | named.swept(advantage)
    sweep = sweeps.grid(hyper, divisor=mesh.shape["sweep"])
    setup = setups.prepare(config, mesh)
    length = config.tokens or max(len(example.completion) for example in setup.train + setup.test)
    shortest = min(length, *(len(example.completion) for example in setup.train))
    if not 0 <= config.hint < shortest:
        raise UsageError(f"--hint must be 0 to {shortest - 1}, below the tokens of the shortest answer or --tokens")
    reference = _reference(setup, mesh)
    program = learning(config, setup, objective, advantage, mesh, sweep, reference)
    program = program._replace(
        step=_stepper(config, setup, program.step, verifier, length, mesh, sweep),
        validate=_judge(config, setup, verifier, length, mesh, sweep),
    )
    folder = setups.open_run(config, setup)
    columns, judged = _columns(setup.train), _columns(setup.test)
    trained = setups.train(config, setup, program, mesh, sweep, columns, judged, folder, reference)
    if trained is not None:
        _evaluate(config, setup, verifier, length, mesh, sweep, trained, reference, folder)
        reporting.print_results(folder)


def _reference(setup: Setup, mesh: Mesh) -> Any:
    """The trainable parameters at the start: those of the model, or an adapter, which adds nothing then."""
    policy, key = setup.policy, jax.random.key(0)
    if policy.pretrained:
        return policy.pretrained[0]
    specs = meshes.parameter_specs(policy.axes, jax.eval_shape(policy.initialize, key), mesh)
    return jax.jit(policy.initialize, out_shardings=meshes.shardings(mesh, specs))(key)


def _evaluate(
    config: Any,
    setup: Setup,
    verifier: rollouts.Verifier,
    length: int,
    mesh: Mesh,
    sweep: sweeps.Sweep,
    trained: runs.Trained,
    reference: Any,
    folder: pathlib.Path,
) -> None:
    """Keeps the best member of the sweep as a Hugging Face folder, solves with it, and writes the report."""
    rewards, divergence = (np.atleast_1d(trained.metrics[name]) for name in ("validation_reward", "kl"))
    best = int(np.nanargmax(rewards))
    trainable = runs.member(trained.state, sweep, best)
    policies.save(folder / "model", setup.policy, trainable, setup.tokenizer, setup.stop, setup.origin)
    options = {"key": jax.random.key(config.seed + 1), "samples": config.samples, "length": length}
    before, solved = (solving.solve(setup, each, mesh, verifier=verifier, **options) for each in (reference, trainable))
    greedy = np.nanmean([verifier(a, x.completion) for a, x in zip(before.greedy, before.examples, strict=True)])
    rows = [["reference", float(greedy), float(before.correct.mean()), 0.0]]
    for i, label in enumerate(sweep.labels):
        sampled = float(solved.correct.mean()) if i == best else "-"
        rows.append([label or "this run", float(rewards[i]), sampled, float(divergence[i])])
    text = (
        f"{config.objective}, {config.steps} steps of {config.batch_size} problems with {config.group} answers each, "
        f"{config.epochs} updates on each step's answers. On problems held out: the mean reward of greedy answers, the "
        "share of samples that are right (pass@1), of the best run, and the divergence from the reference, the model "
        "at the start, in nats per answer."
    )
    table = reporting.table(["run", "greedy reward", "pass@1", "KL to the reference"], rows)
    learned = runs.curves(
        folder, sweep, ("reward", "validation_reward", "kl"), "Reward while learning and held out, and divergence"
    )
    health = runs.curves(
        folder,
        sweep,
        ("entropy", "length", "clip_fraction", "zero_variance"),
        "Entropy per token in nats, tokens of an answer, share of tokens whose ratio has left 0.8 to 1.2, and of "
        "groups whose answers all have one reward",
        file="health.png",
    )
    sections = {"Rewards": "\n\n".join([text, table, learned, health]), **solving.report(folder, solved)}
    reporting.write_report(folder, f"arithmetic, rl: {config.name}", sections)

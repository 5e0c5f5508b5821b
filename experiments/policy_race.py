"""Every policy-gradient method on one enumerable problem: how fast does each gain reward, and at what divergence?

The strings of the preference race have known rewards, so that the expected reward of a policy, its divergence from the
reference, its entropy and the exact gradient are computed, not estimated, at every update. An update samples groups of
answers to the one prompt and takes the method's steps on them, for several seeds, learning rates and values of the one
coefficient that a method may have, in one program for each method.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from esscher.core import figures, reporting
from esscher.core.errors import UsageError
from esscher.experiments import cli, preference_race
from esscher.experiments.policy_racers import PASS, RACERS, Racer, View, mean_loss
from esscher.experiments.racers import Problem, string_logps

__all__ = [
    "Config",
    "Outcome",
    "expected_reward",
    "frontier",
    "gradient_cosine",
    "main",
    "measure",
    "race",
    "sample",
    "summarize",
]

SHOWN = 20  # points of a curve, at most, close together at first
GAIN = 0.9  # of what can be gained: the updates until then are counted


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the race."""

    name: str = "default"
    """Name of the run; its folder is runs/policy-race/NAME."""
    methods: tuple[str, ...] = ()
    """Methods to run; all by default."""
    groups: int = 2
    """Groups of answers in an update."""
    answers: int = 4
    """Answers in a group."""
    updates: int = 200
    """Updates, each on new answers; methods with a ratio of policies take two steps in each."""
    seeds: int = 8
    """Runs with different answers."""
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Learning rates to try, each brought to zero by a cosine."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """What takes the steps."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs."""


class Outcome(NamedTuple):
    """Exact, in nats, of policies of any number of axes; in the race `[C, L, S, U]`."""

    reward: Array  # E_pi[r]
    divergence: Array  # KL(pi || reference)
    entropy: Array
    own: Array  # KL(pi || tilt at the coefficient as temperature), where it is one


# --- exact quantities -------------------------------------------------------------------------------------------------


def expected_reward(task: Problem, logits: Array) -> Array:
    """Of a policy, `[]`."""
    return jnp.exp(string_logps(task, logits).sum(-1)) @ task.reward


def frontier(task: Problem, temperatures: Array) -> tuple[Array, Array]:
    """Divergence and reward of the reference's tilts, of any shape; no law has more reward at as much divergence.

    With `l = 1 / temperature` and `K(l) = log E_ref exp(l r)` they are `l K' - K` and `K'`.
    """
    reference = string_logps(task, task.logits).sum(-1)
    rate = 1 / jnp.asarray(temperatures)
    log_z, reward = jnp.vectorize(jax.value_and_grad(lambda x: jax.nn.logsumexp(reference + x * task.reward)))(rate)
    return rate * reward - log_z, reward


@jax.jit
def measure(task: Problem, logits: Array, coefficients: Array) -> Outcome:
    """Of policies `[C, ..., NP, V]`, with the coefficients `[C]` as temperatures."""

    def one(logits: Array, temperature: Array) -> Outcome:
        found = preference_race.measure(task, logits, temperature)
        log_pi = string_logps(task, logits).sum(-1)
        return Outcome(found.reward, found.divergence, -jnp.sum(jnp.exp(log_pi) * log_pi), found.own)

    flat = logits.reshape(len(coefficients), -1, *logits.shape[-2:])
    found = jax.vmap(jax.vmap(one, in_axes=(0, None)))(flat, coefficients)
    return jax.tree.map(lambda x: x.reshape(logits.shape[:-2]), found)


def gradient_cosine(task: Problem, gradients: Array) -> float:
    """Cosine of a method's expected step at the reference and the exact gradient of the expected reward.

    The gradients of the method's loss are of independent answers, `[N, NP, V]`. The square of their mean is taken as
    the product of the means of either half, which is not made larger by their noise; where that is not positive no
    direction can be told, and the result is NaN.
    """
    exact = np.asarray(jax.grad(expected_reward, argnums=1)(task, task.logits), np.float64)
    first, second = (-np.asarray(half, np.float64).mean(0) for half in (gradients[::2], gradients[1::2]))
    square = np.vdot(first, second) * np.vdot(exact, exact)
    return float(np.clip(np.vdot(first + second, exact) / 2 / np.sqrt(square), -1, 1)) if square > 0 else float("nan")


# --- the race ---------------------------------------------------------------------------------------------------------


def sample(task: Problem, logits: Array, uniform: Array) -> Array:
    """Strings of the policy, by the inverse of its distribution function, for uniform numbers of any shape."""
    below = jnp.cumsum(jnp.exp(string_logps(task, logits).sum(-1)))
    return jnp.minimum((uniform[..., None] >= below).sum(-1), len(below) - 1)


def race(config: Config, task: Problem, racer: Racer) -> tuple[Array, Array]:
    """Trains one method at every coefficient and learning rate, as one program, that of 0 before the others.

    Returns:
      Logits after each update, `[C, 1 + L, S, U, NP, V]`, and the gradients of the first step of each, likewise. At the
      learning rate 0 these are draws of the method's gradient at the reference.
    """
    optimizers = {"adam": optax.adam, "sgd": optax.sgd}

    def run(coefficient: Array, lr: Array, key: Array) -> tuple[Array, Array]:
        optimizer = optimizers[config.optimizer](optax.cosine_decay_schedule(lr, config.updates * racer.epochs))

        def update(state: tuple[Array, Any], drawn: tuple[Array, Array]) -> tuple[tuple[Array, Any], Any]:
            old, index = state[0], sample(task, state[0], drawn[0])

            def step(state: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], Array]:
                logits, opt_state = state
                loss = lambda logits: mean_loss(racer, View(task, logits, old, index, key), coefficient)  # noqa: E731
                gradient = jax.grad(loss)(logits)
                updates, opt_state = optimizer.update(gradient, opt_state)
                return (optax.apply_updates(logits, updates), opt_state), gradient

            state, gradients = jax.lax.scan(step, state, drawn[1])
            return state, (state[0], gradients[0])

        uniform_key, key = jax.random.split(key)
        uniform = jax.random.uniform(uniform_key, (config.updates, config.groups, config.answers))
        keys = jax.random.split(key, (config.updates, racer.epochs))
        return jax.lax.scan(update, (task.logits, optimizer.init(task.logits)), (uniform, keys))[1]

    # Answers are drawn with the same random numbers at every coefficient and learning rate.
    every = run
    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        every = jax.vmap(every, in_axes=axes)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    return jax.jit(every)(_coefficients(racer), jnp.asarray((0.0, *config.lrs)), keys)


def _coefficients(racer: Racer) -> Array:
    return jnp.asarray(racer.coefficients or (1.0,))


def main(config: Config) -> None:
    """Runs the methods and writes table and figures."""
    for name, least in {"groups": 1, "answers": 1, "updates": 2, "seeds": 1}.items():
        if getattr(config, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(config, name)}")
    if not config.lrs or min(config.lrs) <= 0:
        raise UsageError(f"--lrs must be positive numbers, at least one, got {config.lrs}")
    if unknown := sorted(set(config.methods) - RACERS.keys()):
        raise UsageError(f"--methods: no {', '.join(unknown)}; there are {', '.join(RACERS)}")
    chosen = {name: RACERS[name] for name in config.methods or RACERS}
    folder = reporting.open_run(
        config, experiment="policy-race", name=config.name, root=config.runs, may_change=("runs",)
    )
    task, results = preference_race.problem(), {}
    with reporting.progress(len(chosen), label="racing") as show:
        for i, (name, racer) in enumerate(chosen.items()):
            began = time.perf_counter()
            results[name] = summarize(config, task, racer, *race(config, task, racer))
            show(i + 1, seconds=time.perf_counter() - began)
    reporting.write_report(folder, f"policy race: {config.name}", _report(folder, config, task, results))
    reporting.print_results(folder)


# --- the report -------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A method at its best learning rate and coefficient."""

    lr: float
    coefficient: float | None
    best: Outcome  # [S, U]
    ends: Outcome  # [C, S] at the best learning rate of each coefficient
    cosine: float
    gained: float | None  # updates, where that happens


def summarize(config: Config, task: Problem, racer: Racer, logits: Array, gradients: Array) -> Result:
    """What is best on the mean over updates: of the reward, or of reward less temperature times divergence.

    The mean and not the end, where fast methods have long been equal. Where the coefficient is a temperature it is the
    middle one.
    """
    coefficients = np.asarray(_coefficients(racer))
    outcome = jax.device_get(measure(task, logits[:, 1:], _coefficients(racer)))
    mean = jax.tree.map(lambda x: x.mean((-2, -1)), outcome)
    aim = mean.reward - (coefficients[:, None] * mean.divergence if racer.tilts else 0)
    rates = np.nan_to_num(aim, nan=-np.inf).argmax(1)
    aim = np.take_along_axis(aim, rates[:, None], 1)[:, 0]
    at = len(coefficients) // 2 if racer.tilts else int(np.nan_to_num(aim, nan=-np.inf).argmax())
    best = jax.tree.map(lambda x: x[at, rates[at]], outcome)
    start = float(expected_reward(task, task.logits))
    limit = float(frontier(task, coefficients[at])[1]) if racer.tilts else float(task.reward.max())
    there = best.reward.mean(0) >= start + GAIN * (limit - start)
    return Result(
        lr=config.lrs[rates[at]],
        coefficient=float(coefficients[at]) if racer.coefficients else None,
        best=best,
        ends=jax.tree.map(lambda x: x[np.arange(len(rates)), rates, :, -1], outcome),
        cosine=gradient_cosine(task, gradients[at, 0].reshape(-1, *task.logits.shape)),
        gained=int(there.argmax()) + 1 if there.any() else None,
    )


def _report(folder: pathlib.Path, config: Config, task: Problem, results: dict[str, Result]) -> dict[str, str]:
    rows = []
    for name, result in results.items():
        last = jax.tree.map(lambda x: x[:, -1], result.best)
        rows.append(
            [
                name,
                result.lr,
                "-" if result.coefficient is None else result.coefficient,
                float(result.best.reward.mean()),
                float(last.reward.mean()),
                float(last.reward.std()),
                float(last.divergence.mean()),
                float(last.own.mean()) if RACERS[name].tilts else "-",
                float(last.entropy.mean()),
                "-" if result.gained is None else result.gained,
                result.cosine,
            ]
        )
    rows.sort(key=lambda row: -row[3])
    header = ["method", "learning rate", "coefficient", "mean reward", "last reward", "spread", "KL to reference"]
    header += ["KL to own tilt", "entropy", "updates to 90%", "cosine"]
    start, best = float(expected_reward(task, task.logits)), float(task.reward.max())
    text = (
        f"{len(results)} methods, {config.seeds} seeds, {config.updates} updates of {config.optimizer} on "
        f"{config.groups} groups of {config.answers} answers. Each row is the learning rate (of "
        f"{', '.join(f'{lr:g}' for lr in config.lrs)}) and the coefficient with the highest mean reward over the "
        "updates; where the coefficient is a temperature of the tilt it is the middle one, and the learning rate that "
        "with the highest mean of reward less temperature times divergence. What the coefficient is depends on the "
        "method: the bound of a clip, lambda, a fraction of tokens. All else is after the last update. Means over "
        "seeds, in nats; the spread is the standard deviation of the last reward. The reference has reward "
        f"{start:.3f}, the best string {best:.3f}; 90% are of what can be gained, up to the best string, or to the "
        "tilt at the temperature. The cosine is that of the expected first step and the exact gradient of the "
        "expected reward. GPG, NFT, REINFORCE with +1 or -1, PSR, NSR and W-REINFORCE see no more of a reward than "
        f"whether it is at least {PASS:g}: which of such answers they end with is chance."
    )
    return {"Result": "\n\n".join([text, reporting.table(header, rows), *_pictures(folder, task, results)])}


def _pictures(folder: pathlib.Path, task: Problem, results: dict[str, Result]) -> list[str]:
    """A figure for each family of methods: reward against updates, and against divergence."""
    tilts = tuple(map(np.asarray, frontier(task, preference_race.TEMPERATURES)))
    pictures = []
    for family in dict.fromkeys(RACERS[name].family for name in results):
        members = {name: result for name, result in results.items() if RACERS[name].family == family}
        curves: dict[str, tuple] = {}
        paths: dict[str, tuple] = {"exact tilt": tilts}
        for name, result in members.items():
            mean = jax.tree.map(lambda x: x.mean(0), result.best)
            shown = np.unique(np.geomspace(1, len(mean.reward), SHOWN).round().astype(int)) - 1
            curves[name] = (shown + 1, mean.reward[shown])
            if RACERS[name].tilts:
                paths[name] = (result.ends.divergence.mean(1), result.ends.reward.mean(1))
            else:
                paths[name] = (mean.divergence[shown], mean.reward[shown])
        path = figures.lines(
            folder / "figures" / f"{family.replace(' ', '-')}.png",
            figures.Panel(curves, "updates", "expected reward", references={"best string": float(task.reward.max())}),
            figures.Panel(paths, "KL to the reference", "expected reward"),
        )
        along = "temperature by temperature" if all(RACERS[name].tilts for name in members) else "update by update"
        caption = f"{family.capitalize()}: reward against updates; and against divergence, {along}"
        pictures.append(reporting.picture(path, folder, caption))
    return pictures


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.policy_race", description=__doc__)

"""Every preference method on one enumerable problem: how close to the exact tilt does each end, and at what price?

Strings of up to four tokens have a known reference law and reward, so the exact tilt, its frontier of reward against
divergence, and the law that a method ends with are all computed, not estimated. Every method gets the same labelled
pairs (or lists) and the same optimiser, for several seeds and eight temperatures around its default, in one program.
"""

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from esscher.core import figures, reporting
from esscher.core.errors import UsageError
from esscher.core.exact.tabular_lm import golden_testbed
from esscher.experiments import cli, racers
from esscher.experiments.racers import RACERS, Problem, View

__all__ = ["Config", "Outcome", "main", "problem", "race"]

VOCABULARY, HORIZON, END = 3, 4, 0
SCALES = tuple(2.0**i for i in range(-4, 4))
TEMPERATURES = np.geomspace(0.05, 50.0, 400)  # of the tilts that a result is compared with


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the race."""

    name: str = "default"
    """Name of the run; its folder is runs/preference-race/NAME."""
    methods: tuple[str, ...] = ()
    """Methods to run; all by default."""
    pairs: int = 1024
    """Labelled pairs; lists of four have a quarter of that."""
    seeds: int = 8
    """Draws of the data."""
    steps: int = 300
    """Steps of Adam, on all data at once."""
    lr: float = 0.05
    """Peak learning rate, brought to zero by a cosine."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Folder of all runs."""


class Outcome(NamedTuple):
    """What a method ends with, for each temperature and seed, `[8, S]`."""

    own: Array  # KL(pi || tilt at the method's own temperature), where it has one
    nearest: Array  # the least KL(pi || tilt) over temperatures
    reward: Array  # E_pi[r]
    divergence: Array  # KL(pi || reference)
    accuracy: Array  # share of pairs, weighted by the reference, that the implicit reward ranks rightly
    length: Array  # E_pi[length] - that of the nearest tilt


# --- the problem ------------------------------------------------------------------------------------------------------


def problem() -> Problem:
    """The golden testbed, where token 0 ends a string: 31 strings of one to four tokens."""
    model, reward = golden_testbed()
    tokens = np.asarray(model.sequences())
    ended = np.cumsum(tokens == END, axis=1) - (tokens == END) > 0  # after the first end
    support = np.flatnonzero(~(ended & (tokens != END)).any(1))
    mask = ~ended[support]
    prefixes = [np.zeros(len(tokens), int)]
    for t in range(1, HORIZON):
        offset = (VOCABULARY**t - 1) // (VOCABULARY - 1)
        prefixes.append(offset + tokens[:, :t] @ VOCABULARY ** np.arange(t)[::-1])
    rows = np.stack(prefixes, 1)[support]
    return Problem(
        logits=model.log_probs,
        tokens=jnp.asarray(tokens[support]),
        mask=jnp.asarray(mask),
        rows=jnp.asarray(rows),
        length=jnp.asarray(mask.sum(1), jnp.float32),
        reward=jnp.asarray(reward[support]),
    )


def _tilts(task: Problem) -> tuple[Array, Array]:
    """Log-probabilities of the tilts, `[temperatures, strings]`, and the reference's."""
    reference = racers.string_logps(task, task.logits).sum(-1)
    return jax.nn.log_softmax(reference + task.reward / TEMPERATURES[:, None]), reference


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def measure(task: Problem, logits: Array, temperature: Array) -> Outcome:
    """Everything about a policy, exactly."""
    tilts, reference = _tilts(task)
    log_pi = racers.string_logps(task, logits).sum(-1)
    pi = jnp.exp(log_pi)
    distances = _kl(log_pi, tilts)
    nearest = jnp.argmin(distances)
    own = jax.nn.log_softmax(reference + task.reward / temperature)
    implicit = log_pi - reference
    better = task.reward[:, None] > task.reward
    weight = jnp.exp(reference[:, None] + reference) * better
    right = (implicit[:, None] > implicit) + 0.5 * (implicit[:, None] == implicit)
    return Outcome(
        own=_kl(log_pi, own),
        nearest=distances[nearest],
        reward=pi @ task.reward,
        divergence=_kl(log_pi, reference),
        accuracy=jnp.sum(weight * right) / jnp.sum(weight),
        length=pi @ task.length - jnp.exp(tilts[nearest]) @ task.length,
    )


# --- the race ---------------------------------------------------------------------------------------------------------


def race(config: Config, task: Problem, racer: racers.Racer) -> tuple[Outcome, Array]:
    """Trains one method at every temperature on every draw of the data, as one program; and the temperatures."""
    betas = racer.beta * jnp.asarray(SCALES)

    def run(beta: Array, key: Array) -> Outcome:
        data = racers.draw(key, task, config.pairs)
        optimizer = optax.adam(optax.cosine_decay_schedule(config.lr, config.steps))

        def step(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
            logits, opt_state = state
            gradient = jax.grad(lambda logits: racer.loss(View(task, logits, data), beta).mean())(logits)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(logits, updates), opt_state), None

        state, _ = jax.lax.scan(step, (task.logits, optimizer.init(task.logits)), length=config.steps)
        return measure(task, state[0], beta)

    every = jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None))
    return jax.jit(every)(betas, jax.random.split(jax.random.key(0), config.seeds)), betas


def main(config: Config) -> None:
    """Runs the methods and writes table and figure."""
    for name in ("pairs", "seeds", "steps"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if unknown := sorted(set(config.methods) - RACERS.keys()):
        raise UsageError(f"--methods: no {', '.join(unknown)}; there are {', '.join(RACERS)}")
    chosen = {name: RACERS[name] for name in config.methods or RACERS}
    folder = reporting.open_run(
        config, experiment="preference-race", name=config.name, root=config.runs, may_change=("runs",)
    )
    task, outcomes = problem(), {}
    with reporting.progress(len(chosen), label="racing") as show:
        for i, (name, racer) in enumerate(chosen.items()):
            began = time.perf_counter()
            outcome, betas = jax.device_get(race(config, task, racer))
            outcomes[name] = (outcome, betas)
            show(i + 1, seconds=time.perf_counter() - began)
    sections = _report(folder, config, task, outcomes)
    reporting.write_report(folder, f"preference race: {config.name}", sections)
    reporting.print_results(folder)


def _report(
    folder: pathlib.Path, config: Config, task: Problem, outcomes: dict[str, tuple[Outcome, np.ndarray]]
) -> dict[str, str]:
    rows = []
    for name, (outcome, betas) in outcomes.items():
        mean = jax.tree.map(lambda x: x.mean(1), outcome)
        best = int(np.nanargmin(np.where(mean.divergence > 0.05, mean.nearest, np.inf)))  # not by standing still
        own = float(mean.own[best]) if RACERS[name].tilts else "-"
        rows.append([name, float(betas[best]), *(float(part[best]) for part in mean[1:]), own])
    rows.sort(key=lambda row: row[2])
    header = [
        "method",
        "beta",
        "KL to a tilt",
        "reward",
        "KL to reference",
        "ranked rightly",
        "length bias",
        "KL to own tilt",
    ]
    text = (
        f"{len(outcomes)} methods, {len(SCALES)} temperatures, {config.seeds} draws of {config.pairs} pairs, "
        f"{config.steps} steps. Each row is the temperature at which the method ends closest to some exact tilt; means "
        "over draws, in nats. The reference has reward "
        f"{float(jnp.exp(_tilts(task)[1]) @ task.reward):.3f}, the best string {float(task.reward.max()):.3f}."
    )
    pictures = _pictures(folder, task, outcomes)
    return {"Result": "\n\n".join([text, reporting.table(header, rows), *pictures])}


def _pictures(folder: pathlib.Path, task: Problem, outcomes: dict[str, tuple[Outcome, np.ndarray]]) -> list[str]:
    """A figure for each family of methods: reward against divergence, temperature by temperature."""
    tilts, reference = _tilts(task)
    frontier = (np.asarray(_kl(tilts, reference)), np.asarray(jnp.exp(tilts) @ task.reward))
    pictures = []
    for family in dict.fromkeys(RACERS[name].family for name in outcomes):
        series: dict[str, tuple] = {"exact tilt": frontier}
        for name, (outcome, _) in outcomes.items():
            if RACERS[name].family == family:
                series[name] = (outcome.divergence.mean(1), outcome.reward.mean(1))
        panel = figures.Panel(series, "KL to the reference", "expected reward")
        path = figures.lines(folder / "figures" / f"{family.replace(' ', '-')}.png", panel)
        caption = f"{family.capitalize()}, from the smallest temperature to the largest; no law passes the exact tilt"
        pictures.append(reporting.picture(path, folder, caption))
    return pictures


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.preference_race", description=__doc__)

"""Samplers of the tilt bench: each is a few lines over the library, and gets as many calls of the model as it is told.

A sampler is a function `(key, task, n, calls) -> samples` of a `tilt_problems.Task`: it returns `n` samples, `[n, D]`
or strings `[n, L]`, and may ask the model about `calls` states for each of them. One of your own goes the same way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from esscher.experiments.tilt_problems import SYMBOLS, Task
from esscher.samplers import integrate, resampling, smc, steppers
from esscher.samplers.diffusion import anchored, correctors, discrete, energy, kernels, restarts, steering, svdd, tree

__all__ = ["CANDIDATES", "STRINGS", "VECTORS"]

Sampler = Callable[[Array, Task, int, int], Array]

CANDIDATES = 4


def _kernel(task: Task) -> Callable[[Any], Any]:
    """Makes the kernel of a model of this kind."""
    if task.schedule is None:
        return lambda model: discrete.masked_kernel(model, task.alpha, task.mask_id)
    return lambda model: kernels.ddim_kernel(model, task.schedule)


def _value(task: Task) -> Callable[[Any], Any]:
    """Makes the value of a state, the reward of the data that a model of this kind expects."""
    if task.schedule is None:
        return lambda model: discrete.fill_in_value(model, task.log_reward, task.mask_id)
    return lambda model: svdd.posterior_mean_value(model, task.log_reward, task.schedule)


def _remembering(task: Task) -> tuple[Callable, Any, Callable]:
    """`look`, kernel and value of states that remember what the model said."""
    clean = (lambda s: s == 0) if task.schedule is None else (lambda s: task.schedule.sigma(s) == 0)
    return *kernels.remembering_kernel(_kernel(task), task.model, clean), kernels.remembered_value(_value(task))


# --- what needs no steering -------------------------------------------------------------------------------------------


def base(key: Array, task: Task, n: int, calls: int) -> Array:
    """The model itself, by its ancestral steps."""
    start_key, path_key = jax.random.split(key)
    kernel, times = _kernel(task)(task.model), task.times(calls)

    def step(x: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        key, t, s = inputs
        return kernel.sample(key, x, t, s), None

    keys = jax.random.split(path_key, calls)
    return jax.lax.scan(step, task.start(start_key, n), (keys, *steering.steps(times)))[0]


def importance(key: Array, task: Task, n: int, calls: int) -> Array:
    """Samples of the model, resampled by `exp(r / beta)`."""
    sample_key, pick_key = jax.random.split(key)
    x = base(sample_key, task, n, calls)
    return x[resampling.systematic(pick_key, task.log_reward(x), n)]


def best_of(key: Array, task: Task, n: int, calls: int) -> Array:
    """Of a few samples of the model the one of the largest reward."""
    run = lambda key: base(key, task, n, calls // CANDIDATES)  # noqa: E731
    return restarts.best_of(key, run, task.log_reward, CANDIDATES)


# --- by weights and by search -----------------------------------------------------------------------------------------


def _svdd(greedy: bool) -> Sampler:
    def sample(key: Array, task: Task, n: int, calls: int) -> Array:
        start_key, path_key = jax.random.split(key)
        look, kernel, value = _remembering(task)
        times = task.times(calls // CANDIDATES)
        x = look(task.start(start_key, n), times[0])
        return svdd.svdd(path_key, kernel, value, x, times, 1.0, candidates=CANDIDATES, greedy=greedy).x.x

    return sample


def _population(
    key: Array, task: Task, n: int, calls: int, start: Callable, propose: smc.Propose, ess_threshold: float = 0.5
) -> Any:
    """States of `n` particles at the end, each drawn by its weight."""
    run_key, pick_key = jax.random.split(key)
    last, _ = smc.run(
        run_key, propose, start(task.times(calls)[0]), steering.steps(task.times(calls)), ess_threshold=ess_threshold
    )
    ancestors = resampling.systematic(pick_key, last.log_w, n)
    return jax.tree.map(lambda leaf: leaf[ancestors], last.state)


def _particles(method: Callable[[Task], tuple[Callable, smc.Propose]]) -> Sampler:
    def sample(key: Array, task: Task, n: int, calls: int) -> Array:
        start_key, key = jax.random.split(key)
        start, propose = method(task)
        return _population(key, task, n, calls, lambda t: start(task.start(start_key, n), t), propose).x

    return sample


def _fk(potential: steering.Potential) -> Sampler:
    return _particles(
        lambda task: steering.fk_steering(task.model, task.log_reward, task.schedule, potential=potential)
    )


def twisted(key: Array, task: Task, n: int, calls: int) -> Array:
    """Particles of the model's own steps, weighted by the reward of the data that it expects."""
    start_key, key = jax.random.split(key)
    look, kernel, value = _remembering(task)
    start, propose = steering.twisted(kernel, value)
    first = lambda t: start(look(task.start(start_key, n), t), t)  # noqa: E731
    return _population(key, task, n, calls, first, propose)[0].x


def _corrector(rho: float) -> Sampler:
    def sample(key: Array, task: Task, n: int, calls: int) -> Array:
        start_key, key = jax.random.split(key)
        strength = lambda t: jnp.square(task.schedule.alpha(t))  # noqa: E731
        options = {"rho": rho, "reward": task.log_reward, "strength": strength}
        start, propose = correctors.corrector((task.model,), (1.0,), task.schedule, **options)
        shape = task.start(start_key, 1).shape[1:]
        return _population(key, task, n, calls, lambda t: start(start_key, n, shape, t), propose, 0.9).x

    return sample


def diffusion_tree(key: Array, task: Task, n: int, calls: int) -> Array:
    """A tree of few roll-outs for each sample."""
    start_key, grow_key, pick_key = jax.random.split(key, 3)
    kernel, times = _kernel(task)(task.model), task.times(calls // CANDIDATES)
    options = {"rollouts": CANDIDATES, "exponent": 0.5}
    grown = tree.grow_tree(grow_key, kernel, task.log_reward, task.start(start_key, n), times, 1.0, **options)
    return tree.sample_tree(pick_key, grown, 1.0)


# --- by gradients -----------------------------------------------------------------------------------------------------


def _guided(through: bool) -> Sampler:
    """`energy_guidance` with the reward as energy: by its gradient through the model, or in the model's data term."""

    def sample(key: Array, task: Task, n: int, calls: int) -> Array:
        start_key, path_key = jax.random.split(key)
        w = 1.0 if through else energy.posterior_variance(task.schedule, 0.25)
        cost = lambda data, t: -task.log_reward(data)  # noqa: E731
        predictor = energy.energy_guidance(task.model, cost, task.schedule, w, through=through)
        x = task.start(start_key, n)
        return integrate(path_key, steppers.ancestral(task.schedule), predictor, x, task.times(calls))

    return sample


def aps(key: Array, task: Task, n: int, calls: int) -> Array:
    """Anchored posterior sampling, with one-hot vectors for embeddings."""
    import optax

    reward, table = task.soft_log_reward, jnp.eye(SYMBOLS)
    x, times = task.start(key, n), task.times(calls)
    return anchored.anchored(key, task.model, reward, table, x, times, task.alpha, task.mask_id, optax.adam(1.0))


_BOTH: dict[str, Sampler] = {
    "model": base,
    "importance": importance,
    f"best of {CANDIDATES}": best_of,
    f"SVDD {CANDIDATES}": _svdd(False),
    f"SVDD {CANDIDATES} greedy": _svdd(True),
    f"tree {CANDIDATES}": diffusion_tree,
}

VECTORS: dict[str, Sampler] = _BOTH | {
    "FK difference": _fk("difference"),
    "FK max": _fk("max"),
    "FK sum": _fk("sum"),
    "TDS": _particles(lambda task: steering.tds(task.model, task.log_reward, task.schedule)),
    "FKC": _corrector(1.0),
    "FKC rho 4": _corrector(4.0),
    "gradient through D": _guided(True),
    "gradient in D": _guided(False),
}

STRINGS: dict[str, Sampler] = _BOTH | {"twisted": twisted, "APS": aps}

r"""Sequential Monte Carlo: the one engine that carries weighted particles through any sequence of targets.

All that a method needs to say is how a particle goes on and what that does to its weight,

    propose(key, state, input) -> (state, delta_log_w[N]),

with a state of any pytree whose leaves have the particles in front. The one contract is that of proper weighting:
with particles `(x, w)` for which `E[w f(x)] = sum_x gamma_k(x) f(x)` for every `f`, those that `propose` returns, with
`w exp(delta_log_w)`, do the same for `gamma_(k+1)`. A twist, a potential, the drift of a Feynman-Kac corrector and a
grammar's mask all end there. Then the weighted particles of the last step are a sample of `gamma_T / Z_T`, and
`exp(log_z)` is an unbiased estimate of `Z_T`, resampled or not.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp

from esscher.core.arrays import at_least_float32, check_floating, is_known
from esscher.samplers.resampling import Resampler, multinomial, systematic

__all__ = [
    "History",
    "Particles",
    "Path",
    "Propose",
    "Trace",
    "begin",
    "conditional",
    "effective_sample_size",
    "paths",
    "run",
    "sample_path",
    "waste_free",
]

Propose = Callable[[Array, Any, Any], tuple[Any, Array]]
"""`(key, state, input) -> (state, delta_log_w[N])`, properly weighted."""


class Particles(NamedTuple):
    """A weighted population."""

    state: Any  # a pytree, leaves [N, ...]
    log_w: Array  # [N] since the last resampling
    log_z: Array  # [] estimate of the log normaliser, the current weights included


class History(NamedTuple):
    """All that a run went through; memory is that of all its states."""

    states: Any  # leaves [T + 1, N, ...], those of the start first
    ancestors: Array  # [T, N] from which particle of step k that of step k + 1 came
    log_w: Array  # [T + 1, N] the weights at the start, then what each step added


class Trace(NamedTuple):
    """What a run tells of its steps."""

    ess: Array  # [T] effective sample size after each step
    resampled: Array  # [T] share of the islands that resampled before it
    log_z: Array  # [T] the estimate after it
    nan: Array  # [T] how many weights became NaN or +inf, which count as 0; those of the start are in the first step
    alive: Array  # [T] whether any weight is above 0; once it is not, log_z is -inf and the states mean nothing
    history: History | None


class Path(NamedTuple):
    """One particle's way, for `conditional` to keep."""

    states: Any  # leaves [T + 1, ...]
    log_w: Array  # [T + 1] its weight at the start, then what each step added


def begin(state: Any, log_w: Array | None = None) -> Particles:
    """Particles of a start, all of one weight unless `log_w[N]` says otherwise; `run` counts weights that are NaN.

    Raises:
      ValueError: no particles, leaves that disagree about how many, or a weight for each that is not floating.
    """
    leaves = jax.tree.leaves(state)
    counts = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(f"state must have one axis of at least one particle in front of all leaves, got {counts}")
    if log_w is None:
        log_w = jnp.zeros(counts.pop())
    elif {jnp.shape(log_w)} != counts:
        raise ValueError(f"log_w must have shape {counts.pop()}, a weight for each particle, got {jnp.shape(log_w)}")
    check_floating(log_w=log_w)
    log_w = at_least_float32(log_w)
    return Particles(state, log_w, logsumexp(_valid(log_w)) - math.log(len(log_w)))


def _valid(log_w: Array) -> Array:
    """With 0 for weights that are no numbers."""
    return jnp.where(log_w < jnp.inf, log_w, -jnp.inf)


def effective_sample_size(log_w: Array) -> Array:
    """`(sum w)^2 / sum w^2` over the last axis, `[..., N] -> [...]`: from 1 to `N`; 0 if all weights are 0.

    Reference: A Note on Importance Sampling Using Standardized Weights (Kong 1992).
    """
    check_floating(log_w=log_w)
    log_w = at_least_float32(log_w)
    top = log_w.max(-1, keepdims=True)
    w = jnp.exp(log_w - jnp.where(jnp.isfinite(top), top, 0))
    return w.sum(-1) ** 2 / jnp.maximum(jnp.square(w).sum(-1), jnp.finfo(w.dtype).tiny)


def run(
    key: Array,
    propose: Propose,
    particles: Particles,
    inputs: Any,
    *,
    resample: Resampler = systematic,
    ess_threshold: float | Array = 0.5,
    islands: int = 1,
    history: bool = False,
) -> tuple[Particles, Trace]:
    """Carries particles through the steps of `inputs` in one `lax.scan`, resampling where their weights have drifted.

    Before a step particles are resampled if their effective sample size is below `ess_threshold N`. A weight of 0 is
    final until then, whatever a step adds to its logarithm. Particles of the last step keep their weights. With islands
    each part of the population looks after itself, and is resampled by its own weights to its own mean weight: nothing
    but sums crosses from one to another, so islands that lie on different devices send no states. The law of
    `(particles, log_z)`, and so the target, is properly weighted either way.

    Args:
      key: typed random key.
      propose: see the module.
      particles: at the start, from `begin`; consecutive particles make an island.
      inputs: a pytree, leaves `[T, ...]`: what each step is given, such as its pair of times.
      resample: see `resampling`.
      ess_threshold: from 0, never, to 1, whenever weights differ; may be traced.
      islands: parts of equal size; 1 is resampling over all.
      history: whether to keep all states and ancestors, for `paths`.

    Returns:
      The particles after the last step, and the trace. Without a transformation around it (`jit`, `vmap`, ...) the run
      warns of weights that were NaN or `+inf`; within one look at `Trace.nan` and `Trace.alive`.

    Raises:
      ValueError: `islands` does not divide the particles; no inputs, or of different lengths; a `propose` that is no
        function, changes the state's structure or gives no weight for each particle; all weights became 0 (where that
        can be seen, see above).

    Reference: Sequential Monte Carlo Samplers (Del Moral, Doucet, Jasra 2006); Particle Islands (Verge et al. 2015).
    """
    count = len(particles.log_w)
    if islands < 1 or count % islands:
        raise ValueError(f"islands must divide the {count} particles, got {islands}")
    if not callable(propose):
        raise ValueError(
            "propose must be a function (key, state, input) -> (state, delta_log_w), as steering.twisted makes one of "
            f"a kernel, got {type(propose).__name__}; the steps of a deterministic solver have no density"
        )
    keys = jax.random.split(key, _length(inputs))
    identity, renew = jnp.arange(count, dtype=jnp.int32), functools.partial(_renew, resample)
    wrong = ~(particles.log_w < jnp.inf)
    particles = particles._replace(log_w=_valid(particles.log_w))

    def step(particles: Particles, inputs: tuple[Any, ...]) -> tuple[Particles, tuple[Any, ...]]:
        key, given = inputs
        resample_key, propose_key = jax.random.split(key)
        parts = particles.log_w.reshape(islands, -1)
        ess = effective_sample_size(parts)
        worn = (ess < ess_threshold * parts.shape[1]) & (ess > 0)
        skip = lambda key, state, log_w, worn: (state, log_w, identity)  # noqa: E731
        state, log_w, ancestors = jax.lax.cond(worn.any(), renew, skip, resample_key, *particles[:2], worn)
        state, delta = _proposed(propose, propose_key, state, given)
        dead = log_w == -jnp.inf
        invalid = ~(delta < jnp.inf) & ~dead
        delta = jnp.where(dead | invalid, -jnp.inf, delta.astype(log_w.dtype))
        before, log_w = logsumexp(log_w), log_w + delta
        after = logsumexp(log_w)
        log_z = jnp.where(jnp.isfinite(before), particles.log_z + after - before, -jnp.inf)
        told = Trace(effective_sample_size(log_w), worn.mean(), log_z, invalid.sum(), after > -jnp.inf, None)
        return Particles(state, log_w, log_z), (told, (state, ancestors, delta) if history else None)

    last, (trace, known) = jax.lax.scan(step, particles, (keys, inputs))
    trace = trace._replace(nan=trace.nan.at[:1].add(wrong.sum()))
    _complain(trace)
    if history:
        join = lambda first, rest: jnp.concatenate([first[None], rest])  # noqa: E731
        states = jax.tree.map(join, particles.state, known[0])
        trace = trace._replace(history=History(states, known[1], join(particles.log_w, known[2])))
    return last, trace


def conditional(
    key: Array,
    propose: Propose,
    particles: Particles,
    inputs: Any,
    reference: Path,
    *,
    ess_threshold: float | Array = 0.5,
) -> tuple[Particles, Trace]:
    """`run` in which particle 0 follows `reference` and survives: the kernel of particle Gibbs.

    A path drawn by `sample_path` from the result has the law of the whole path's target if `reference` had it, whatever
    the number of particles. The others' ancestors are multinomial, as that requires.

    Args:
      key: typed random key.
      propose: see the module; its weights must depend on a particle's own way only.
      particles: at the start, as for `run`; what it holds of particle 0 is not used.
      inputs: as for `run`.
      reference: of `sample_path`.
      ess_threshold: as for `run`.

    Returns:
      As `run`, with the history.

    Raises:
      ValueError: as `run`; a reference of another number of steps.

    Reference: Particle Markov Chain Monte Carlo Methods (Andrieu, Doucet, Holenstein 2010).
    """
    steps = _length(inputs)
    if any(jnp.shape(leaf)[:1] != (steps + 1,) for leaf in jax.tree.leaves(reference)):
        raise ValueError(f"reference must have {steps + 1} states and weights, one more than there are inputs")
    pin = functools.partial(jax.tree.map, lambda leaf, value: leaf.at[0].set(value))

    def proposed(key: Array, state: Any, given: tuple[Any, Path]) -> tuple[Any, Array]:
        given, kept = given
        return pin(propose(key, state, given), tuple(kept))

    def survive(key: Array, log_w: Array) -> Array:
        others = multinomial(key, log_w, max(len(log_w) - 1, 1))[: len(log_w) - 1]
        return jnp.concatenate([jnp.zeros(1, others.dtype), others])

    first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], reference) for part in (0, slice(1, None)))
    pinned = begin(*pin(tuple(particles[:2]), tuple(first)))
    # A start may know its normaliser, as that of a corrector does: only what pinning changed is taken off.
    before = begin(*particles[:2]).log_z
    offset = jnp.where(jnp.isfinite(before), particles.log_z - before, 0.0)
    particles = pinned._replace(log_z=pinned.log_z + offset)
    options = {"resample": survive, "ess_threshold": ess_threshold, "history": True}
    return run(key, proposed, particles, (inputs, rest), **options)


def _renew(resample: Resampler, key: Array, state: Any, log_w: Array, worn: Array) -> tuple[Any, Array, Array]:
    """State, weights and ancestors after the islands that are worn, `[I]`, have resampled."""
    parts = log_w.reshape(len(worn), -1)
    (islands, size), worn = parts.shape, worn[:, None]
    picked = jax.vmap(resample)(jax.random.split(key, islands), parts)
    picked = jnp.where(worn, picked, jnp.arange(size))
    pick = jax.vmap(lambda leaf, ancestors: leaf[ancestors])
    state = jax.tree.map(
        lambda leaf: pick(leaf.reshape(islands, size, *leaf.shape[1:]), picked).reshape(leaf.shape), state
    )
    parts = jnp.where(worn, logsumexp(parts, -1, keepdims=True) - math.log(size), parts)
    # With their mean at 1 the weights stay in range; the run's log_z keeps what is taken off.
    log_w = (parts - logsumexp(parts) + math.log(len(log_w))).reshape(-1)
    return state, log_w, (picked + size * jnp.arange(islands)[:, None]).reshape(-1).astype(jnp.int32)


def _proposed(propose: Propose, key: Array, state: Any, given: Any) -> tuple[Any, Array]:
    """What `propose` returns, checked, in the types of the state."""
    new, delta = propose(key, state, given)
    count = jax.tree.leaves(state)[0].shape[0]
    if jnp.shape(delta) != (count,):
        raise ValueError(f"propose must return a log weight for each of {count} particles, got {jnp.shape(delta)}")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (state, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"propose must return a state as it was given, {shapes[0]}, got {shapes[1]}")
    state = jax.tree.map(lambda new, old: jax.lax.convert_element_type(new, old.dtype), new, state)
    return state, at_least_float32(delta)


def _length(inputs: Any) -> int:
    """How many steps there are inputs for."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"inputs must hold arrays with one axis of steps in front, got the axes {lengths or 'of none'}"
        )
    return lengths.pop()[0]


def _complain(trace: Trace) -> None:
    """Raises or warns of weights that are 0 or NaN, where they can be seen."""
    if not is_known(trace.nan):
        return
    nan, alive = np.asarray(trace.nan), np.asarray(trace.alive)
    if nan.any():
        steps = ", ".join(map(str, np.flatnonzero(nan)[:5]))
        warnings.warn(
            f"{nan.sum()} weights were NaN or +inf, first in the steps {steps}, and count as 0: look at what the "
            "reward, the twist or the densities return there",
            stacklevel=3,
        )
    if not alive.all():
        raise ValueError(
            f"all weights are 0 after step {np.argmin(alive)}: no particle can be where the target is; take more "
            "particles, or a proposal or a start that covers it"
        )


# --- what a history says ----------------------------------------------------------------------------------------------


def paths(history: History) -> Any:
    """The states through which each particle of the last step came, leaves `[T + 1, N, ...]`."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, _lineage(history)), history.states)


def _lineage(history: History) -> Array:
    """Of each particle of the last step, which it was at every step, `[T + 1, N]`."""
    last = jnp.arange(history.ancestors.shape[1], dtype=history.ancestors.dtype)
    back = lambda index, ancestors: (ancestors[index], ancestors[index])  # noqa: E731
    earlier = jax.lax.scan(back, last, history.ancestors, reverse=True)[1]
    return jnp.concatenate([earlier, last[None]])


def sample_path(key: Array, particles: Particles, history: History) -> Path:
    """The path of one particle of the last step, drawn by weight."""
    index = jax.random.categorical(key, particles.log_w)
    lineage = _lineage(history)[:, index]
    pick = jax.vmap(lambda row, i: row[i])
    return jax.tree.map(lambda leaf: pick(leaf, lineage), Path(history.states, history.log_w))


# --- chains in place of single moves ----------------------------------------------------------------------------------


def waste_free(
    key: Array,
    move: Callable[[Array, Any, Any], Any],
    reweigh: Callable[[Any, Any], Array],
    particles: Particles,
    inputs: Any,
    *,
    chains: int,
    resample: Resampler = systematic,
) -> tuple[Particles, Trace]:
    """SMC with Markov chains whose every state is a particle: few are resampled, each moves on, and all are kept.

    A step draws `chains` of the particles by weight and moves each `N / chains - 1` times by a Markov kernel that
    leaves the target invariant. All the states on the way are the new particles, which are then weighted for the next
    target. It is `run` on chains, so `exp(log_z)` is unbiased.

    Args:
      key: typed random key.
      move: `(key, state, input) -> state` of `chains` particles, invariant for the target that they have.
      reweigh: `(state, input) -> [N]`, the log of the next target over this one.
      particles: at the start.
      inputs: a pytree, leaves `[T, ...]`, such as pairs of temperatures.
      chains: how many; they divide the particles.
      resample: see `resampling`.

    Returns:
      As `run`.

    Raises:
      ValueError: `chains` does not divide the particles; as `run`.

    Reference: Waste-free Sequential Monte Carlo, arXiv:2011.02328.
    """
    count = len(particles.log_w)
    if chains < 1 or count % chains:
        raise ValueError(f"chains must divide the {count} particles, got {chains}")
    length = count // chains

    def few(key: Array, log_w: Array) -> Array:
        return jnp.repeat(resample(key, log_w, chains), length, total_repeat_length=count)

    def propose(key: Array, state: Any, given: Any) -> tuple[Any, Array]:
        def again(state: Any, key: Array) -> tuple[Any, Any]:
            state = move(key, state, given)
            return state, state

        starts = jax.tree.map(lambda leaf: leaf[::length], state)
        moved = jax.lax.scan(again, starts, jax.random.split(key, length - 1))[1]
        join = lambda first, rest: jnp.concatenate([first[None], rest]).swapaxes(0, 1)  # noqa: E731
        state = jax.tree.map(lambda *parts: join(*parts).reshape(count, *parts[0].shape[1:]), starts, moved)
        return state, reweigh(state, given)

    return run(key, propose, particles, inputs, resample=few, ess_threshold=jnp.inf)

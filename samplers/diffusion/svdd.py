"""Soft value-based decoding: of several next states pick one by its value, for each sample on its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    cast_like,
    check_known,
    check_per_example,
    expand_like,
    one_per_example,
    tempered,
    warn_of_nan,
)
from esscher.core.contracts import Predictor, ReverseKernel
from esscher.core.schedules import Schedule
from esscher.samplers.diffusion.kernels import check_kernel
from esscher.samplers.integration import check_times
from esscher.samplers.smc import effective_sample_size

__all__ = ["Picked", "posterior_mean_value", "svdd", "svdd_select"]

Value = Callable[[Array, Array], Array]
"""`(x[B, ...], t) -> [B]`; `t` is a scalar."""


class Picked(NamedTuple):
    """What picking cost and gained."""

    x: Any  # [B, ...] at the last time
    values: Array  # [T, B] of what was picked; -inf where that of every candidate was NaN
    ess: Array  # [T, B] effective number of the candidates; 0 where none has a weight
    nan: Array  # [T] how many candidates had a value, or a log-ratio, that was NaN


def svdd_select(
    key: Array, values: Array, beta: float | Array, log_ratio: Array | float = 0.0, *, greedy: bool = False
) -> Array:
    """Of `M` candidates one, drawn by `softmax(values / beta + log_ratio)`, or the best: `[B, M] -> [B]`.

    Args:
      key: typed random key.
      values: soft values of the candidates, `[B, M]`; NaN is never picked beside a number.
      beta: temperature, a scalar or `[B]`; at 0, the limit, the best.
      log_ratio: `log p - log q` of the candidates where they are from another law than the model's.
      greedy: the best, as in the published code; the limit of small `beta`.

    Raises:
      ValueError: `values` is not `[B, M]` with a candidate at least, `beta` is neither a scalar nor `[B]`, or known to
        be below 0.

    Reference: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
      arXiv:2408.08252.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"values must have shape [B, M] with M at least 1, got {values.shape}")
    check_per_example(values, beta=beta)
    check_known(lambda value: value >= 0, "at least 0", beta=beta)
    logits = _logits(values, beta, log_ratio)
    return jnp.argmax(logits, -1) if greedy else jax.random.categorical(key, logits)


def _logits(values: Array, beta: float | Array, log_ratio: Array | float) -> Array:
    """`values / beta + log_ratio`, `[B, M]`, and `-inf` where one of the two is NaN or `-inf`, at `beta = inf` too."""
    values = at_least_float32(values)
    possible = (values > -jnp.inf) & (log_ratio > -jnp.inf)
    logits = tempered(jnp.where(possible, values, -jnp.inf), expand_like(beta, values)) + log_ratio
    return jnp.where(possible, logits, -jnp.inf)


def svdd(
    key: Array,
    kernel: ReverseKernel,
    value: Value,
    x: Any,
    times: Array,
    beta: float | Array,
    *,
    candidates: int,
    proposal: ReverseKernel | None = None,
    greedy: bool = False,
) -> Picked:
    r"""Carries each sample on to one of `M` candidates, drawn by `exp(value / beta)`, all the way down the grid.

    With the exact soft value `V_s(x) = beta log E[exp(r(x_0) / beta) | x_s = x]` the law tends to the tilt
    `p(x_0) exp(r / beta)` as `M` grows, with an error of order `1 / M`; with one candidate it is the model's. Samples
    know nothing of each other, so no common ancestor makes them alike; a posterior-mean value, `r(D(x, s))`, is a lower
    bound of the soft one for convex `r` and biases the law at any `M`. The greedy choice does not sample the tilt.

    A value that is NaN counts as `-inf`: such a candidate is never picked beside others, and where all are so the first
    is kept. `Picked.nan` counts them, and outside of `jit` they are warned of.

    Args:
      key: typed random key.
      kernel: of the model.
      value: `(x, s) -> [B M]`, the reward itself at the last time; evaluated on all candidates at once.
      x: states at the first time, `[B, ...]`, or a pytree of such leaves, as `kernels.remembering_kernel` has them:
        then the model looks once at each candidate, and not twice. They keep their types, also if times are wider.
      times: decreasing, `[T + 1]`.
      beta: temperature, a scalar or `[B]`; at 0, the limit, the choice is greedy.
      candidates: `M`.
      proposal: where candidates come from, the kernel by default.
      greedy: as in `svdd_select`.

    Returns:
      States at the last time, and what picking did on the way.

    Raises:
      ValueError: a kernel that is no `ReverseKernel`, no candidates, no states, a grid or a temperature of the wrong
        shape, a temperature known to be below 0, values that are not one for each candidate.

    Reference: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
      arXiv:2408.08252.
    """
    check_kernel(kernel=kernel, proposal=proposal or kernel)
    times = check_times(times)
    first = jax.tree.leaves(x)[0]
    check_per_example(first, beta=beta)
    check_known(lambda value: value >= 0, "at least 0", beta=beta)
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    batch = len(first)
    if not batch:
        raise ValueError(f"x must have at least one example, got shape {first.shape}")

    def body(x: Any, inputs: tuple[Array, ...]) -> tuple[Any, tuple[Array, Array, Array]]:
        key, t, s = inputs
        draw_key, pick_key = jax.random.split(key)
        origin = jax.tree.map(lambda leaf: jnp.repeat(leaf, candidates, axis=0), x)
        new = cast_like((proposal or kernel).sample(draw_key, origin, t, s), origin)
        log_ratio = 0.0
        if proposal is not None:
            log_ratio = kernel.log_prob(new, origin, t, s) - proposal.log_prob(new, origin, t, s)
            log_ratio = log_ratio.reshape(batch, candidates)
        values = one_per_example(jax.tree.leaves(new)[0], value=value(new, s))
        values = at_least_float32(values).reshape(batch, candidates)
        nan = jnp.sum(jnp.isnan(values) | jnp.isnan(log_ratio))
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        picked = svdd_select(pick_key, values, beta, log_ratio, greedy=greedy)
        pick = jax.vmap(lambda row, i: row[i])
        ess = effective_sample_size(_logits(values, beta, log_ratio))
        kept = jax.tree.map(lambda leaf: pick(leaf.reshape(batch, candidates, *leaf.shape[1:]), picked), new)
        return kept, (pick(values, picked), ess, nan)

    keys = jax.random.split(key, len(times) - 1)
    x, (values, ess, nan) = jax.lax.scan(body, x, (keys, times[:-1], times[1:]))
    what = "values" if proposal is None else "values or log-ratios"
    warn_of_nan(nan, f"{what} were NaN; such candidates are never picked beside others", stacklevel=2)
    return Picked(x, values, ess, nan)


def posterior_mean_value(predictor: Predictor, reward: Callable[[Array], Array], schedule: Schedule) -> Value:
    """`r(D(x, t))`, the value that needs no training: the reward of the model's data term; at `sigma = 0` of `x`.

    By Jensen's inequality it is at most the soft value where `r` is convex.

    Reference: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
      arXiv:2408.08252.
    """

    def value(x: Array, t: Array) -> Array:
        looked = lambda: predictor(x, jnp.broadcast_to(t, x.shape[:1])).data.astype(x.dtype)  # noqa: E731
        return at_least_float32(reward(jax.lax.cond(schedule.sigma(t) == 0, lambda: x, looked)))

    return value

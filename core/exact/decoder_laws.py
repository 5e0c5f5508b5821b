r"""What decoders really sample: the exact law on strings of each decoder of a `TabularLM`.

A local decoder changes each next-token law by itself, and its law is again a `TabularLM`; other laws come as the
log-probs of all strings, `[V**T]`, in the order of their codes. Whatever the law `q`,

    E_q[r] - beta KL(q || p) = beta log Z - beta KL(q || p*)

so its distance to the tilt `p*` is what it loses of the regularised reward.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import check_known, check_same_shape, tempered
from esscher.core.exact.tabular_lm import TabularLM, log_potential, log_sum_exp, normalize_log_weights

__all__ = [
    "beam_sequence",
    "best_of_n",
    "completable",
    "constrained",
    "filtered",
    "global_temperature",
    "greedy_sequence",
    "kl",
    "locally_tilted",
    "log_importance_weights",
    "rejection_acceptance",
    "reservation_value",
    "soft_best_of_n",
    "temperature",
]


# --- local decoders ---------------------------------------------------------------------------------------------------


def locally_tilted(model: TabularLM, scores: Array) -> tuple[TabularLM, Array]:
    r"""The law `q(v | .) = p(v | .) exp(s(. v)) / N(.)` of a decoder that adds scores to the next-token log-probs.

    With `s = next_token_values(soft_values)` it is the tilt `p*`; with `next_token_values(values) / beta`, value
    augmented sampling; with log-probs of a second model, a product of experts; with 0 and `-inf`, constrained decoding.
    A row whose scores forbid every token keeps the row of `p` and has log normaliser `-inf`.

    Args:
      model: `p`.
      scores: `s`, `[NP, V]`; may be `-inf`.

    Returns:
      `q`, and `log N`, `[NP]`.

    Raises:
      ValueError: `scores` has not the shape of the model's table.

    Reference: Value Augmented Sampling for Language Model Alignment and Personalization, arXiv:2405.06639.
    """
    check_same_shape(scores=scores, table=model.table)
    # Scores such as a log ratio are NaN where p has no mass; there they are not looked at.
    impossible = model.table == -jnp.inf
    log_weights = model.table + jnp.where(impossible, 0, scores)
    rows, log_normalizers = normalize_log_weights(log_weights, model.table)
    return TabularLM(rows, model.horizon), log_normalizers


def filtered(model: TabularLM, transform: Callable[[Array], Array]) -> TabularLM:
    """The law of sampling from `softmax(transform(log p(. | prefix)))`: temperature, top-k, top-p, and others.

    Args:
      model: `p`.
      transform: `[NP, V] -> [NP, V]`, row by row; `-inf` drops a token. A row without tokens keeps the row of `p`.

    Raises:
      ValueError: `transform` changes the shape.
    """
    logits = transform(model.table)
    check_same_shape(**{"transform(table)": logits, "table": model.table})
    return TabularLM(normalize_log_weights(logits, model.table)[0], model.horizon)


def temperature(model: TabularLM, tau: float | Array) -> TabularLM:
    """The law of sampling each token from `softmax(logits / tau)`: not `p^(1/tau)`, see `global_temperature`.

    At `tau = 0` it is that of greedy decoding; of equal tokens the first.

    Raises:
      ValueError: `tau` is known and below 0.
    """
    return filtered(model, lambda log_probs: _tempered(log_probs, tau))


def global_temperature(model: TabularLM, tau: float | Array) -> TabularLM:
    """The law proportional to `p(x)^(1/tau)` on whole strings.

    At `tau = 0` all mass is on the mode; of equal strings on the one with the lower code.

    Raises:
      ValueError: `tau` is known and below 0.

    Reference: Long Horizon Temperature Scaling, arXiv:2302.03686.
    """
    log_potentials = _tempered(model.sequence_log_probs(), tau)
    return TabularLM.from_sequence_log_probs(log_potentials, model.vocabulary, model.horizon)


def _tempered(log_probs: Array, tau: float | Array) -> Array:
    """`tempered`, with no NaN in its derivatives where a log-prob is `-inf`."""
    check_known(lambda tau: tau >= 0, "at least 0", tau=tau)
    cold = jnp.asarray(tau) <= 0
    return jnp.where(cold, tempered(log_probs, 0), log_potential(log_probs, jnp.where(cold, 1, tau)))


def completable(model: TabularLM, allowed: Array) -> Array:
    """Whether some allowed string begins with the prefix and the token, booleans `[NP, V]`; `p` plays no part.

    Args:
      model: gives the vocabulary and the horizon.
      allowed: booleans, `[V**T]`.

    Raises:
      ValueError: `allowed` has not one entry for each string.
    """
    model.check_per_sequence(allowed=allowed)
    anything = TabularLM.uniform(model.vocabulary, model.horizon)
    counts = anything.soft_values(jnp.where(allowed, 0.0, -jnp.inf), 1.0)
    return anything.next_token_values(counts) > -jnp.inf


def constrained(model: TabularLM, allowed: Array) -> tuple[TabularLM, Array]:
    r"""Locally constrained decoding: each token from `p`, renormalised over those that can be completed into the set.

    Its law `p(x) 1_A(x) / prod_t N_t` is not `p` given `A`, which is `model.tilt(log 1_A, 1)`; its weights
    `prod_t N_t` correct it, and their mean is `p(A)`. A prefix where `p` gives all completable tokens no mass keeps the
    row of `p`.

    Args:
      model: `p`.
      allowed: the set `A`, booleans `[V**T]`.

    Returns:
      The law, and `log N`, `[NP]`.

    Raises:
      ValueError: `allowed` has not one entry for each string.

    Reference: Grammar-Aligned Decoding, arXiv:2405.21047.
    """
    return locally_tilted(model, jnp.where(completable(model, allowed), 0.0, -jnp.inf))


# --- selection among samples ------------------------------------------------------------------------------------------


def best_of_n(model: TabularLM, reward: Array, n: int) -> Array:
    r"""The law of the best of `n` samples, `q(x) = p(x) (F(r)^n - F(r-)^n) / P_p(r(x) = r)` at `r = r(x)`.

    `F` is the distribution function of the reward. Ties are broken at random or by order, which is the same. It is
    computed as `p F(r)^(n-1) sum_(j<n) (F(r-) / F(r))^j`, where nothing cancels. The gradient goes to `p` alone.

    Args:
      model: `p`.
      reward: `[V**T]`; if it is NaN for a string that `p` can produce, so is the law.
      n: number of samples, a Python integer.

    Returns:
      Log-probs, `[V**T]`.

    Raises:
      ValueError: `n` is not an integer or less than 1, or `reward` has not one entry for each string.

    Reference: Theoretical guarantees on the best-of-n alignment policy, arXiv:2401.01879.
    """
    _check_samples(n)
    model.check_per_sequence(reward=reward)
    log_p, reward = model.sequence_log_probs(), jnp.asarray(reward)
    order = jnp.argsort(reward)
    mass_below = jnp.concatenate([jnp.zeros(1, log_p.dtype), jnp.cumsum(jnp.exp(log_p)[order])])
    below, at_most = (mass_below[jnp.searchsorted(reward[order], reward, side=side)] for side in ("left", "right"))
    at_most = jnp.where(at_most > 0, at_most, 1)
    ratios = (below / at_most)[:, None] ** jnp.arange(n)
    unordered = jnp.any(jnp.isnan(reward) & (log_p > -jnp.inf))  # a sort takes NaN for the largest
    return jnp.where(unordered, jnp.nan, log_p + (n - 1) * jnp.log(at_most) + jnp.log(ratios.sum(-1)))


def soft_best_of_n(model: TabularLM, reward: Array, beta: float | Array, n: int = 2) -> Array:
    r"""The law of one of `n` samples taken with probability `softmax(r_i / beta)`: importance resampling.

    `q(x) = p(x) n E[e^(r(x)/beta) / (e^(r(x)/beta) + sum_(j=2..n) e^(r(X_j)/beta))]`, by enumeration of the others:
    time and memory `V**(T n)`. It tends to `p*` as `n` grows. Among samples that are all forbidden one is taken evenly.

    Args:
      model: `p`.
      reward: `[V**T]`; may be `-inf`.
      beta: the temperature, a scalar.
      n: number of samples, a Python integer.

    Returns:
      Log-probs, `[V**T]`.

    Raises:
      ValueError: `n` is not an integer or less than 1, or `reward` has not one entry for each string.

    Reference: Soft Best-of-n Sampling for Model Alignment, arXiv:2505.03156.
    """
    _check_samples(n)
    model.check_per_sequence(reward=reward)
    log_p, log_w = model.sequence_log_probs(), log_potential(reward, beta)
    log_p_others, log_w_others = jnp.zeros(1, log_p.dtype), jnp.full(1, -jnp.inf, log_w.dtype)
    for _ in range(n - 1):
        log_p_others = (log_p_others[:, None] + log_p).reshape(-1)
        log_w_others = _log_add(log_w_others[:, None], log_w).reshape(-1)
    total = _log_add(log_w[:, None], log_w_others)
    none_allowed = total == -jnp.inf
    log_taken = jnp.where(none_allowed, -math.log(n), log_w[:, None] - jnp.where(none_allowed, 0, total))
    return log_p + math.log(n) + log_sum_exp(log_p_others + log_taken)


def rejection_acceptance(model: TabularLM, reward: Array, beta: float | Array) -> Array:
    """The rate `Z exp(-max_x r(x) / beta)`, `[]`, at which rejection sampling accepts; what it accepts is from `p*`.

    The maximum is over the strings that `p` can produce.

    Raises:
      ValueError: `reward` has not one entry for each string.
    """
    model.check_per_sequence(reward=reward)
    log_w = jnp.where(model.sequence_log_probs() == -jnp.inf, -jnp.inf, log_potential(reward, beta))
    return jnp.exp(model.log_z(reward, beta) - log_w.max())


def reservation_value(model: TabularLM, reward: Array, cost: float | Array) -> Array:
    r"""The reward `m` with `E_p[(r - m)^+] = cost`, `[]`: sampling on pays while the best so far is below it.

    `m = max_k (S_k - cost) / P_k`, with `P_k` the mass of the `k` best strings and `S_k` their part of `E_p[r]`.

    Args:
      model: `p`.
      reward: `[V**T]`; may be `-inf`.
      cost: of one sample, at least 0, a scalar; at 0 the value is the largest reward.

    Raises:
      ValueError: `reward` has not one entry for each string, or `cost` is known and below 0.

    Reference: Adaptive Inference-Time Compute, arXiv:2410.02725.
    """
    model.check_per_sequence(reward=reward)
    check_known(lambda cost: cost >= 0, "at least 0", cost=cost)
    log_p, reward = model.sequence_log_probs(), jnp.asarray(reward)
    order = jnp.argsort(-reward)
    reward, p = reward[order], jnp.exp(log_p)[order]
    forbidden = reward == -jnp.inf
    mass, part = jnp.cumsum(p), jnp.cumsum(p * jnp.where(forbidden, 0, reward))
    counts = (mass > 0) & ~forbidden
    return jnp.max(jnp.where(counts, (part - cost) / jnp.where(counts, mass, 1), -jnp.inf))


def _log_add(log_a: Array, log_b: Array) -> Array:
    # jnp.logaddexp has a NaN tangent where both are -inf.
    return log_sum_exp(jnp.stack(jnp.broadcast_arrays(log_a, log_b), -1))


def _check_samples(n: int) -> None:
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n}")


# --- search -----------------------------------------------------------------------------------------------------------


def greedy_sequence(model: TabularLM) -> Array:
    """The string of the likeliest tokens, one after the other, integers `[T]`."""
    return beam_sequence(model, 1)


def beam_sequence(model: TabularLM, width: int) -> Array:
    """The likeliest string in the last beam of beam search, integers `[T]`; from `width = V**(T-1)` on, the mode.

    Ties go to the lower code.

    Raises:
      ValueError: `width` is less than 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    vocabulary, offset = model.vocabulary, 0
    codes, log_probs = jnp.zeros(1, jnp.int32), jnp.zeros(1, model.table.dtype)
    for t in range(model.horizon):
        candidates = (log_probs[:, None] + model.table[offset + codes]).reshape(-1)
        codes = (codes[:, None] * vocabulary + jnp.arange(vocabulary)).reshape(-1)
        # top_k takes the earlier of equals, so candidates must stand in the order of their codes.
        by_code = jnp.argsort(codes)
        log_probs, kept = jax.lax.top_k(candidates[by_code], min(width, candidates.size))
        codes, offset = codes[by_code][kept], offset + vocabulary**t
    return model.sequences()[codes[0]]


# --- comparison -------------------------------------------------------------------------------------------------------


def kl(log_q: Array, log_p: Array) -> Array:
    """`KL(q || p) = sum_x q(x) log(q(x) / p(x))` over the last axis, in nats; infinite where `q` has mass and `p` none.

    Raises:
      ValueError: the shapes differ.
    """
    check_same_shape(log_q=log_q, log_p=log_p)
    absent = log_q == -jnp.inf
    gap = jnp.where(absent, 0, log_q) - jnp.where(absent, 0, log_p)
    return jnp.sum(jnp.where(absent, 0, jnp.exp(log_q)) * gap, -1)


def log_importance_weights(log_p: Array, log_q: Array, log_g: Array) -> Array:
    r"""`log(g(x) p(x) / q(x))`: with these weights, strings drawn from `q` are properly weighted for `p g`.

    For a local decoder they are `g(x) prod_t N_t exp(-s_t)`. Strings that `q` never draws have `-inf`.

    Args:
      log_p: log-probs of the base law, `[V**T]`.
      log_q: log-probs of the law that is sampled, `[V**T]`.
      log_g: the potential, `[V**T]`: `r / beta` for `p*`, `log 1_A` for `p` given `A`.

    Raises:
      ValueError: the shapes differ.
    """
    check_same_shape(log_p=log_p, log_q=log_q, log_g=log_g)
    absent = log_q == -jnp.inf
    return jnp.where(absent, -jnp.inf, log_p + log_g - jnp.where(absent, 0, log_q))

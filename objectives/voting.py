r"""Votes over sampled answers, and how often k samples hold, or elect, the right one.

Whether two answers are equal is for the caller to say: answers are integer ids, equal where the answers are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating, check_known, check_same_shape

__all__ = ["Vote", "maj_at_k", "majority_vote", "pass_at_k", "weighted_majority_vote"]


class Vote(NamedTuple):
    """The answer that won, and who gave it first; both `[P]` integers, -1 where no sample is valid."""

    answer: Array  # its id
    index: Array  # of the first valid sample with that answer


def majority_vote(answers: Array, valid: Array) -> Vote:
    """The most frequent answer among the valid samples of each problem, `argmax_a sum_i valid_i [answers_i = a]`.

    Of answers with as many votes, the one given first wins. Invalid samples neither vote nor win.

    Args:
      answers: ids, integers `[P, N]`.
      valid: `[P, N]`, 0 where a sample gave no answer.

    Returns:
      Ids and indices of the winners, `[P]` each.

    Raises:
      ValueError: shapes that differ or are not `[P, N]`, answers that are not integers.

    Reference: Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv:2203.11171.
    """
    return weighted_majority_vote(answers, jnp.ones(answers.shape), valid)


def weighted_majority_vote(answers: Array, weights: Array, valid: Array) -> Vote:
    """The answer with the largest sum of weights, `argmax_a sum_i valid_i weights_i [answers_i = a]`, as a majority.

    Weights are those of a reward or process-reward model. They should be positive: below 0 a vote counts against its
    answer, so turn rewards into `exp(reward / beta)` or a sigmoid first.

    Args:
      answers: ids, integers `[P, N]`.
      weights: of each sample, `[P, N]`; a sample without one, NaN, is not valid.
      valid: `[P, N]`, 0 where a sample gave no answer.

    Returns:
      Ids and indices of the winners, as in `majority_vote`.

    Raises:
      ValueError: shapes that differ or are not `[P, N]`, answers that are not integers, weights that are not floating.

    Reference: Making Large Language Models Better Reasoners with Step-Aware Verifier, arXiv:2206.02336.
    """
    check_same_shape(answers=answers, weights=weights, valid=valid)
    check_floating(weights=weights)
    if answers.ndim != 2 or not jnp.issubdtype(answers.dtype, jnp.integer):
        raise ValueError(f"answers must be integers [P, N], got {answers.dtype}{list(answers.shape)}")
    valid = (valid != 0) & ~jnp.isnan(weights)
    agree = (answers[:, :, None] == answers[:, None, :]) & valid[:, None, :]
    # Not a product of matrices: accelerators round the operands of one.
    votes = jnp.sum(jnp.where(agree, at_least_float32(weights)[:, None, :], 0), axis=-1)
    votes = jnp.where(jnp.isnan(votes), -jnp.inf, votes)  # weights of inf and of -inf for one answer
    leads = valid & (votes == jnp.max(votes, axis=-1, where=valid, initial=-jnp.inf, keepdims=True))
    answer = jnp.take_along_axis(answers, jnp.argmax(leads, axis=-1)[:, None], axis=-1)
    index = jnp.argmax(valid & (answers == answer), axis=-1)
    some = valid.any(-1)
    return Vote(jnp.where(some, answer[:, 0], -1), jnp.where(some, index, -1))


def pass_at_k(n: int | Array, correct: Array, k: int | Array) -> Array:
    r"""Probability that of `k` samples, drawn from `n` without replacement, at least one is correct.

        1 - C(n - correct, k) / C(n, k)

    The unbiased estimate of `1 - (1 - theta)^k` from `n` samples that are each correct with probability `theta`; 1
    where `n - correct < k`.

    Args:
      n: number of samples, a scalar or of the shape of `correct`.
      correct: how many of them are correct, integers of any shape.
      k: samples that may be tried, a scalar or of the shape of `correct`; may be traced.

    Returns:
      Probabilities of the shape of `correct`, in float32 at least; NaN outside of `0 <= correct <= n`, `0 <= k <= n`.

    Raises:
      ValueError: shapes that do not fit, counts that are not integers.

    Reference: Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """
    n, correct, k = (jnp.asarray(count) for count in (n, correct, k))
    for name, count in (("n", n), ("correct", correct), ("k", k)):
        if not jnp.issubdtype(count.dtype, jnp.integer) or count.shape not in ((), correct.shape):
            got = f"{count.dtype}{list(count.shape)}"
            raise ValueError(f"{name} must be integers, a scalar or of the shape of correct {correct.shape}, got {got}")
    less, more = jnp.minimum(correct, k), jnp.maximum(correct, k)  # the formula is symmetric in the two
    overlap = n - more < less

    def factor(i, log_missed):  # 1 - more / (n - i), for i = 0, ..., less - 1
        counts = (i < less) & ~overlap
        return log_missed + jnp.where(counts, jnp.log1p(-more / jnp.where(counts, n - i, 1)), 0)

    # Factor by factor: of a difference of log-factorials float32 would keep three digits at n = 1000.
    log_missed = jax.lax.fori_loop(0, less.max(initial=0), factor, jnp.zeros(correct.shape))
    probability = jnp.where(overlap, 1.0, -jnp.expm1(log_missed))
    possible = (correct >= 0) & (correct <= n) & (k >= 0) & (k <= n)
    return jnp.where(possible, probability, jnp.nan)


def maj_at_k(counts: Array, correct: Array, k: int) -> Array:
    r"""Probability that the right answer wins the vote of `k` samples, drawn from all without replacement.

        1/C(n, k) sum_j C(c, j) sum_s 1/(s+1) [x^(k-j) y^s] prod_b ( sum_{i<j} C(n_b, i) x^i + C(n_b, j) x^j y )

    with `c` votes for the right answer and `n_b` for the others, `n` in all: the right answer is drawn `j` times, `s`
    others as often and none more often. A tie goes to each of its answers with the same probability. Exact; `k` is
    static, because it sizes the polynomials.

    Args:
      counts: how many samples gave each answer, integers at least 0, `[..., A]`; 0 for answers that only fill up the
        array.
      correct: index of the right answer, integers `[...]`; elsewhere than in `0..A-1` if no sample gave it: then 0.
      k: number of votes, at least 1.

    Returns:
      Probabilities `[...]` in float32 at least; NaN where there are fewer than `k` samples, or a count is below 0.

    Raises:
      ValueError: shapes that do not fit, counts or indices that are not integers, known counts below 0, `k < 1`.

    Reference: Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv:2203.11171.
    """
    if counts.ndim == 0 or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(f"counts must be integers [..., A], got {counts.dtype}{list(counts.shape)}")
    if correct.shape != counts.shape[:-1] or not jnp.issubdtype(correct.dtype, jnp.integer):
        wanted = f"integers of the leading axes of counts, {counts.shape[:-1]}"
        raise ValueError(f"correct must be {wanted}, got {correct.dtype}{list(correct.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_known(lambda counts: counts >= 0, "at least 0", counts=counts)
    return jnp.vectorize(functools.partial(_maj_at_k, k=k), signature="(a),()->()")(counts, correct)


def _maj_at_k(counts: Array, correct: Array, k: int) -> Array:
    """For one problem: binomials as laws of independent numbers of draws, given that these are `k` in all.

    Any probability of drawing a sample gives the same conditional law; near `k/n` nothing under- or overflows.
    """
    n = counts.sum()
    drawn = (jnp.minimum(k, n) + 0.5) / (n + 1)
    laws = jnp.exp(_log_binomial_law(counts, drawn, k))
    right = jnp.arange(counts.size) == correct
    ours = jnp.where(right[:, None], laws, 0).sum(0)
    others = jnp.where(right[:, None], jnp.arange(k + 1) == 0, laws)
    lag = jnp.arange(k + 1)[:, None] - jnp.arange(k + 1)
    ties = min(counts.size, k)  # of the right answer with up to `ties - 1` others

    def draws(j):
        """What is left of the sum over `s` for one `j`."""

        def add(table, law):  # [k + 1, ties]: coefficients of x^m y^s
            shifted = jnp.where(lag >= 0, law[lag], 0)
            fewer, tied = (jnp.where(at, shifted, 0) for at in (lag < j, lag == j))
            times = functools.partial(jnp.matmul, precision="highest")
            return times(fewer, table) + jnp.pad(times(tied, table), ((0, 0), (1, 0)))[:, :-1], None

        empty = jnp.zeros((k + 1, ties), laws.dtype).at[0, 0].set(1)
        table, _ = jax.lax.scan(add, empty, others)
        return ours[j] * jnp.sum(table[k - j] / jnp.arange(1, ties + 1))

    total = jnp.exp(_log_binomial_law(n[None], drawn, k)[0, k])
    won = jax.lax.map(draws, jnp.arange(1, k + 1)).sum()
    return jnp.where((k <= n) & (counts >= 0).all(), won / total, jnp.nan)


def _log_binomial_law(counts: Array, probability: Array, k: int) -> Array:
    """Log-probabilities of 0, 1, ..., k successes in each of `counts[A]` trials, `[A, k + 1]`."""
    counts, i = counts.astype(float)[:, None], jnp.arange(1, k + 1)
    odds = jnp.log(probability) - jnp.log1p(-probability)
    possible = i <= counts
    ratios = jnp.where(possible, jnp.log(jnp.where(possible, counts - i + 1, 1) / i) + odds, -jnp.inf)
    return jnp.pad(jnp.cumsum(ratios, axis=-1), ((0, 0), (1, 0))) + counts * jnp.log1p(-probability)

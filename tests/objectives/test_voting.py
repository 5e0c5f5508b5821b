"""Votes against Python counters, pass@k and maj@k against all subsets, their goldens and their expectations."""

import collections
import fractions
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives import voting

majority_vote, weighted_majority_vote = jax.jit(voting.majority_vote), jax.jit(voting.weighted_majority_vote)
pass_at_k = jax.jit(voting.pass_at_k)
maj_at_k = jax.jit(voting.maj_at_k, static_argnums=2)


# --- votes ------------------------------------------------------------------------------------------------------------


def vote_by_counting(answers, weights, valid):
    """Winner and the index of its first sample; a dictionary keeps the order in which answers came."""
    votes, first = collections.defaultdict(fractions.Fraction), {}
    for i, (answer, weight, counts) in enumerate(zip(answers, weights, valid, strict=True)):
        if counts:
            votes[int(answer)] += fractions.Fraction(float(weight))
            first.setdefault(int(answer), i)
    winner = max(votes, key=votes.get, default=-1)
    return winner, first.get(winner, -1)


def test_votes_are_those_of_a_counter():
    draw = np.random.default_rng(0)
    answers, valid = draw.integers(0, 4, (200, 7)), draw.random((200, 7)) < 0.6
    weights = draw.integers(1, 5, (200, 7)) / 4  # exact in float32, so that ties are ties
    for out, heavy in ((majority_vote(answers, valid), np.ones_like(weights)), (
        weighted_majority_vote(answers, jnp.asarray(weights), valid), weights,
    )):  # fmt: skip
        expected = [vote_by_counting(*row) for row in zip(answers, heavy, valid, strict=True)]
        np.testing.assert_array_equal(np.stack(out, -1), expected)


def test_the_first_answer_wins_a_tie_and_invalid_ones_never_win():
    answers = jnp.array([[5, 9, 9, 5], [7, 7, 7, 2], [3, 3, 8, 8], [4, 4, 4, 4]])
    valid = jnp.array([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    vote = majority_vote(answers, valid)
    np.testing.assert_array_equal(vote.answer, [5, 2, 3, -1])
    np.testing.assert_array_equal(vote.index, [0, 3, 1, -1])


def test_invalid_samples_lose_to_any_weight():
    answers, valid = jnp.array([[1, 2, 1], [1, 2, 2], [1, 2, 3]]), jnp.array([[0, 1, 0], [1, 1, 0], [0, 1, 1]])
    weights = jnp.array([[jnp.inf, -3.0, jnp.nan], [-1.0, -2.0, 9.0], [jnp.nan, -jnp.inf, -jnp.inf]])
    vote = weighted_majority_vote(answers, weights, valid)
    np.testing.assert_array_equal(vote.answer, [2, 1, 2])
    np.testing.assert_array_equal(vote.index, [1, 0, 1])


def test_a_weight_that_is_not_a_number_is_no_vote():
    answers = jnp.array([[7, 8, 9], [7, 8, 8], [7, 8, 8], [7, 8, 9]])
    valid = jnp.array([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]])
    inf, nan = jnp.inf, jnp.nan
    weights = jnp.array([[1, nan, 2], [1, nan, 2], [1, inf, -inf], [1, nan, 3]])
    vote = weighted_majority_vote(answers, weights, valid)
    np.testing.assert_array_equal(vote.answer, [9, 8, 8, -1])
    np.testing.assert_array_equal(vote.index, [2, 2, 1, -1])


def test_many_small_weights_in_bfloat16_are_summed_in_float32():
    answers = jnp.array([[0] + [1] * 1000])
    weights = jnp.array([[400.0] + [0.5] * 1000], jnp.bfloat16)
    assert weighted_majority_vote(answers, weights, jnp.ones_like(answers)).answer[0] == 1


# --- pass@k -----------------------------------------------------------------------------------------------------------


def exact_pass_at_k(n, correct, k):
    return 1 - fractions.Fraction(math.comb(n - correct, k), math.comb(n, k))


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n, k in ((1, 1), (5, 2), (6, 6), (7, 3)):
        subsets = list(itertools.combinations(range(n), k))
        expected = [np.mean([any(i < c for i in subset) for subset in subsets]) for c in range(n + 1)]
        np.testing.assert_allclose(pass_at_k(n, np.arange(n + 1), k), expected, rtol=2e-6)


def test_pass_at_k_keeps_its_digits_for_many_samples():
    cases = [(n, c, k) for n in (10, 200, 10_000) for c in (0, 1, n // 10, n // 2, n) for k in (1, 7, n // 5, n)]
    n, correct, k = np.array(cases).T
    expected = np.array([float(exact_pass_at_k(*case)) for case in cases])
    np.testing.assert_allclose(pass_at_k(n, correct, k), expected, rtol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(pass_at_k(n, correct, k), expected, rtol=1e-11)


def test_pass_at_k_is_unbiased():
    """Its mean over the number of correct samples, a binomial, is 1 - (1 - theta)^k."""
    n, theta = 12, 0.23
    chances = np.array([math.comb(n, c) * theta**c * (1 - theta) ** (n - c) for c in range(n + 1)])
    k = np.arange(n + 1)
    estimates = jax.vmap(voting.pass_at_k, (None, None, 0))(n, np.arange(n + 1), k)
    np.testing.assert_allclose(estimates @ chances, 1 - (1 - theta) ** k, rtol=1e-5, atol=1e-6)


def test_pass_at_k_of_what_cannot_be_is_nan():
    n, correct, k = np.array([[3, 3, 3, 3, 0], [4, -1, 1, 1, 0], [1, 1, 4, -1, 0]])
    np.testing.assert_array_equal(np.isnan(pass_at_k(n, correct, k)), [True, True, True, True, False])


# --- maj@k ------------------------------------------------------------------------------------------------------------


def maj_by_enumeration(counts, correct, k):
    votes = np.repeat(np.arange(len(counts)), counts)
    shares = []
    for subset in itertools.combinations(votes, k):
        drawn = np.bincount(subset, minlength=len(counts))
        leaders = np.flatnonzero(drawn == drawn.max())
        shares.append((correct in leaders) / len(leaders))
    return np.mean(shares)


@pytest.mark.parametrize(
    ("counts", "k", "expected"),
    [((3, 2, 2, 1), 1, 0.375), ((3, 2, 2, 1), 3, 3 / 7), ((3, 2, 2, 1), 5, 31 / 56), ((4, 4, 1), 3, 0.4682539683)],
)
def test_maj_at_k_gives_the_numbers_of_its_specification(counts, k, expected):
    np.testing.assert_allclose(maj_at_k(np.array(counts), np.array(0), k), expected, rtol=1e-5)
    np.testing.assert_allclose(maj_by_enumeration(counts, 0, k), expected, rtol=1e-8)


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_maj_at_k_is_the_mean_over_all_subsets(k, x64):
    counts = np.array([[3, 2, 2, 1], [0, 4, 4, 0], [1, 2, 3, 4], [8, 0, 0, 0], [2, 2, 2, 2], [1, 1, 1, 6]])
    counts, correct = np.repeat(counts, 4, 0).reshape(6, 4, 4), np.tile(np.arange(4), (6, 1))
    out = maj_at_k(counts, correct, k)
    expected = [[maj_by_enumeration(row, c, k) for c, row in enumerate(rows)] for rows in counts]
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(out.sum(-1), 1)  # one answer wins


def test_maj_at_1_is_the_share_of_the_right_answer_and_maj_at_n_the_vote_of_all():
    counts = np.array([[5, 9, 2], [7, 7, 1], [100, 900, 50]])
    correct = np.array([1, 0, 0])
    np.testing.assert_allclose(maj_at_k(counts, correct, 1), [9 / 16, 7 / 15, 100 / 1050], rtol=1e-5)
    np.testing.assert_allclose(maj_at_k(counts[:1], correct[:1], 16), 1, rtol=1e-5)
    np.testing.assert_allclose(maj_at_k(counts[1:2], correct[1:2], 15), 0.5, rtol=1e-5)


def test_maj_at_k_for_two_answers_is_hypergeometric():
    """Large counts, of which the binomials are beyond float32."""
    counts, k = (700, 500), 31
    wins = sum(math.comb(700, j) * math.comb(500, k - j) for j in range(16, k + 1))
    expected = float(fractions.Fraction(wins, math.comb(1200, k)))
    np.testing.assert_allclose(maj_at_k(np.array(counts), np.array(0), k), expected, rtol=1e-5)


def test_maj_at_k_of_an_answer_nobody_gave_is_zero_and_of_too_few_samples_nan():
    counts, correct = np.array([[3, 2, 0]] * 3), np.array([2, 3, -1])
    np.testing.assert_array_equal(maj_at_k(counts, correct, 3), 0)
    np.testing.assert_array_equal(maj_at_k(counts, correct, 6), np.nan)


def test_maj_at_k_of_counts_below_zero():
    counts, correct = np.array([[5, -2, 3], [5, 2, 3]]), np.array([0, 0])
    np.testing.assert_array_equal(np.isnan(maj_at_k(counts, correct, 3)), [True, False])
    with pytest.raises(ValueError, match="counts must be at least 0, got"):
        voting.maj_at_k(counts, correct, 3)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named():
    answers, weights = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"one shape: answers \(2, 3\), weights \(2, 3\), valid \(2,\)"):
        voting.majority_vote(answers, weights[:, 0])
    with pytest.raises(ValueError, match=r"answers must be integers \[P, N\], got int32\[3\]"):
        voting.majority_vote(answers[0], weights[0])
    with pytest.raises(ValueError, match=r"answers must be integers \[P, N\], got float32\[2, 3\]"):
        voting.majority_vote(weights, weights)
    with pytest.raises(ValueError, match="weights must be of a floating type, got int32"):
        voting.weighted_majority_vote(answers, answers, weights)
    with pytest.raises(ValueError, match=r"k must be integers, .* correct \(2, 3\), got int32\[3\]"):
        voting.pass_at_k(4, answers, answers[0])
    with pytest.raises(ValueError, match=r"correct must be integers, .*, got float32\[2, 3\]"):
        voting.pass_at_k(4, weights, 1)
    maj = functools.partial(voting.maj_at_k, k=2)
    with pytest.raises(ValueError, match=r"counts must be integers \[..., A\], got float32\[2, 3\]"):
        maj(weights, answers[:, 0])
    with pytest.raises(
        ValueError, match=r"correct must be integers of the leading axes of counts, \(2,\), got int32\[3\]"
    ):
        maj(answers, answers[0])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        voting.maj_at_k(answers, answers[:, 0], 0)

"""Log-probabilities, masked reductions and segments against SciPy, NumPy on the entries kept, and Python loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from esscher.core import tokens

VALUES = np.asarray(jax.random.normal(jax.random.key(0), (6, 5)), np.float64)
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 0]])
POISONED = jnp.asarray(np.where(MASK, VALUES, np.where(np.arange(5) % 2, np.nan, np.inf)), jnp.float32)
ROWS = [VALUES[i][MASK[i] > 0] for i in range(6)]  # the entries kept of each row
KEPT = np.concatenate(ROWS)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logits_and_targets(dtype):
    logits = 4 * jax.random.normal(jax.random.key(1), (2, 3, 4, 7), dtype)
    return logits, jax.random.randint(jax.random.key(2), (2, 3, 4), 0, 7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_token_logps_are_entries_of_the_log_softmax(dtype, tolerance, x64):
    logits, targets = logits_and_targets(dtype)
    out = jax.jit(tokens.token_logps)(logits, targets)
    expected = np.take_along_axis(scipy.special.log_softmax(np.float64(logits), -1), targets[..., None], -1)[..., 0]
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_token_logps_of_forbidden_tokens_and_of_targets_that_do_not_exist():
    logits = jnp.array([[0.0, -jnp.inf, jnp.log(3.0)]] * 5)
    out = tokens.token_logps(logits, jnp.array([0, 1, 2, 3, -1]))
    np.testing.assert_allclose(out, [np.log(0.25), -np.inf, np.log(0.75), np.nan, np.nan], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(np.int8, 300), (np.uint8, 300), (np.int16, 50_257)])
def test_targets_of_few_bits_are_not_mistaken_for_others(dtype, vocabulary):
    """The vocabulary's size, or -1, would wrap to an id in their type."""
    logits = jnp.sin(jnp.arange(4.0 * vocabulary)).reshape(4, vocabulary)
    targets = np.array([0, 47, 100, -1]).astype(dtype)
    expected = tokens.token_logps(logits, targets.astype(np.int32))
    np.testing.assert_array_equal(tokens.token_logps(logits, targets), expected)
    np.testing.assert_array_equal(np.isnan(expected), targets < 0)
    linear = tokens.linear_token_logps(logits[:, :1], jnp.ones((1, vocabulary)), targets)
    np.testing.assert_array_equal(np.isnan(linear), targets < 0)


def test_low_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 5000), jnp.bfloat16)
    out = tokens.token_logps(logits, jnp.array([4]))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, -np.log(5000), rtol=1e-6)
    np.testing.assert_allclose(tokens.token_entropy(logits), np.log(5000), rtol=1e-6)


def test_token_entropy_is_that_of_scipy_and_skips_forbidden_tokens():
    logits, _ = logits_and_targets(np.float32)
    logits = logits.at[..., 2].set(-jnp.inf).at[0, 0, 0, 1:].set(-jnp.inf)
    expected = scipy.stats.entropy(scipy.special.softmax(np.float64(logits), -1), axis=-1)
    np.testing.assert_allclose(tokens.token_entropy(logits), expected, rtol=1e-5, atol=1e-6)
    slopes = jax.jit(jax.grad(lambda logits: tokens.token_entropy(logits).sum()))(logits)
    assert np.isfinite(slopes).all()
    assert not np.asarray(slopes)[..., 2].any()


def test_sequence_logp_sums_or_averages_the_tokens_kept():
    np.testing.assert_allclose(tokens.sequence_logp(POISONED, MASK), [row.sum() for row in ROWS], rtol=1e-5)
    means = [row.sum() / max(len(row), 1) for row in ROWS]
    np.testing.assert_allclose(tokens.sequence_logp(POISONED, MASK, normalize=True), means, rtol=1e-5)


def test_shared_prefix_weighs_what_lies_beyond_it():
    shared = np.array([2, 1, 3, 0, 1, 9])
    run = jax.jit(jax.vmap(functools.partial(tokens.shared_prefix_sequence_logp, POISONED, MASK, shared)))
    ends, tails = run(jnp.array([0.0, 1.0])), run(jnp.array([0.3, -0.5, 2.0]))
    np.testing.assert_allclose(ends[0], [row[:n].sum() for row, n in zip(ROWS, shared, strict=True)], rtol=1e-5)
    np.testing.assert_allclose(ends[1], tokens.sequence_logp(POISONED, MASK), rtol=1e-5)
    for alpha, out in zip((0.3, -0.5, 2.0), tails, strict=True):
        np.testing.assert_allclose(out, ends[0] + alpha * (ends[1] - ends[0]), rtol=1e-5, atol=1e-6)
    whole = MASK.sum(-1)
    out = tokens.shared_prefix_sequence_logp(POISONED, MASK, whole, 0.2)
    np.testing.assert_allclose(out, ends[1], rtol=1e-5)  # a pair of equal lengths: the same for every alpha


def test_a_shared_prefix_alone_does_not_see_what_lies_beyond_it():
    logp, mask, shared = (
        jnp.array([[-1.0, -jnp.inf], [-1.0, jnp.nan], [-1, -2]]),
        jnp.ones((3, 2)),
        jnp.array([1, 1, 1]),
    )
    score = lambda logp, alpha: tokens.shared_prefix_sequence_logp(logp, mask, shared, alpha)  # noqa: E731
    np.testing.assert_array_equal(score(logp, 0.0), [-1, -1, -1])
    np.testing.assert_array_equal(score(logp, jnp.array([1.0, 0.0, 0.5])), [-np.inf, -1, -2])  # one for each sequence
    slopes = jax.grad(lambda *x: score(*x).sum(), (0, 1))(logp, 0.0)
    np.testing.assert_array_equal(slopes[0], [[1, 0]] * 3)
    assert slopes[1] == -2  # of the finite tail


def test_errors_of_log_probabilities():
    logits, targets = logits_and_targets(np.float32)
    with pytest.raises(ValueError, match=r"targets must have the leading axes of logits, \(2, 3, 4\), got \(2, 3\)"):
        tokens.token_logps(logits, targets[..., 0])
    with pytest.raises(ValueError, match="targets must be integers, got float32"):
        tokens.token_logps(logits, targets + 0.5)
    with pytest.raises(ValueError, match="logits must be of a floating type, got int32"):
        tokens.token_entropy(targets)
    with pytest.raises(ValueError, match=r"one shape: logp \(6, 5\), mask \(6, 4\)"):
        tokens.sequence_logp(POISONED, MASK[:, 1:])
    with pytest.raises(ValueError, match=r"one shape: logp \(6, 5\), mask \(5, 5\)"):
        tokens.shared_prefix_sequence_logp(POISONED, MASK[1:], MASK[:, 0], 0.5)
    with pytest.raises(ValueError, match=r"shared_length must have shape \(6,\), got \(5,\)"):
        tokens.shared_prefix_sequence_logp(POISONED, MASK, MASK[0], 0.5)


# --- masked statistics ------------------------------------------------------------------------------------------------


def by_row(function, least=1):
    """A NumPy function of the entries kept of each row, 0 for rows of fewer than `least`."""
    return np.array([function(row) if len(row) >= least else 0.0 for row in ROWS])


def test_masked_mean_and_variance_are_those_of_the_entries_kept():
    np.testing.assert_allclose(tokens.masked_mean(POISONED, MASK), KEPT.mean(), rtol=1e-5)
    np.testing.assert_allclose(tokens.masked_mean(POISONED, MASK, -1), by_row(np.mean), rtol=1e-5)
    np.testing.assert_allclose(tokens.masked_mean(POISONED, MASK, (0, 1)), KEPT.mean(), rtol=1e-5)
    for ddof in (0, 1, 2):
        np.testing.assert_allclose(tokens.masked_var(POISONED, MASK, ddof=ddof), KEPT.var(ddof=ddof), rtol=1e-5)
        expected = by_row(functools.partial(np.var, ddof=ddof), ddof + 1)
        np.testing.assert_allclose(tokens.masked_var(POISONED, MASK, 1, ddof=ddof), expected, rtol=1e-5, atol=1e-7)
    columns = [VALUES[:, j][MASK[:, j] > 0] for j in range(5)]
    np.testing.assert_allclose(tokens.masked_var(POISONED, MASK, 0), [c.var() for c in columns], rtol=1e-5)


def test_the_variance_of_values_far_from_zero_keeps_its_digits():
    values = 1e4 + jnp.arange(4.0)
    np.testing.assert_allclose(tokens.masked_var(values, jnp.array([1, 1, 1, 0])), 2 / 3, rtol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
def test_masked_whiten_standardises_the_entries_kept(ddof):
    scale = np.sqrt(KEPT.var(ddof=ddof) + 0.01)
    whiten = functools.partial(tokens.masked_whiten, POISONED, MASK, ddof=ddof, eps=0.01)
    expected = np.where(MASK, (VALUES - KEPT.mean()) / scale, 0)
    np.testing.assert_allclose(whiten(), expected, rtol=1e-5, atol=1e-6)
    unshifted = np.where(MASK, expected + KEPT.mean(), 0)
    np.testing.assert_allclose(whiten(shift_mean=False), unshifted, rtol=1e-5, atol=1e-6)
    mean, std = (by_row(f)[:, None] for f in (np.mean, lambda r: np.sqrt(r.var(ddof=ddof)) if len(r) > ddof else 0.0))
    expected = np.where(MASK, (VALUES - mean) / np.sqrt(std**2 + 0.01), 0)
    np.testing.assert_allclose(whiten(axis=-1), expected, rtol=1e-4, atol=1e-6)


def test_masked_quantile_is_that_of_numpy_for_traced_q():
    q = np.array([0.0, 0.1, 0.25, 0.5, 0.77, 1.0], np.float32)
    out = jax.jit(jax.vmap(tokens.masked_quantile, (None, None, 0)))(POISONED, MASK, q)
    for i, level in enumerate(q):
        expected = by_row(functools.partial(np.quantile, q=np.float64(level)))
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-6)


def test_masked_quantile_of_infinite_entries_that_count():
    values, mask = jnp.array([3.0, jnp.inf, 1.0, 2.0]), jnp.array([1, 1, 1, 0])
    out = jax.vmap(tokens.masked_quantile, (None, None, 0))(values, mask, jnp.array([0.25, 0.75]))
    np.testing.assert_array_equal(out, [2, np.inf])


def test_masked_quantile_outside_of_all_levels_is_nan():
    out = jax.vmap(tokens.masked_quantile, (None, None, 0))(POISONED, MASK, jnp.array([-0.2, 1.5, jnp.nan]))
    assert np.isnan(out).all()
    with pytest.raises(ValueError, match=r"q must be a scalar, got shape \(6,\)"):
        tokens.masked_quantile(POISONED, MASK, jnp.full(6, 0.5))


def test_masked_rank_is_the_place_in_a_sort():
    ranks = np.asarray(tokens.masked_rank(POISONED, MASK))
    for values, mask, rank, row in zip(VALUES, MASK, ranks, ROWS, strict=True):
        assert sorted(rank) == list(range(5))
        np.testing.assert_array_equal(values[np.argsort(rank)[: len(row)]], np.sort(row)[::-1])
        assert (rank[mask == 0] >= len(row)).all()
    top = jax.jit(lambda k: (tokens.masked_rank(POISONED, MASK) < k) & (MASK > 0))
    for k in range(6):
        np.testing.assert_array_equal(top(k).sum(-1), np.minimum(MASK.sum(-1), k))


def test_masked_rank_of_ties_and_of_entries_that_count_and_are_infinite():
    values = jnp.array([[2.0, 7.0, 2.0, 0.0, -0.0], [-jnp.inf, -jnp.inf, jnp.inf, 1.0, 0.0]])
    mask = jnp.array([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]])
    np.testing.assert_array_equal(tokens.masked_rank(values, mask), [[0, 4, 1, 2, 3], [3, 2, 0, 4, 1]])


def test_errors_of_masked_statistics():
    functions = (tokens.masked_mean, tokens.masked_var, tokens.masked_whiten, tokens.masked_rank)
    for function in (*functions, functools.partial(tokens.masked_quantile, q=0.5)):
        with pytest.raises(ValueError, match=r"one shape: values \(6, 5\), mask \(5,\)"):
            function(POISONED, MASK[0])
        with pytest.raises(ValueError, match="values must be of a floating type"):
            function(jnp.asarray(MASK), MASK)


# --- aggregation ------------------------------------------------------------------------------------------------------

LOGP = jnp.array([[-0.5, -1, -0.2, -2], [-0.7, -0.1, -1.5, -0.3], [-1.2, -0.4, -0.6, -0.9], [-0.3, -2.2, -0.8, -0.05]])
VALID = np.arange(4) < np.array([3, 4, 2, 3])[:, None]
MODES = {
    "token-mean": {}, "seq-mean-token-mean": {}, "seq-mean-token-sum": {},
    "group-mean-token-mean": {"group_size": 2}, "constant": {"length": 4.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "mean", "denominator"),
    [
        ("token-mean", -0.766667, 12),
        ("seq-mean-token-sum", -2.3, 4),
        ("seq-mean-token-mean", -0.779167, 4),
        ("group-mean-token-mean", -(4.3 / 7 + 4.9 / 5) / 2, 2),
        ("constant", -9.2 / 16, 16),
    ],
)
def test_aggregate_gives_the_numbers_of_verl(how, mean, denominator):
    """The first three are those that verl gives; its "seq-mean-token-sum-norm" is B times "constant": -2.3."""
    total, count = tokens.aggregate(LOGP, VALID, how, **MODES[how])
    assert count == denominator
    np.testing.assert_allclose(total / count, mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", MODES)
def test_parts_added_and_divided_once_are_the_whole_however_it_was_split(how):
    values, mask = (jnp.concatenate([jnp.asarray(x), jnp.asarray(x)[::-1, ::-1]]) for x in (POISONED, MASK))
    run = jax.jit(lambda values, mask: tokens.aggregate(values, mask, how, **MODES[how]))
    total, count = run(values, mask)
    for cuts in ((2,), (4,), (10,), (2, 4), (2, 6, 8), (2, 4, 6, 8, 10)):  # in whole groups
        parts = [run(values[a:b], mask[a:b]) for a, b in itertools.pairwise((0, *cuts, 12))]
        numerators, denominators = (sum(part) for part in zip(*parts, strict=True))
        np.testing.assert_allclose(numerators / denominators, total / count, rtol=1e-6)
        assert denominators == count


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_means_of_micro_batches_are_not_the_mean(how):
    total, count = tokens.aggregate(POISONED, MASK, how)
    halves = [tokens.aggregate(POISONED[rows], MASK[rows], how) for rows in (slice(0, 2), slice(2, 6))]
    assert abs(total / count - np.mean([a / b for a, b in halves])) > 1e-2


def test_aggregate_skips_what_is_empty():
    """Row 2 has no token: it counts in no mode but "constant", nor does a group of such rows."""
    counts = {how: tokens.aggregate(POISONED, MASK, how, **MODES[how])[1] for how in MODES}
    expected = {"token-mean": 13, "seq-mean-token-mean": 5, "seq-mean-token-sum": 5, "group-mean-token-mean": 3}
    assert counts == {**expected, "constant": 24}
    nothing = tokens.aggregate(POISONED[2:4], jnp.zeros((2, 5)), "group-mean-token-mean", group_size=2)
    np.testing.assert_array_equal(nothing, [0, 0])


def test_the_denominator_has_no_gradient_and_masked_tokens_have_none():
    for how, settings in MODES.items():
        ratio = lambda x, how=how, settings=settings: jnp.divide(*tokens.aggregate(x, MASK, how, **settings))  # noqa: E731
        slopes = np.asarray(jax.grad(ratio)(POISONED))
        assert np.isfinite(slopes).all()
        np.testing.assert_array_equal(slopes != 0, MASK != 0)


def test_errors_of_aggregate():
    aggregate = functools.partial(tokens.aggregate, LOGP, VALID)
    with pytest.raises(ValueError, match=r"how must be one of token-mean, .*, constant, got 'mean'"):
        aggregate("mean", length=4)
    with pytest.raises(ValueError, match='length must be given for how="constant" and nothing else, got length=None'):
        aggregate("constant")
    with pytest.raises(ValueError, match=r"length must be given .* got length=4, how='token-mean'"):
        aggregate("token-mean", length=4)
    with pytest.raises(ValueError, match=r"group_size must be given .* got group_size=None"):
        aggregate("group-mean-token-mean")
    with pytest.raises(ValueError, match=r"group_size must be given .* got group_size=2, how='seq-mean-token-sum'"):
        aggregate("seq-mean-token-sum", group_size=2)
    for length in (0, np.array(-1.0)):
        with pytest.raises(ValueError, match="length must be above 0, got"):
            aggregate("constant", length=length)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        aggregate("group-mean-token-mean", group_size=0)
    with pytest.raises(ValueError, match="a multiple of group_size=3 rows, got 4"):
        aggregate("group-mean-token-mean", group_size=3)
    with pytest.raises(ValueError, match=r"values must have shape \[B, T\], got \(4,\)"):
        tokens.aggregate(LOGP[0], VALID[0], "token-mean")
    with pytest.raises(ValueError, match=r"one shape: values \(4, 4\), mask \(4, 3\)"):
        tokens.aggregate(LOGP, VALID[:, 1:], "token-mean")


# --- segments ---------------------------------------------------------------------------------------------------------

SEGMENTS = np.array(
    [[-1, 0, 0, 1, 1, -1, 3], [0, 0, 0, 0, 0, 0, 0], [-1] * 7, [2, 2, -1, -1, 4, 5, 5], [0, 1, 2, 3, 4, 5, 6]]
)
NUMBERS = np.asarray(jax.random.normal(jax.random.key(3), (5, 7)))
N = 4  # so that some segments are left out


def test_sums_and_means_of_segments_are_those_of_a_loop():
    values = jnp.asarray(np.where((SEGMENTS < 0) | (SEGMENTS >= N), np.nan, NUMBERS))
    parts = [[row[segments == s] for s in range(N)] for row, segments in zip(NUMBERS, SEGMENTS, strict=True)]
    sums = [[part.sum() for part in row] for row in parts]
    means = [[part.sum() / max(len(part), 1) for part in row] for row in parts]
    np.testing.assert_allclose(tokens.segment_sum(values, SEGMENTS, N), sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tokens.segment_mean(values, SEGMENTS, N), means, rtol=1e-5, atol=1e-6)
    slopes = jax.grad(lambda values: tokens.segment_sum(values, SEGMENTS, N).sum())(values)
    np.testing.assert_array_equal(slopes, (SEGMENTS >= 0) & (SEGMENTS < N))


def test_low_precision_segments_are_summed_in_float32():
    out = tokens.segment_sum(jnp.ones((1, 600), jnp.bfloat16), jnp.zeros((1, 600), jnp.int32), 1)
    assert out.dtype == jnp.float32
    assert out[0, 0] == 600


def test_ends_and_positions_are_those_of_a_loop():
    ends, positions = tokens.segment_ends(SEGMENTS), tokens.segment_positions(SEGMENTS)
    for b, row in enumerate(SEGMENTS):
        for t, segment in enumerate(row):
            members = np.flatnonzero(row == segment)
            assert ends[b, t] == (segment >= 0 and t == members[-1])
            assert segment < 0 or positions[b, t] == t - members[0]
    np.testing.assert_array_equal(positions[2], np.arange(7))


def test_an_interrupted_segment_ends_once():
    segments = jnp.array([[0, 0, -1, 0, 1, 1], [2, 0, 2, 0, -1, 2]])
    ends = jax.jit(tokens.segment_ends)(segments)
    np.testing.assert_array_equal(ends, [[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1]])
    steps = jnp.array([[1.0, 2.0, 9.0], [1.0, 9.0, 3.0]])
    np.testing.assert_array_equal(tokens.segment_scatter(steps, segments), [[0, 0, 0, 1, 0, 2], [0, 0, 0, 1, 0, 3]])
    np.testing.assert_array_equal(tokens.segment_positions(segments)[0], [0, 1, 0, 0, 0, 1])


def test_segments_numbered_in_few_bits_may_be_many():
    segments = jnp.array([[0, 100, -1]], jnp.int8)
    out = tokens.segment_sum(jnp.array([[1.0, 2.0, 4.0]]), segments, 250)  # as int8, 250 is -6
    np.testing.assert_array_equal(out, np.zeros((1, 250)) + np.eye(250)[0] + 2 * np.eye(250)[100])
    np.testing.assert_array_equal(tokens.segment_scatter(out, segments), [[1, 2, 0]])


def test_broadcast_and_scatter_are_those_of_a_loop():
    steps = jnp.asarray(NUMBERS[:, :N])
    every, last = tokens.segment_broadcast(steps, SEGMENTS), tokens.segment_scatter(steps, SEGMENTS)
    ends = np.asarray(tokens.segment_ends(SEGMENTS))
    for b, t in np.ndindex(*SEGMENTS.shape):
        value = NUMBERS[b, SEGMENTS[b, t]] if 0 <= SEGMENTS[b, t] < N else 0
        assert every[b, t] == value
        assert last[b, t] == (value if ends[b, t] else 0)


def test_a_reward_scattered_to_last_tokens_sums_back_to_itself():
    steps = jnp.asarray(NUMBERS[:, :N])
    occurs = (SEGMENTS[:, None] == np.arange(N)[:, None]).any(-1)
    back = tokens.segment_sum(tokens.segment_scatter(steps, SEGMENTS), SEGMENTS, N)
    np.testing.assert_array_equal(back, jnp.where(occurs, steps, 0))
    back = tokens.segment_mean(tokens.segment_broadcast(steps, SEGMENTS), SEGMENTS, N)
    np.testing.assert_allclose(back, jnp.where(occurs, steps, 0), rtol=1e-6)


def test_errors_of_segments():
    values, steps = jnp.asarray(NUMBERS), jnp.asarray(NUMBERS[:, :N])
    for function in (tokens.segment_sum, tokens.segment_mean):
        with pytest.raises(ValueError, match=r"one shape: values \(5, 7\), segments \(5, 6\)"):
            function(values, SEGMENTS[:, 1:], N)
        with pytest.raises(ValueError, match=r"segments must be integers \[B, T\], got int64\[7\]"):
            function(values[0], SEGMENTS[0], N)
    for function in (tokens.segment_ends, tokens.segment_positions):
        with pytest.raises(ValueError, match=r"segments must be integers \[B, T\], got float32\[5, 7\]"):
            function(values)
    for function in (tokens.segment_broadcast, tokens.segment_scatter):
        with pytest.raises(ValueError, match=r"steps must be \[B, n\] for segments \[B, T\] = \(5, 7\), got \(3, 4\)"):
            function(steps[:3], SEGMENTS)
        with pytest.raises(ValueError, match="steps must be of a floating type"):
            function(SEGMENTS, SEGMENTS)

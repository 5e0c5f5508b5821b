"""Every scheme is unbiased, ranks by variance as theory has it, and stays exact for a million particles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.samplers import resampling

SCHEMES = [resampling.multinomial, resampling.residual, resampling.stratified, resampling.systematic]
WEIGHTS = np.array([0.3, 0.01, 0.0, 0.25, 0.04, 0.4])
LOG_W = jnp.log(jnp.asarray(WEIGHTS, jnp.float32)) + 3.0
DRAWS = 50_000


@pytest.fixture(scope="module")
def offspring():
    """Numbers of offspring, `[DRAWS, N]`, by scheme and number of draws."""
    found = {}

    def count(scheme, n):
        if (scheme, n) not in found:
            draw = jax.vmap(lambda key: jnp.bincount(scheme(key, LOG_W, n), length=len(WEIGHTS)))
            found[scheme, n] = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(1), DRAWS)))
        return found[scheme, n]

    return count


@pytest.mark.parametrize("n", [None, 4, 11])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_offspring_are_n_times_the_weight_on_average(offspring, scheme, n):
    """Within 4.5 standard errors, false alarms 1e-5 each; nothing without weight has any."""
    counts, size = offspring(scheme, n), n or len(WEIGHTS)
    assert np.all(counts.sum(1) == size)
    error = np.abs(counts.mean(0) - size * WEIGHTS)
    assert np.all(error <= 4.5 * counts.std(0) / DRAWS**0.5 + 1e-6)
    assert not counts[:, 2].any()
    assert scheme is resampling.multinomial or np.all(counts.std(0) ** 2 <= size * WEIGHTS * (1 - WEIGHTS) + 0.02)


def test_variances_are_those_of_theory_and_fall_from_scheme_to_scheme(offspring):
    size = len(WEIGHTS)
    variances = [offspring(scheme, None).var(0) for scheme in SCHEMES]
    np.testing.assert_allclose(variances[0], size * WEIGHTS * (1 - WEIGHTS), rtol=0.05, atol=1e-3)
    left = size * WEIGHTS - np.floor(size * WEIGHTS)
    remainder = left / left.sum()
    np.testing.assert_allclose(variances[1], left.sum() * remainder * (1 - remainder), rtol=0.05, atol=1e-3)
    fraction = size * WEIGHTS % 1
    np.testing.assert_allclose(variances[3], fraction * (1 - fraction), rtol=0.05, atol=1e-3)
    totals = [variance.sum() for variance in variances]
    assert totals[0] > totals[1] > totals[2] > totals[3]


def test_systematic_and_stratified_are_their_points_searched_in_the_partial_sums():
    key, log_w = jax.random.key(3), 2 * jax.random.normal(jax.random.key(4), (50,))
    ends = np.cumsum(np.asarray(jax.nn.softmax(log_w), np.float64))
    for n in (20, 130):
        for scheme, uniforms in (
            (resampling.systematic, jax.random.uniform(key, ())),
            (resampling.stratified, jax.random.uniform(key, (n,))),
        ):
            points = (np.arange(n) + np.asarray(uniforms, np.float64)) / n
            np.testing.assert_array_equal(scheme(key, log_w, n), np.searchsorted(ends, points, side="right"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_million_particles_are_exact_and_ascending(scheme):
    """In float32 plain partial sums would be off by a sixteenth of an offspring, and cost small weights theirs."""
    size, small = 1_000_000, 1000
    log_w = jnp.zeros(size).at[-small:].set(jnp.log(0.25))
    ancestors = np.asarray(jax.jit(scheme)(jax.random.key(0), log_w))
    assert np.all(np.diff(ancestors) >= 0)
    counts = np.bincount(ancestors, minlength=size)
    expected = np.exp(np.asarray(log_w, np.float64))
    expected *= size / expected.sum()
    if scheme in (resampling.systematic, resampling.residual):
        assert np.all(counts >= np.floor(expected))
    if scheme is resampling.systematic:
        assert np.all(counts <= np.ceil(expected))
        np.testing.assert_allclose(np.add.reduceat(counts, range(0, size, 1000)), 1000 * expected[::1000], atol=1.01)
    assert abs(counts[-small:].sum() - expected[-small:].sum()) < 5 * expected[-small:].sum() ** 0.5


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_equal_weights_change_nothing(scheme):
    for size in (1, 100):
        np.testing.assert_array_equal(scheme(jax.random.key(1), jnp.full(size, -3.0)), np.arange(size))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_without_numbers(scheme):
    key = jax.random.key(2)
    assert set(np.asarray(scheme(key, jnp.array([0.0, jnp.nan, -jnp.inf, 0.0]), 40))) == {0, 3}
    np.testing.assert_array_equal(scheme(key, jnp.array([-5.0, jnp.inf, 7.0])), 1)
    for nothing in (jnp.full(4, -jnp.inf), jnp.array([jnp.nan, -jnp.inf, jnp.nan, jnp.nan])):
        with pytest.raises(ValueError, match="log_w has no weight above 0, so there is nothing to choose by"):
            scheme(key, nothing, 40)
        assert set(np.asarray(jax.jit(scheme, static_argnums=2)(key, nothing, 40))) == {0, 1, 2, 3}
    np.testing.assert_array_equal(scheme(key, jnp.array([-1e4, -1e4 + 200.0])), 1)
    assert scheme(key, jnp.zeros(3, jnp.bfloat16)).dtype == jnp.int32


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("log_w", "n", "message"),
    [
        (jnp.zeros(0), None, r"log_w must have shape \[N\] with N at least 1, got \(0,\)"),
        (jnp.zeros((2, 2)), None, r"log_w must have shape \[N\] with N at least 1, got \(2, 2\)"),
        (jnp.zeros(3, int), None, "log_w must be of a floating type"),
        (jnp.zeros(3), 0, "n must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(scheme, log_w, n, message):
    with pytest.raises(ValueError, match=message):
        scheme(jax.random.key(0), log_w, n)


@pytest.mark.parametrize("size", [1, 5, 256, 700])
def test_scans_by_parts_are_scans(size):
    x = np.random.default_rng(size).integers(-3, 1000, size).astype(np.int32)
    running = lambda combine, x: jax.jit(lambda x: resampling._running(combine, x))(x)  # noqa: E731
    np.testing.assert_array_equal(running(jnp.add, x), np.cumsum(x))
    np.testing.assert_array_equal(running(jnp.maximum, np.abs(x)), np.maximum.accumulate(np.abs(x)))
    pair = running(lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])), (x, np.abs(x)))
    np.testing.assert_array_equal(pair[0], np.cumsum(x))
    np.testing.assert_array_equal(pair[1], np.maximum.accumulate(np.abs(x)))

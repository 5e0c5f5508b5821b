"""What goes wrong in a run of particles: weights that are no numbers or all zero, and what cannot run at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.samplers import smc, steppers

pytestmark = pytest.mark.usefixtures("compile_quickly")

COSINE = schedules.cosine()


def propose(key, x, y):
    return x + jax.random.normal(key, x.shape), -jnp.square(y - x)


def test_weights_that_are_nan_are_counted_named_and_zero():
    def faulty(key, x, k):
        return x + 1, jnp.where((jnp.arange(6) < 2) & (k == 1), jnp.nan, 0.0)

    start, inputs = smc.begin(jnp.arange(6.0)), jnp.arange(3)
    run = functools.partial(smc.run, jax.random.key(0), faulty, start, inputs, ess_threshold=0.0)
    with pytest.warns(
        UserWarning, match="2 weights were NaN or .*, first in the steps 1, and count as 0: .* reward"
    ) as w:
        last, trace = run()
    assert w[0].filename == __file__
    np.testing.assert_array_equal(trace.nan, [0, 2, 0])
    np.testing.assert_array_equal(last.log_w, [-np.inf, -np.inf, 0, 0, 0, 0])
    np.testing.assert_allclose(last.log_z, np.log(4 / 6), rtol=1e-5)
    quiet, _ = jax.jit(run)()
    np.testing.assert_array_equal(quiet.log_w, last.log_w)


def test_a_weight_of_zero_is_final_and_counted_once():
    """What a dead particle adds may be anything: `+inf` from `-inf` to a finite value, or NaN again and again."""

    def reviving(key, x, k):
        return x, jnp.where(
            k == 0, jnp.where(x < 2, -jnp.inf, 0.0), jnp.where(x < 1, jnp.inf, jnp.where(x < 2, jnp.nan, 1.0))
        )

    run = functools.partial(smc.run, jax.random.key(0), reviving, smc.begin(jnp.arange(6.0)), jnp.arange(3))
    last, trace = run(ess_threshold=0.0)
    np.testing.assert_array_equal(last.log_w, [-np.inf, -np.inf, 2, 2, 2, 2])
    np.testing.assert_array_equal(trace.nan, 0)
    np.testing.assert_allclose(trace.log_z, np.log(4 / 6) + np.arange(3), rtol=1e-6)
    again, _ = run(ess_threshold=1.0)
    np.testing.assert_allclose(again.log_z, last.log_z, rtol=1e-6)
    assert np.all(again.state >= 2)


@pytest.mark.parametrize("ess_threshold", [0.0, 1.0])
def test_what_is_no_weight_at_the_start_or_infinite_later_counts_as_zero(ess_threshold):
    def step(key, x, k):
        return x, jnp.where((x == 3) & (k == 1), jnp.inf, 0.0)

    start = smc.begin(jnp.arange(6.0), jnp.array([0.0, jnp.nan, 0, 0, jnp.inf, 0]))
    np.testing.assert_allclose(start.log_z, np.log(4 / 6), rtol=1e-6)
    run = functools.partial(smc.run, jax.random.key(0), step, start, jnp.arange(3), ess_threshold=ess_threshold)
    with pytest.warns(UserWarning, match="first in the steps 0, 1, and count as 0"):
        last, trace = run()
    assert trace.nan[0] == 2
    assert trace.nan[1] >= 1
    assert set(np.asarray(last.state)[np.asarray(last.log_w) > -np.inf]) <= {0.0, 2.0, 5.0}
    if ess_threshold == 0:
        np.testing.assert_array_equal(trace.nan, [2, 1, 0])
        np.testing.assert_allclose(last.log_z, np.log(3 / 6), rtol=1e-6)


def test_conditional_runs_keep_what_a_start_knows_of_its_normaliser():
    start = smc.begin(jnp.zeros(5), jnp.log(jnp.arange(1.0, 6)))
    start = start._replace(log_z=start.log_z + 5.0)
    path = smc.Path(jnp.zeros(3), jnp.array([np.log(3.0), 0, 0]))
    still = lambda key, x, k: (x, jnp.zeros(5))  # noqa: E731
    last, _ = smc.conditional(jax.random.key(0), still, start, jnp.zeros(2), path)
    np.testing.assert_allclose(last.log_z, 5 + np.log((3 + 2 + 3 + 4 + 5) / 5), rtol=1e-6)


def test_a_population_without_weight_is_an_error_and_inside_jit_a_flag():
    def dying(key, x, k):
        return x, jnp.where(k == 1, -jnp.inf, 0.0) + jnp.zeros(4)

    run = functools.partial(smc.run, jax.random.key(0), dying, smc.begin(jnp.zeros(4)), jnp.arange(4))
    with pytest.raises(ValueError, match="all weights are 0 after step 1: no particle can be where the target is"):
        run()
    last, trace = jax.jit(run)()
    np.testing.assert_array_equal(trace.alive, [True, False, False, False])
    assert last.log_z == -np.inf
    assert not np.isnan(trace.log_z).any()
    assert not np.isnan(trace.ess).any()
    assert smc.effective_sample_size(last.log_w) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smc.begin(jnp.zeros((0, 3))), "at least one particle in front"),
        (lambda: smc.begin((jnp.zeros(3), jnp.zeros(4))), "state must have one axis"),
        (lambda: smc.begin(jnp.zeros(())), "state must have one axis"),
        (lambda: smc.begin(jnp.zeros(3), jnp.zeros(4)), r"log_w must have shape \(3,\), a weight for each particle"),
        (lambda: smc.begin(jnp.zeros(3), jnp.zeros(3, int)), "log_w must be of a floating type"),
        (
            lambda: smc.run(jax.random.key(0), propose, smc.begin(jnp.zeros(6)), jnp.zeros(2), islands=4),
            "islands must divide the 6 particles, got 4",
        ),
        (
            lambda: smc.run(jax.random.key(0), propose, smc.begin(jnp.zeros(3)), ()),
            "inputs must hold arrays with one axis of steps in front, got the axes of none",
        ),
        (
            lambda: smc.run(jax.random.key(0), propose, smc.begin(jnp.zeros(3)), [1, 2, 3]),
            "inputs must hold arrays with one axis of steps in front",
        ),
        (
            lambda: smc.run(jax.random.key(0), propose, smc.begin(jnp.zeros(3)), (jnp.zeros(2), jnp.zeros(3))),
            "inputs must hold arrays with one axis of steps in front",
        ),
        (
            lambda: smc.run(jax.random.key(0), steppers.ddim(COSINE), smc.begin(jnp.zeros(3)), jnp.zeros(2)),
            "propose must be a function .* got Stepper; the steps of a deterministic solver have no density",
        ),
        (
            lambda: smc.run(jax.random.key(0), lambda k, x, i: (x, 0.0), smc.begin(jnp.zeros(3)), jnp.zeros(2)),
            r"propose must return a log weight for each of 3 particles, got \(\)",
        ),
        (
            lambda: smc.run(jax.random.key(0), lambda k, x, i: (x[:2], x), smc.begin(jnp.zeros(3)), jnp.zeros(2)),
            "propose must return a state as it was given",
        ),
        (
            lambda: smc.conditional(
                jax.random.key(0), propose, smc.begin(jnp.zeros(3)), jnp.zeros(2), smc.Path(jnp.zeros(2), jnp.zeros(2))
            ),
            "reference must have 3 states and weights",
        ),
        (
            lambda: smc.waste_free(jax.random.key(0), None, None, smc.begin(jnp.zeros(6)), jnp.zeros(2), chains=4),
            "chains must divide the 6 particles, got 4",
        ),
    ],
)
def test_what_cannot_run_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

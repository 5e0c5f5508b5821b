"""The step does what the optimiser says, skips what is not finite, and the loop stops and resumes where it should."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esscher.core import sweeps, training

HYPER = {"lr": jnp.asarray(0.1), "ema_decay": jnp.asarray(0.5)}


def quadratic(params, key, batch, hyper):
    return 0.5 * jnp.sum((params["x"] - batch) ** 2), {"distance": jnp.abs(params["x"] - batch).max()}


def optimizer(hyper):
    return optax.sgd(hyper["lr"])


def start(x=(1.0, -2.0)):
    return training.init({"x": jnp.array(x)}, optimizer(HYPER))


def stepper(loss=quadratic):
    return jax.jit(lambda state, batch: training.make_step(loss, optimizer)(state, jax.random.key(0), batch, HYPER))


def test_gradient_descent_on_a_quadratic_is_geometric():
    state, step = start(), stepper()
    for _ in range(5):
        state, metrics = step(state, jnp.zeros(2))
    np.testing.assert_allclose(state.params["x"], 0.9**5 * np.array([1.0, -2.0]), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 0.5 * 5 * 0.9**8, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(5) * 0.9**4, rtol=1e-5)


def test_the_moving_average_warms_up_and_then_keeps_its_decay():
    state, step, expected = start((1.0,)), stepper(), 1.0
    for n in range(20):
        state, _ = step(state, jnp.zeros(1))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * 0.9 ** (n + 1)
    np.testing.assert_allclose(state.ema["x"][0], expected, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_only_the_counters():
    step = stepper()
    before, _ = step(start(), jnp.zeros(2))
    after, _ = step(before, jnp.array([0.0, jnp.nan]))
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.skipped), int(after.last_skipped)) == (2, 1, 1)


def test_each_step_has_its_own_key_and_a_resumed_one_the_same():
    def noisy(params, key, batch, hyper):
        return jnp.sum(params["x"] * jax.random.normal(key, (2,))), {"draw": jax.random.normal(key)}

    step, state = stepper(noisy), start()
    state, first = step(state, None)
    _, second = step(state, None)
    _, again = step(state, None)
    assert first["draw"] != second["draw"] == again["draw"]


def test_members_of_a_sweep_skip_on_their_own():
    sweep = sweeps.Sweep({"lr": jnp.array([0.1, jnp.inf]), "ema_decay": jnp.array([0.5, 0.5])}, ("a", "b"))
    step = sweeps.lift(training.make_step(quadratic, optimizer), sweep, (0, None, None, 0))
    states = jax.vmap(lambda _: start())(jnp.arange(2))
    for _ in range(3):
        states, _ = step(states, jax.random.key(0), jnp.ones(2), sweep.values)
    assert states.skipped.tolist() == [0, 3]
    np.testing.assert_array_equal(states.params["x"][1], [1.0, -2.0])  # as far as it came with finite updates
    np.testing.assert_allclose(states.params["x"][0], 1 + 0.9**3 * np.array([0.0, -3.0]), rtol=1e-6)


def fit(state, batches=None, stop=lambda: False, **options):
    events = []
    outcome = training.fit(
        state,
        stepper(),
        iter(batches if batches is not None else [jnp.zeros(2)] * 99),
        **{"steps": 7, "every": 2, "save_every": 4} | options,
        report=lambda n, metrics: events.append(("report", n, float(metrics["loss"]))),
        save=lambda n, state: events.append(("save", n, int(state.step))),
        stop=stop,
    )
    return outcome, events


def test_the_loop_reports_window_means_and_saves_on_time_and_at_the_end():
    outcome, events = fit(start())
    losses = 2.5 * 0.81 ** np.arange(7)
    assert [(kind, n) for kind, n, _ in events] == [
        ("report", 2), ("report", 4), ("save", 4), ("report", 6), ("report", 7), ("save", 7),
    ]  # fmt: skip
    reported = [value for kind, _, value in events if kind == "report"]
    expected = [losses[:2].mean(), losses[2:4].mean(), losses[4:6].mean(), losses[6]]
    np.testing.assert_allclose(reported, expected, rtol=1e-5)
    assert (outcome.reason, int(outcome.state.step)) == ("done", 7)


def test_a_stopped_and_resumed_run_ends_bitwise_where_an_uninterrupted_one_does():
    whole, _ = fit(start())
    half, events = fit(start(), stop=lambda: True)
    assert (half.reason, events[-1]) == ("interrupted", ("save", 2, 2))
    resumed, _ = fit(half.state)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


def test_a_run_that_only_skips_has_diverged_and_is_not_saved():
    outcome, events = fit(start(), [jnp.full(2, jnp.nan)] * 99, skip_limit=3, steps=50)
    assert outcome.reason == "diverged"
    assert int(outcome.state.skipped) == 4
    assert not [event for event in events if event[0] == "save"]


def test_a_run_whose_last_steps_all_fail_has_diverged_however_short_it_is():
    outcome, events = fit(start(), [jnp.zeros(2)] * 5 + [jnp.full(2, jnp.nan)] * 2)
    assert (outcome.reason, int(outcome.state.skipped)) == ("done", 2)  # of 5 and 6, and of 7
    outcome, events = fit(start(), [jnp.zeros(2)] * 4 + [jnp.full(2, jnp.nan)] * 3)
    assert (outcome.reason, int(outcome.state.skipped)) == ("diverged", 3)
    assert [event[:2] for event in events if event[0] == "save"] == [("save", 4)]


def test_steps_that_fail_now_and_then_are_no_divergence():
    batches = [jnp.full(2, jnp.nan if i % 4 == 3 else 0.0) for i in range(40)]
    outcome, _ = fit(start(), batches, skip_limit=3, steps=40)
    assert (outcome.reason, int(outcome.state.skipped)) == ("done", 10)


def test_a_request_to_stop_in_the_last_steps_is_heard():
    outcome, events = fit(start(), stop=lambda: True, steps=2)
    assert (outcome.reason, events[-1]) == ("interrupted", ("save", 2, 2))


@pytest.mark.parametrize(("dtype", "size"), [("float16", 4096), ("bfloat16", 4096)])
def test_in_half_precision_norms_do_not_overflow_and_the_average_still_moves(dtype, size):
    def linear(params, key, batch, hyper):
        return 20 * params["x"].astype(jnp.float32).sum(), {}

    step = jax.jit(lambda state: training.make_step(linear, optimizer)(state, jax.random.key(0), None, slow))
    slow = {"lr": jnp.asarray(1e-3, dtype), "ema_decay": jnp.asarray(0.9)}
    state = training.init({"x": jnp.zeros(size, dtype)}, optimizer(slow))
    expected, x = 0.0, 0.0
    for n in range(10):
        state, metrics = step(state)
        decay, x = min(0.9, (1 + n) / (10 + n)), float(state.params["x"][0])
        expected = decay * expected + (1 - decay) * x
    assert int(state.skipped) == 0
    assert state.params["x"].dtype == dtype
    np.testing.assert_allclose(metrics["grad_norm"], 20 * size**0.5, rtol=1e-3)
    np.testing.assert_allclose(state.ema["x"], expected, rtol=1e-2)  # XLA may round the parameters later than we do


def test_checkpoints_fall_on_reports():
    with pytest.raises(ValueError, match="save_every must be a multiple of every=2, got 3"):
        fit(start(), save_every=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with training.stop_requested() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_no_stop_is_ever_asked_for():
    seen = []

    def listen():
        with training.stop_requested() as stop:
            seen.append(stop())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before

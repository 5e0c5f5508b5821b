"""What every stepper obeys: both ends of every schedule, transformations, precisions, and its number of evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.samplers import guidance, integrate, steppers

EDM, COSINE, VP, FLOW = schedules.edm(), schedules.cosine(), schedules.vp_linear(), schedules.rectified_flow()

DETERMINISTIC = {
    "euler": steppers.euler,
    "heun": steppers.heun,
    "ddim": steppers.ddim,
    "dpm_solver_2": steppers.dpm_solver_2,
    "dpm_solver_3": steppers.dpm_solver_3,
    "dpm_solver_pp_2m": steppers.dpm_solver_pp_2m,
    "unipc": lambda schedule: steppers.unipc(schedule, 3),
}
STOCHASTIC = {
    "ancestral": steppers.ancestral,
    "edm_stochastic": lambda schedule: steppers.edm_stochastic(schedule, 12),
    "sde_dpm_solver_pp_2m": steppers.sde_dpm_solver_pp_2m,
}
STEPPERS = DETERMINISTIC | STOCHASTIC
each_stepper = pytest.mark.parametrize("name", STEPPERS)
key = jax.random.key
SCHEDULES = (EDM, COSINE, VP, FLOW)


def chosen(index):
    """The schedule that a traced index picks, so that one compilation serves all."""
    fields = zip(*(schedule[:-1] for schedule in SCHEDULES), strict=True)
    pick = lambda field: lambda t: jax.lax.select_n(index, *(f(t) for f in field))  # noqa: E731
    return schedules.Schedule(*map(pick, fields), t_max=1.0)


@each_stepper
def test_paths_from_pure_noise_to_data_end_near_the_data(line, name):
    """In single precision, on the usual grids: all end at sigma = 0, cosine's and the flow's begin at alpha = 0."""

    @jax.jit
    def run(index, x, times):
        return integrate(key(0), STEPPERS[name](chosen(index)), line.predictor(chosen(index)), x, times)

    for index, schedule in enumerate(SCHEDULES):
        if name == "edm_stochastic" and schedule is not EDM:
            continue  # made for noise levels as times
        times = schedules.edm_times(20) if schedule is EDM else schedules.uniform_times(20)
        x = jnp.linspace(-1.5, 1.5, 7)[:, None] * schedule.sigma(times[0])
        end = run(index, x, times)
        if name in STOCHASTIC:
            assert np.all(np.abs(end) < 4)
            continue
        worst = float(np.abs(end - line.flow(schedule, x, times[0], 0.0)).max())
        assert worst < (0.4 if name in ("euler", "ddim") else 0.2), (index, worst)


@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "sde_dpm_solver_pp_2m", "unipc"])
def test_a_step_from_pure_noise_leaves_no_history(x64, name):
    """After a step from `alpha = 0`, whose `lam` is infinite, the next is first order again; the third is not."""
    stepper, first_order = STEPPERS[name](FLOW), (steppers.ancestral if name in STOCHASTIC else steppers.ddim)(FLOW)

    @jax.jit  # the loop is outside, so that the steps share one compilation
    def both(x, carry, t, s):
        data = 0.5 + 0.3 * jnp.tanh(x)
        arguments = key(0), x, Prediction(data, (x - (1 - t) * data) / t), t, s
        return first_order.step(*arguments, (), None)[0], *stepper.step(*arguments, carry, None)

    x, gaps = jnp.array([[-0.9], [1.4]]), []
    carry = stepper.init(x)
    for t, s in ((1.0, 0.7), (0.7, 0.4), (0.4, 0.2)):
        plain, x, carry = both(x, carry, t, s)
        gaps.append(np.abs(x - plain).max())
    assert max(gaps[:2]) < 1e-12
    assert gaps[2] > 1e-3


def differentiable(name, line):
    """A loss of the model, the start and the grid; from `alpha = 0` to `sigma = 0`, or on EDM's noise levels."""
    schedule, times = FLOW, schedules.shift_time(schedules.uniform_times(4).astype(float), 1.7)
    if name == "edm_stochastic":
        schedule, times = EDM, schedules.edm_times(4).astype(float)
    theta = {"means": line.means, "x": schedule.sigma(times[0]) * jnp.array([[-0.9], [1.4]]), "times": times}

    return lambda theta: path_loss(name, line, schedule, theta), theta


def path_loss(name, line, schedule, theta):
    """Of the end of a path, from the means of the law, the start and the grid in `theta`."""
    law = line._replace(means=theta["means"])
    x = integrate(key(0), STEPPERS[name](schedule), law.predictor(schedule), theta["x"], theta["times"])
    return jnp.sum(jnp.sin(2 * x))


@each_stepper
def test_gradients_agree_with_finite_differences_and_eager_with_jit(x64, line, name):
    """With respect to the model, the start and the inner times at once; finite for the ends of the grid too."""
    check_gradient(*differentiable(name, line))


@pytest.mark.parametrize("name", [name for name in STEPPERS if name != "edm_stochastic"])  # its times are noise levels
def test_gradients_in_the_schedules_own_parameters_agree_with_finite_differences(x64, line, name):
    """Under the schedule whose `sigma` has an infinite derivative in time where the grid ends."""

    def loss(theta):
        schedule = schedules.vp_linear(theta["beta_min"], theta["beta_max"])
        return path_loss(name, line, schedule, theta)

    times = schedules.uniform_times(5, 1, 0).astype(float)
    theta = {"means": line.means, "x": jnp.array([[-0.9], [1.4]]), "times": times, "beta_min": 0.1, "beta_max": 20.0}
    check_gradient(loss, theta | {name: jnp.asarray(theta[name]) for name in ("beta_min", "beta_max")})


def check_gradient(loss, theta):
    """The gradient is finite, and along one direction in all of `theta` it is the finite difference; eager is jit."""
    inner = 0.3 * jnp.sin(jnp.arange(theta["times"].size)).at[jnp.array([0, -1])].set(0.0)
    direction = {
        "means": jnp.array([0.7, -0.4]),
        "x": theta["times"][0] * jnp.array([[1.0], [-0.5]]),
        "times": theta["times"] * inner,
        "beta_min": 0.2,
        "beta_max": -3.0,
    }
    direction = {part: direction[part] for part in theta}
    compiled = jax.jit(loss)
    up, down = (compiled(jax.tree.map(lambda a, b: a + size * b, theta, direction)) for size in (1e-5, -1e-5))
    with jax.disable_jit():
        eager, gradient = jax.value_and_grad(loss)(theta)
    np.testing.assert_allclose(eager, compiled(theta), rtol=1e-10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    along = sum(jnp.sum(gradient[part] * direction[part]) for part in theta)
    np.testing.assert_allclose(along, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_2"])
def test_under_vmap_over_grids_the_branch_not_taken_does_no_harm(x64, line, name):
    """There every `cond` computes both branches, and a NaN in one would poison the gradients of the other."""
    loss, theta = differentiable(name, line)
    grids = jnp.stack([theta["times"], theta["times"] * jnp.array([1.0, 0.9, 0.9, 0.9, 1.0])])
    run = jax.value_and_grad(lambda times: loss(theta | {"times": times}))
    values, gradients = jax.jit(jax.vmap(run))(grids)
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(values, [jax.jit(loss)(theta | {"times": times}) for times in grids], rtol=1e-9)


def toward(point, spread=0.3):
    """A plain predictor that is cheap to compile: its data term is a point, and a little of the state."""

    def predict(x, t):
        data = point + spread * jnp.tanh(x)
        return Prediction(data, (x - data) / t[:, None])

    return predict


HYPERPARAMETERS = {
    "ddim": lambda h: steppers.ddim(EDM, eta=h),
    "edm_stochastic_churn": lambda h: steppers.edm_stochastic(EDM, 3, 3 * h, 0.5 * h, 40 + h, 1 + 0.1 * h),
    "dpm_solver_2": lambda h: steppers.dpm_solver_2(EDM, r1=0.3 + 0.5 * h),
    "dpm_solver_3": lambda h: steppers.dpm_solver_3(EDM, r1=0.2 + 0.3 * h, r2=0.7),
}
GUIDANCE = {
    "cfg": lambda c, u, h: guidance.cfg(c, u, 3 * h),
    "interval": lambda c, u, h: guidance.cfg(c, u, guidance.interval(2 * h, h, 1 + h)),
    "cfg_plus_plus": lambda c, u, h: guidance.cfg_plus_plus(c, u, h),
    "mix": lambda c, u, h: guidance.mix((u, c, toward(2.0)), (h, -0.5 * h)),
    "rescale": lambda c, u, h: guidance.rescale(toward(0.0, 0.9), toward(0.0, 0.4), h, EDM),  # of unlike contrast
    "classifier": lambda c, u, h: guidance.classifier(u, lambda x, t: -jnp.sum(x**2, -1), h, EDM),
}


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, *GUIDANCE])
def test_a_float_hyperparameter_is_traced_and_vmapped(name):
    """One compilation serves all values, and vmap over them equals the loop."""
    cond, uncond = toward(1.0), toward(-0.5)
    values, x = jnp.array([0.2, 0.5, 1.0]), jnp.array([[-1.0, 0.4], [3.0, -2.0]])
    traces = []

    def run(h):
        traces.append(h)
        stepper = HYPERPARAMETERS[name](h) if name in HYPERPARAMETERS else steppers.ddim(EDM)
        predictor = GUIDANCE[name](cond, uncond, h) if name in GUIDANCE else uncond
        return integrate(key(1), stepper, predictor, x, jnp.array([3.0, 1.2, 0.4, 0.0]))

    compiled = jax.jit(run)
    loop = jnp.stack([compiled(h) for h in values])
    assert len(traces) == 1
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(values), loop, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(np.diff(loop, axis=0)).max(axis=(1, 2)) > 1e-4)


EVALUATIONS = {  # in an inner step, and in the last step to sigma = 0
    "heun": (2, 1),
    "dpm_solver_2": (2, 1),
    "dpm_solver_3": (3, 1),
    "edm_stochastic": (3, 2),
}


@each_stepper
def test_evaluations_are_as_documented(line, name):
    """Counted without compilation, which drops the first evaluation of `edm_stochastic`, as the next test shows."""
    times, calls = schedules.edm_times(3), []

    def counted(x, t):
        calls.append(t)
        return line.predictor(EDM)(x, t)

    with jax.disable_jit():
        integrate(key(0), STEPPERS[name](EDM), counted, jnp.ones((2, 1)), times)
    inner, last = EVALUATIONS.get(name, (1, 1))
    assert len(calls) == 2 * inner + last


def test_an_evaluation_that_is_not_used_is_not_made(line):
    calls = []

    def counted(x, t):
        out = line.predictor(EDM)(x, t)
        # A pure callback may be dropped with the evaluation it belongs to.
        zero = jax.pure_callback(lambda _: (calls.append(1), np.float32(0))[1], jax.ShapeDtypeStruct((), x.dtype), t[0])
        return Prediction(out.data + zero, out.noise + zero)

    times, stepper = schedules.edm_times(4), steppers.edm_stochastic(EDM, 4)
    integrate(key(0), stepper, counted, jnp.ones((2, 1)), times).block_until_ready()
    assert len(calls) == 3 * 2 + 1


@pytest.mark.parametrize("name", ["dpm_solver_3", "unipc"])
def test_bfloat16_states_stay_near_float32_and_keep_their_type(line, name):
    """Within 3% of the data's scale, twelve steps from sigma = 3 down: rounding is 0.4% a step, and contracts."""
    x, times = jnp.linspace(-3, 3, 7)[:, None], schedules.edm_times(12, sigma_max=3.0)
    run = jax.jit(lambda x: integrate(key(0), DETERMINISTIC[name](EDM), line.predictor(EDM), x, times))
    short = run(x.astype(jnp.bfloat16))
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(short.astype(jnp.float32), run(x), atol=0.03 * 1.5)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp_2m", "unipc"])
def test_the_batch_may_be_permuted_and_sharded(line, name):
    """Over eight devices in `shard_map`, where branches, histories and scalars must vary as they should."""
    x, times = jnp.linspace(-1.5, 1.5, 8)[:, None], schedules.uniform_times(4)
    run = lambda x: integrate(key(0), STEPPERS[name](FLOW), line.predictor(FLOW), x, times)  # noqa: E731
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))
    compiled = jax.jit(run)
    np.testing.assert_allclose(compiled(x[::-1]), compiled(x)[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sharded(x), compiled(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_key_decides_the_sample(line, name):
    x, times = jnp.ones((4, 1)), schedules.edm_times(3, sigma_max=2.0)
    run = jax.jit(lambda key: integrate(key, STEPPERS[name](EDM), line.predictor(EDM), x, times))
    np.testing.assert_array_equal(run(key(0)), run(key(0)))
    assert np.abs(run(key(0)) - run(key(1))).min() > 0
    assert np.unique(run(key(0))).size == 4  # each example has noise of its own

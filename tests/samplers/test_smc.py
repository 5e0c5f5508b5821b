"""The engine against a Kalman filter and an enumerated language model; islands, paths and chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esscher.core import meshes
from esscher.core.exact.tabular_lm import golden_testbed
from esscher.samplers import resampling, smc

pytestmark = pytest.mark.usefixtures("compile_quickly")

PERSISTENCE, NOISE, SENSOR = 0.9, 0.5, 0.4
OBSERVED = np.random.default_rng(0).normal(0, 0.8, 10).astype(np.float32)


def propose(key, x, y):
    """The bootstrap filter of a linear-Gaussian model."""
    x = PERSISTENCE * x + NOISE * jax.random.normal(key, x.shape)
    return x, -0.5 * jnp.log(2 * jnp.pi * SENSOR**2) - 0.5 * jnp.square((y - x) / SENSOR)


def kalman():
    """Log-likelihood, and mean and covariance of the whole path given all observations, start included."""
    steps = len(OBSERVED)
    transition = np.array([PERSISTENCE ** np.arange(k, k - steps - 1, -1) for k in range(steps + 1)])
    lower = np.where(np.arange(steps + 1)[:, None] >= np.arange(steps + 1), transition, 0)
    prior = lower @ np.diag([1.0, *[NOISE**2] * steps]) @ lower.T
    seen = np.eye(steps + 1)[1:]
    innovation = seen @ prior @ seen.T + SENSOR**2 * np.eye(steps)
    gain = prior @ seen.T @ np.linalg.inv(innovation)
    fit = -0.5 * (OBSERVED @ np.linalg.solve(innovation, OBSERVED) + np.linalg.slogdet(2 * np.pi * innovation)[1])
    return fit, gain @ OBSERVED, prior - gain @ seen @ prior


def filtered(key, particles, **options):
    start_key, key = jax.random.split(key)
    start = smc.begin(jax.random.normal(start_key, (particles,)))
    return smc.run(key, propose, start, jnp.asarray(OBSERVED), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"islands": 8},
        {"resample": resampling.multinomial, "ess_threshold": 1.0},
        {"resample": resampling.residual, "ess_threshold": 0.9},
        {"resample": resampling.stratified, "ess_threshold": 0.9, "islands": 2},
    ],
    ids=["default", "islands", "multinomial", "residual", "stratified islands"],
)
def test_the_likelihood_is_unbiased_and_the_mean_is_that_of_the_kalman_filter(options):
    """On the scale of `z`, within 4.5 standard errors (false alarms 1e-5), over 4,000 independent runs of one vmap."""
    fit, mean, _ = kalman()

    def one(key):
        last, trace = filtered(key, 64, **options)
        return last.log_z, jnp.sum(jax.nn.softmax(last.log_w) * last.state), trace

    log_z, found, trace = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    ratio = np.exp(np.asarray(log_z, np.float64) - fit)
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4.5 * error
    # E[z sum W f] is exact too; divided by z it is the filter's mean.
    gap = ratio * (np.asarray(found) - mean[-1])
    assert abs(gap.mean()) < 4.5 * gap.std() / len(gap) ** 0.5
    np.testing.assert_allclose(trace.log_z[:, -1], log_z)
    assert 0.3 < np.mean(trace.resampled) <= 1
    assert np.all(trace.alive)
    assert not np.any(trace.nan)
    assert np.all((trace.ess > 1 - 1e-5) & (trace.ess < 64 * (1 + 1e-5)))


def test_without_resampling_it_is_importance_sampling():
    key = jax.random.key(1)
    last, trace = filtered(key, 50, ess_threshold=0.0, history=True)
    weights = trace.history.log_w.sum(0)
    np.testing.assert_allclose(last.log_w, weights, rtol=1e-5)
    np.testing.assert_allclose(last.log_z, jax.nn.logsumexp(weights) - np.log(50), rtol=1e-5)
    np.testing.assert_array_equal(trace.history.ancestors, np.broadcast_to(np.arange(50), (10, 50)))
    assert not trace.resampled.any()
    np.testing.assert_allclose(trace.ess[-1], np.exp(weights).sum() ** 2 / np.exp(2 * weights).sum(), rtol=1e-4)


def test_a_large_population_reaches_the_posterior_and_one_program_serves_all_thresholds():
    """Standard errors: 0.014 of `log_z` (0.54 with 64 particles, by the test above), 0.003 of the moments."""
    fit, mean, covariance = kalman()
    traces = []

    @jax.jit
    def run(key, threshold):
        traces.append(None)
        return filtered(key, 100_000, ess_threshold=threshold)

    for threshold in (0.3, 0.8):
        last, _ = run(jax.random.key(2), threshold)
        weights = np.asarray(jax.nn.softmax(last.log_w), np.float64)
        found = weights @ np.asarray(last.state)
        assert abs(float(last.log_z) - fit) < 4.5 * 0.014
        assert abs(found - mean[-1]) < 4.5 * 0.003
        assert abs(weights @ (np.asarray(last.state) - found) ** 2 - covariance[-1, -1]) < 4.5 * 0.003
    assert len(traces) == 1


# --- language models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tabular():
    return *golden_testbed(), 0.5


def language(lm, reward, beta, twists):
    """Start and `propose` that append a token by the model's law times the twist, weighted by its normaliser."""
    model = lm.language_model()
    twists = [jnp.asarray(twist) for twist in twists]

    def law(logits, codes, depth):
        children = codes[:, None] * lm.vocabulary + jnp.arange(lm.vocabulary)
        after = jnp.stack([twist[jnp.minimum(children, len(twist) - 1)] for twist in twists[1:]])[depth]
        before = jnp.stack([twist[jnp.minimum(codes, len(twist) - 1)] for twist in twists[:-1]])[depth]
        scores = jax.nn.log_softmax(logits) + after
        return scores, jax.nn.logsumexp(scores, -1) - before

    def start(n):
        prompt = jnp.zeros((n, 0), jnp.int32)
        logits, cache = model.init(prompt, jnp.ones((n, 0)))
        return smc.begin((logits, cache, jnp.zeros(n, jnp.int32)), jnp.full(n, twists[0][0]))

    def propose(key, state, depth):
        logits, cache, codes = state
        scores, gained = law(logits, codes, depth)
        token = jax.random.categorical(key, scores)
        logits, cache = model.step(cache, token)
        return (logits, cache, codes * lm.vocabulary + token), gained

    return start, propose, jnp.arange(lm.horizon)


@pytest.mark.parametrize("kind", ["optimal", "none", "wrong"])
def test_strings_of_a_language_model_are_properly_weighted_cell_by_cell(tabular, kind):
    """`E[w 1{x = c}] = p(c) exp(r(c) / beta)` for each of the 81 strings, by the engine that diffusion runs on.

    Within 5 standard errors each. With the optimal twist all weights are Z, whatever is drawn.
    """
    lm, reward, beta = tabular
    exact = lm.soft_values(reward, beta)
    twists = {
        "optimal": exact,
        "none": [*(jnp.zeros_like(x) for x in exact[:-1]), exact[-1]],
        "wrong": [0.0 * exact[0], *(x + 0.8 * jnp.sin(3.0 * jnp.arange(len(x))) for x in exact[1:-1]), exact[-1]],
    }[kind]
    start, step, depths = language(lm, reward, beta, twists)

    def one(key):
        last, trace = smc.run(key, step, start(16), depths, ess_threshold=0.999)
        # The weight of a particle, resampling included: its share of z.
        z = jnp.exp(last.log_z) * jax.nn.softmax(last.log_w)
        return jnp.zeros(81).at[last.state[2]].add(z), last.log_z, trace.resampled.mean()

    cells, log_z, resampled = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 4000))
    cells = np.asarray(cells, np.float64)
    expected = np.exp(np.asarray(lm.sequence_log_probs() + reward / beta))
    error = np.maximum(cells.std(0) / len(cells) ** 0.5, 1e-4)
    assert np.all(np.abs(cells.mean(0) - expected) < 5 * error)
    exact_log_z = float(lm.log_z(reward, beta))
    if kind == "optimal":
        np.testing.assert_allclose(log_z, exact_log_z, rtol=1e-5)
        assert resampled.max() == 0
    else:
        assert (resampled.mean() > 0.2) == (kind == "wrong")  # without twists the weights come at the end
        assert abs(np.exp(np.asarray(log_z) - exact_log_z).mean() - 1) < 0.02


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("islands", [1, 8])
def test_particles_over_devices_are_those_of_one_device(islands):
    mesh = meshes.make(data=8)
    where = NamedSharding(mesh, PartitionSpec("data"))
    start = smc.begin(jax.random.normal(jax.random.key(4), (1024,)))
    run = lambda start: smc.run(jax.random.key(5), propose, start, jnp.asarray(OBSERVED), islands=islands)  # noqa: E731
    last, trace = jax.jit(run)(start)
    spread = smc.Particles(*jax.device_put(tuple(start[:2]), where), start.log_z)
    again, told = jax.jit(run)(spread)
    np.testing.assert_allclose(again.log_z, last.log_z, rtol=1e-5)
    np.testing.assert_allclose(np.sort(again.state), np.sort(last.state), atol=1e-4)
    np.testing.assert_allclose(told.ess, trace.ess, rtol=1e-3)


# --- paths ------------------------------------------------------------------------------------------------------------


def test_paths_follow_the_ancestors_and_a_path_knows_its_weights():
    last, trace = filtered(jax.random.key(6), 20, history=True)
    found, history = np.asarray(smc.paths(trace.history)), trace.history
    np.testing.assert_array_equal(found[-1], last.state)
    for particle in range(20):
        index = particle
        for step in range(9, -1, -1):
            index = int(history.ancestors[step, index])
            assert found[step, particle] == history.states[step, index]
    path = smc.sample_path(jax.random.key(7), last, history)
    assert any(np.array_equal(path.states, found[:, particle]) for particle in range(20))
    expected = [-0.5 * np.log(2 * np.pi * SENSOR**2) - 0.5 * ((OBSERVED - path.states[1:]) / SENSOR) ** 2]
    np.testing.assert_allclose(path.log_w, np.concatenate([[0.0], *expected]), rtol=1e-4, atol=1e-5)


def test_conditional_runs_are_the_kernel_of_particle_gibbs():
    """With five particles, of which plain SMC would be far off, chains of paths have the smoother's moments."""
    _, mean, covariance = kalman()

    def sweep(path, key):
        keys = jax.random.split(key, 3)
        start = smc.begin(jax.random.normal(keys[0], (5,)))
        last, trace = smc.conditional(keys[1], propose, start, jnp.asarray(OBSERVED), path)
        kept = jnp.all(smc.paths(trace.history)[:, 0] == path.states)
        path = smc.sample_path(keys[2], last, trace.history)
        return path, (path.states, kept)

    def chain(key):
        first, rest = jax.random.split(key)
        path = smc.Path(jax.random.normal(first, (11,)), jnp.zeros(11))
        _, weights = propose(first, path.states[1:], jnp.asarray(OBSERVED))  # of the right shape; forgotten soon
        return jax.lax.scan(sweep, path._replace(log_w=path.log_w.at[1:].set(weights)), jax.random.split(rest, 120))[1]

    states, kept = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(8), 400))
    assert np.all(kept)
    states = np.asarray(states[:, 60:], np.float64)
    averages = states.mean(1)
    error = averages.std(0) / len(averages) ** 0.5
    assert np.all(np.abs(averages.mean(0) - mean) < 4.5 * error)
    assert np.all(error < 0.03)
    np.testing.assert_allclose(np.cov(states.reshape(-1, 11).T), covariance, atol=0.02)


# --- chains -----------------------------------------------------------------------------------------------------------


def test_waste_free_chains_find_the_normaliser_of_a_tempered_target():
    """From N(0, 3^2) to the square of N(1, .5^2) + N(-2, .3^2), by Metropolis moves; `z` is unbiased."""

    def log_prior(x):
        return -0.5 * jnp.square(x / 3) - jnp.log(3 * jnp.sqrt(2 * jnp.pi))

    def log_target(x):
        modes = jnp.stack([-0.5 * jnp.square((x - 1) / 0.5), -0.5 * jnp.square((x + 2) / 0.3)])
        return 2 * jax.nn.logsumexp(modes, axis=0)

    def at(x, level):
        return (1 - level) * log_prior(x) + level * log_target(x)

    def move(key, x, levels):
        step_key, accept_key = jax.random.split(key)
        new = x + jax.random.normal(step_key, x.shape)
        accepted = jnp.log(jax.random.uniform(accept_key, x.shape)) < at(new, levels[0]) - at(x, levels[0])
        return jnp.where(accepted, new, x)

    def reweigh(x, levels):
        return at(x, levels[1]) - at(x, levels[0])

    levels = jnp.linspace(0, 1, 9)
    pairs = jnp.stack([levels[:-1], levels[1:]], 1)

    def one(key):
        start_key, key = jax.random.split(key)
        start = smc.begin(3 * jax.random.normal(start_key, (200,)))
        last, trace = smc.waste_free(key, move, reweigh, start, pairs, chains=20)
        return last.log_z, jnp.sum(jax.nn.softmax(last.log_w) * last.state), trace.resampled

    log_z, mean, resampled = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(9), 2000))
    assert np.all(resampled == 1)
    x = np.linspace(-8, 8, 100_001)
    density = np.exp(np.asarray(log_target(jnp.asarray(x)), np.float64))
    z = density.sum() * (x[1] - x[0])
    ratio = np.exp(np.asarray(log_z, np.float64)) / z
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4.5 * error
    gap = ratio * (np.asarray(mean) - density @ x / density.sum())
    assert abs(gap.mean()) < 4.5 * gap.std() / len(gap) ** 0.5


def test_particles_may_be_any_pytree_and_keep_their_types():
    def step(key, state, k):
        return {"n": state["n"] + 1.7, "x": state["x"] * 2}, jnp.zeros(4)

    start = smc.begin({"n": jnp.zeros((4, 2), jnp.int32), "x": jnp.ones(4, jnp.bfloat16)})
    last, _ = smc.run(jax.random.key(0), step, start, {"k": jnp.arange(3)})
    assert last.state["n"].dtype == jnp.int32
    assert last.state["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(last.state["x"], 8)

"""Discrete samplers against the enumerated laws of a table of strings, the law of each finite-step chain included."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import categorical
from esscher.core.contracts import ReverseKernel
from esscher.core.exact import masked
from esscher.objectives.policy.diffusion import chain_logps
from esscher.samplers import smc
from esscher.samplers.diffusion import discrete, steering, svdd

pytestmark = pytest.mark.usefixtures("x64", "compile_quickly")

V, L, MASK = 2, 3, 2
P = np.array([0.3, 0.02, 0.05, 0.1, 0.03, 0.15, 0.01, 0.34])
LOG_P = np.log(P)
STRINGS, STATES, TOKENS = masked.states(V, L), masked.states(V + 1, L), masked.states(V, L)
CLEAN = np.all(STATES != MASK, axis=1)  # those in the order of the strings
START = np.where(np.all(STATES == MASK, axis=1), 0.0, -np.inf)
ALPHA, LOG_REWARD = categorical.linear_alpha, np.array([0.0, 1.5, -1.0, 0.5, 2.0, -0.5, 1.0, -1.5])
code = lambda x: x @ jnp.array([4, 2, 1])  # noqa: E731
transition = jax.jit(masked.transition, static_argnums=0)
reward = lambda x: jnp.asarray(LOG_REWARD)[code(x)]  # noqa: E731


def denoiser(x, t, log_p=LOG_P):
    return masked.conditionals(jnp.asarray(log_p), x)


def sigma(t):
    return -jnp.log1p(-0.999 * t)


def log_score(x, t):
    return denoiser(x, t) - jnp.log(jnp.expm1(sigma(t)))[:, None, None]


def uniform_denoiser(x, t):
    seen = categorical.uniform_marginal_logits(x, ALPHA(t), V)
    return categorical.leave_one_out(masked.posterior(jnp.asarray(LOG_P), seen), x, ALPHA(t))


def grid(n, end=0.0):
    return jnp.linspace(1.0, end, n + 1)


def chain(kernel, times, states=STATES, start=START):
    """Laws at each time, `[T + 1, S]`, as probabilities."""
    return np.asarray(jnp.exp(jax.jit(lambda times: masked.chain_law(kernel, states, start, times))(times)))


def distance(law, expected=P):
    return 0.5 * np.abs(np.asarray(law) - expected).sum()


def assert_frequencies(counts, law, n):
    """Within 5 standard errors and 3 counts, for cells of small expectation: false alarms below 1e-5 a cell."""
    assert np.all(np.abs(counts - n * law) <= 5 * np.sqrt(n * law * (1 - law)) + 3 * (law > 0))


MASKED = discrete.masked_kernel(denoiser, ALPHA, MASK)
KERNELS = {
    "masked": (MASKED, STATES),
    "capped": (discrete.masked_kernel(denoiser, ALPHA, MASK, remask=discrete.remask_cap(0.3)), STATES),
    "rescaled": (discrete.masked_kernel(denoiser, ALPHA, MASK, remask=discrete.remask_rescale(0.5)), STATES),
    "uniform": (discrete.uniform_kernel(uniform_denoiser, ALPHA), TOKENS),
    "sedd": (discrete.sedd_kernel(lambda x, t: log_score(x, t) + 0.4, sigma, MASK), STATES),
    "any_order": (discrete.any_order_kernel(denoiser, MASK), STATES),
}


@pytest.mark.parametrize(("kernel", "states"), KERNELS.values(), ids=KERNELS)
def test_the_density_sums_to_one_and_is_that_of_the_samples(kernel, states):
    n, t, s = 4000, 0.7, 0.4
    law = np.exp(transition(kernel, states, t, s))
    np.testing.assert_allclose(law.sum(1), 1, rtol=1e-10)
    draw = jax.jit(lambda key: kernel.sample(key, jnp.repeat(states, n, axis=0), jnp.asarray(t), jnp.asarray(s)))
    drawn = draw(jax.random.key(0))
    assert drawn.dtype == states.dtype
    index = drawn @ (round(len(states) ** (1 / L)) ** jnp.arange(L - 1, -1, -1))
    counts = np.stack([np.bincount(row, minlength=len(states)) for row in np.reshape(index, (-1, n))])
    assert_frequencies(counts, law, n)


# --- laws of chains ---------------------------------------------------------------------------------------------------


def test_the_ancestral_law_is_that_of_independent_tokens_in_one_step_and_the_tables_in_many():
    marginals = np.exp(denoiser(jnp.full((1, L), MASK), None))[0]
    product = np.array([np.prod(marginals[range(L), x]) for x in STRINGS])
    laws = {n: chain(MASKED, grid(n))[-1][CLEAN] for n in (1, 64, 128)}
    np.testing.assert_allclose(laws[1], product, rtol=1e-10)
    errors = {n: distance(law) for n, law in laws.items()}
    assert errors[1] > errors[64] > errors[128] > 0
    assert errors[128] < 0.01
    np.testing.assert_allclose(errors[64] / errors[128], 2, rtol=0.05)  # of first order


def test_one_token_at_a_time_is_exact_and_so_are_the_laws_on_the_way():
    laws = chain(discrete.any_order_kernel(denoiser, MASK), grid(L + 1))
    np.testing.assert_allclose(laws[L][CLEAN], P, rtol=1e-10)
    np.testing.assert_allclose(laws[L + 1], laws[L])  # without masks nothing changes
    evidence = np.exp(masked.log_marginal(LOG_P, STATES))
    for k in range(L + 1):
        hidden = np.sum(STATES == MASK, axis=1) == L - k
        subsets = {0: 1, 1: 3, 2: 3, 3: 1}[k]
        np.testing.assert_allclose(laws[k], np.where(hidden, evidence / subsets, 0), atol=1e-12)


@pytest.mark.parametrize("name", ["masked", "capped", "rescaled"])
def test_positions_are_unmasked_with_probability_alpha_whatever_the_remasking(name):
    times = grid(6)
    laws = chain(KERNELS[name][0], times)
    np.testing.assert_allclose(laws @ (STATES != MASK), np.tile(ALPHA(times)[:, None], L), atol=1e-10)


def test_remasking_that_grows_rare_with_the_steps_costs_no_order_and_a_fixed_share_does():
    at = lambda n, remask: distance(  # noqa: E731
        chain(discrete.masked_kernel(denoiser, ALPHA, MASK, remask=remask), grid(n))[-1][CLEAN]
    )
    rare = {n: at(n, discrete.remask_cap(1.0 / n)) for n in (32, 64)}
    share = {n: at(n, discrete.remask_rescale(0.5)) for n in (32, 64)}
    np.testing.assert_allclose(rare[32] / rare[64], 2, rtol=0.05)
    np.testing.assert_allclose(share[32] / share[64], 1.5, rtol=0.05)
    assert share[64] > 2 * rare[64]
    np.testing.assert_allclose(at(64, discrete.remask_cap(0.0)), distance(chain(MASKED, grid(64))[-1][CLEAN]))


def test_at_the_largest_remasking_a_step_forgets_what_was_unmasked():
    kernel = discrete.masked_kernel(denoiser, ALPHA, MASK, remask=lambda most: 2 * most)  # what is above counts as most
    law = np.exp(transition(kernel, STATES, 0.5, 0.5 - 1e-9))
    every = np.flatnonzero(START == 0)[0]
    hidden = np.all(np.array([0, MASK, MASK]) == STATES, axis=1)
    np.testing.assert_allclose(law[hidden][:, every], 0, atol=1e-8)  # the masked ones are shown, the shown one hidden
    np.testing.assert_allclose(law[hidden][0] @ (STATES != MASK), [0, 1, 1], atol=1e-8)


def test_the_uniform_chain_tends_to_the_table():
    start = np.full(V**L, -L * np.log(V))
    errors = {n: distance(chain(KERNELS["uniform"][0], grid(n), TOKENS, start)[-1]) for n in (32, 64)}
    np.testing.assert_allclose(errors[32] / errors[64], 2, rtol=0.1)
    assert errors[64] < 0.03
    joint = discrete.uniform_kernel(lambda x, t: masked.posterior(LOG_P, jnp.zeros((*x.shape, V))), ALPHA)
    marginals = np.exp(denoiser(jnp.full((1, L), MASK), None))[0]
    product = np.array([np.prod(marginals[range(L), x]) for x in STRINGS])
    np.testing.assert_allclose(chain(joint, grid(5), TOKENS, start)[-1], product, rtol=1e-10)  # exact for one token


def test_the_score_step_with_the_exact_score_is_the_masked_step():
    kernel = discrete.sedd_kernel(log_score, sigma, MASK)
    twin = discrete.masked_kernel(denoiser, lambda t: jnp.exp(-sigma(t)), MASK)
    for t, s in ((1.0, 0.6), (0.6, 0.1), (0.1, 0.0)):
        np.testing.assert_allclose(*(jnp.exp(transition(k, STATES, t, s)) for k in (kernel, twin)), atol=1e-10)
    greedy = discrete.sedd_kernel(lambda x, t: log_score(x, t) + 3.0, sigma, MASK)
    law = np.exp(transition(greedy, STATES, 0.6, 0.1))  # scores too large: what is masked is shown for certain
    np.testing.assert_allclose(law[:, CLEAN].sum(1), 1, rtol=1e-10)


# --- what they serve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4])
def test_twisted_particles_are_properly_weighted_for_the_tilt_of_the_chain(n):
    """`E[z sum W 1{x}] = q(x) exp(r(x))` in every cell, `q` the law of the chain: 4.5 standard errors (6e-5 in all)."""
    start, propose = steering.twisted(MASKED, discrete.fill_in_value(denoiser, reward, MASK))
    times = grid(n)

    def one(key):
        last, _ = smc.run(key, propose, start(jnp.full((8, L), MASK), times[0]), steering.steps(times))
        weights = jnp.exp(last.log_z) * jax.nn.softmax(last.log_w)
        return jnp.zeros(V**L).at[code(last.state[0])].add(weights)

    cells = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(n), 6000)))
    expected = chain(MASKED, times)[-1][CLEAN] * np.exp(LOG_REWARD)
    error = cells.std(0) / len(cells) ** 0.5
    assert np.all(np.abs(cells.mean(0) - expected) < 4.5 * error)
    assert np.all(error < 0.1 * expected + 0.003)
    assert np.sum(np.abs(expected - P * np.exp(LOG_REWARD))) > 50 * error.max() or n == 4


def test_with_the_optimal_twist_and_proposal_one_token_at_a_time_all_weights_stay():
    def twist(x, t):
        return masked.log_marginal(LOG_P + LOG_REWARD, x) - masked.log_marginal(LOG_P, x)

    tilted = lambda x, t: denoiser(x, t, LOG_P + LOG_REWARD)  # noqa: E731
    kernels = [discrete.any_order_kernel(d, MASK) for d in (denoiser, tilted)]
    start, propose = steering.twisted(kernels[0], twist, proposal=kernels[1])
    particles = jax.jit(start)(jnp.full((200, L), MASK), 1.0)
    last, trace = jax.jit(lambda key: smc.run(key, propose, particles, steering.steps(grid(L)), history=True))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(trace.history.log_w[1:], 0, atol=1e-10)
    log_z = np.log(P @ np.exp(LOG_REWARD))
    np.testing.assert_allclose(trace.log_z, log_z, rtol=1e-10)
    np.testing.assert_allclose(particles.log_w, log_z, rtol=1e-10)
    assert not np.any(last.state[0] == MASK)
    wrong = jax.jit(steering.twisted(kernels[0], twist)[1])  # the model's own proposals need weights
    assert np.std(wrong(jax.random.key(0), particles.state, (jnp.asarray(1.0), jnp.asarray(0.5)))[1]) > 0.1


def test_the_law_of_soft_value_decoding_with_two_candidates():
    """Of two independent draws `a, b` one is kept by its weight; enumerated, against 40,000 samples."""
    times, beta = grid(2), 0.7
    value = jax.jit(discrete.fill_in_value(denoiser, reward, MASK))
    law = np.exp(START)
    for t, s in itertools.pairwise(times):
        step, w = np.exp(transition(MASKED, STATES, t, s)), np.exp(np.asarray(value(STATES, s)) / beta)
        kept = 2 * step * np.einsum("xb,ab->xa", step, w[:, None] / (w[:, None] + w))
        law = law @ kept
    np.testing.assert_allclose(law.sum(), 1)
    n, x = 40_000, jnp.full((40_000, L), MASK)
    picked = jax.jit(lambda key: svdd.svdd(key, MASKED, value, x, times, beta, candidates=2))(jax.random.key(0))
    assert_frequencies(np.bincount(code(picked.x), minlength=V**L), law[CLEAN], n)
    assert distance(law[CLEAN], chain(MASKED, times)[-1][CLEAN]) > 0.1


def test_policy_gradients_know_the_log_probability_of_a_chain_and_its_gradient():
    """The states are integers to the kernel; `chain_logps` asks for floats."""
    times, key = jnp.array([1.0, 0.6, 0.2, 0.0]), jax.random.key(0)

    def kernel(log_p):
        plain = discrete.masked_kernel(lambda x, t: masked.conditionals(log_p, x), ALPHA, MASK)
        log_prob = lambda x_s, x, t, s: plain.log_prob(x_s.astype(int), x.astype(int), t, s)  # noqa: E731
        return ReverseKernel(plain.sample, log_prob)

    states, draw = [jnp.full((5, L), MASK)], jax.jit(MASKED.sample)
    for i, (t, s) in enumerate(zip(*steering.steps(times), strict=True)):
        states.append(draw(jax.random.fold_in(key, i), states[-1], t, s))
    total = jax.jit(lambda log_p: chain_logps(kernel(log_p), jnp.stack(states).astype(float), times))
    number = lambda x: np.asarray(x @ jnp.array([9, 3, 1]))  # noqa: E731
    expected = [
        np.asarray(transition(MASKED, STATES, *ends))[number(x), number(x_s)]
        for (x, x_s), ends in zip(itertools.pairwise(states), itertools.pairwise(times), strict=True)
    ]
    np.testing.assert_allclose(total(jnp.asarray(LOG_P)), np.transpose(expected), rtol=1e-10)
    slope = jax.grad(lambda log_p: total(log_p).sum())(jnp.asarray(LOG_P))
    step = 1e-5 * np.arange(8)
    ends = [float(total(jnp.asarray(LOG_P + sign * step)).sum()) for sign in (1, -1)]
    np.testing.assert_allclose(slope @ step, (ends[0] - ends[1]) / 2, rtol=1e-6)
    assert np.all(np.isfinite(slope))


def test_masks_are_filled_with_the_most_likely_tokens_for_a_value():
    x = jnp.array([[1, MASK, 0], [MASK, 1, 0], [0, MASK, MASK], [0, 1, 1]])
    values = jax.jit(discrete.fill_in_value(denoiser, code, MASK))(x, jnp.asarray(0.5))
    # 100 has 0.03 and 110 0.01; 010 has 0.05; after 0 the second is 0 with 0.32 and 1 with 0.15, the third 0 with 0.35.
    np.testing.assert_array_equal(values, [4, 2, 0, 3])


# --- decoding by confidence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", ["maximum", "entropy", "random"])
def test_one_token_at_a_time_in_any_order_of_confidence_is_exact(confidence):
    n, x = 20_000, jnp.full((20_000, L), MASK)
    sample = jax.jit(
        lambda key: discrete.confidence_unmask(key, denoiser, x, grid(L), ALPHA, MASK, confidence=confidence)
    )
    assert_frequencies(np.bincount(code(sample(jax.random.key(0))), minlength=V**L), P, n)


def test_the_surest_go_first_and_what_is_given_stays():
    """A denoiser that is sure of position `i` by `i`, and shows how many were masked when a token was written."""

    def counting(x, t):
        hidden = jnp.sum(x == 9, -1)
        sure = 20.0 + jnp.arange(5.0)[:, None] * (1 if late else -1)
        return jnp.where(jnp.arange(6) == hidden[:, None, None], sure, 0.0)

    x = jnp.array([[9, 9, 9, 9, 9], [9, 3, 9, 9, 9]])
    run = lambda times: discrete.confidence_unmask(jax.random.key(0), counting, x, times, ALPHA, 9)  # noqa: E731
    late = True
    np.testing.assert_array_equal(run(grid(5))[0], [1, 2, 3, 4, 5])
    late = False
    np.testing.assert_array_equal(run(grid(5))[0], [5, 4, 3, 2, 1])
    np.testing.assert_array_equal(run(jnp.array([1.0, 0.5, 0.0])), [[5, 5, 3, 3, 3], [4, 3, 4, 2, 2]])
    np.testing.assert_array_equal(run(jnp.array([1.0, 0.9]))[0], [5] * 5)  # the last step keeps all


@pytest.mark.parametrize("confidence", ["maximum", "entropy", "random"])
@pytest.mark.parametrize("temperature", [0.0, jnp.zeros(2)])
def test_at_temperature_0_tokens_are_the_most_likely_ones_and_no_masks_are_left(confidence, temperature):
    logits = jnp.array([[0.3, 2.0, 0.1, 1.9], [5.0, -1.0, -jnp.inf, 0.2], [1.0, 0.0, 4.0, 0.5]])
    denoiser, options = lambda x, t: jnp.stack([logits] * 2), {"confidence": confidence, "temperature": temperature}

    @jax.jit
    def run(key):
        return discrete.confidence_unmask(key, denoiser, jnp.full((2, 3), 3), grid(3), ALPHA, 3, **options)

    for key in jax.random.split(jax.random.key(0), 4):
        np.testing.assert_array_equal(run(key), [[1, 0, 2]] * 2)  # the fourth is the mask


@pytest.mark.parametrize("confidence", ["maximum", "entropy"])
def test_temperature_0_is_the_limit_also_in_the_order_of_positions(confidence):
    """Those go first whose most likely token leads the second by most; at 0.01 all leads can still be told apart."""
    leads = jnp.array([0.2, 0.1, 0.3, 0.15])

    def counting(x, t):
        """The token tells how many were masked."""
        hidden = jnp.sum(x == 9, -1)[:, None, None]
        return jnp.where(jnp.arange(6) == hidden, leads[:, None], 0.0)

    x = jnp.full((1, 4), 9)
    for temperature in (0.0, 0.01):
        run = lambda tau: discrete.confidence_unmask(  # noqa: E731
            jax.random.key(0), counting, x, grid(4), ALPHA, 9, confidence=confidence, temperature=tau
        )
        np.testing.assert_array_equal(run(temperature), [[3, 1, 4, 2]])


def test_the_most_confident_are_put_in_the_place_of_their_masks():
    x, sampled = jnp.array([[7, 9, 9, 9], [9, 9, 7, 7]]), jnp.arange(8).reshape(2, 4)
    confidence = jnp.array([[5.0, 0.1, 0.3, 0.2], [0.4, 0.4, 0.9, 0.9]])
    out = discrete.unmask_most_confident(x, sampled, confidence, x == 9, jnp.array([2, 1]))
    np.testing.assert_array_equal(out, [[7, 9, 2, 3], [4, 9, 7, 7]])
    every = discrete.unmask_most_confident(x, sampled, confidence, x == 9, jnp.array([9, 0]))
    np.testing.assert_array_equal(every, [[7, 1, 2, 3], [9, 9, 7, 7]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: MASKED.sample(jax.random.key(0), x.astype(float), t, t), r"x must be integers \[B, L\]"),
        (lambda x, t: MASKED.log_prob(x[:1], x, t, t), "must have one shape: x_s"),
        (
            lambda x, t: discrete.masked_kernel(lambda x, t: x[0] * 1.0, ALPHA, MASK).log_prob(x, x, t, t),
            r"logits must have shape \[B, L, V\]",
        ),
        (
            lambda x, t: discrete.confidence_unmask(
                jax.random.key(0), denoiser, x, grid(2), ALPHA, MASK, confidence="most"
            ),
            'confidence must be "maximum", "entropy" or "random", got \'most\'',
        ),
        (
            lambda x, t: discrete.confidence_unmask(
                jax.random.key(0), denoiser, x, grid(2), ALPHA, MASK, temperature=-0.1
            ),
            "temperature must be at least 0, got -0.1",
        ),
        (
            lambda x, t: discrete.unmask_most_confident(x, x, x[0] * 1.0, x == MASK, t),
            "confidence and is_mask must have shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, L), jnp.int32), jnp.asarray(0.5))

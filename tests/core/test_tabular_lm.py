"""Tabular language models against brute force over strings, and the reference numbers of the design."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from esscher.core.exact import TabularLM
from esscher.core.exact.tabular_lm import golden_testbed, log_potential, log_sum_exp, normalize_log_weights

pytestmark = pytest.mark.usefixtures("x64")

BETA = 0.5
SIX, TEN = 5e-7, 5e-11  # half a unit of the last digit of numbers given to six and to ten places


def expectation(log_q, values):
    return jnp.sum(jnp.exp(log_q) * values)


def divergence(log_q, log_p):
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p))


def brute_force_log_probs(model):
    """Each string's log-prob, its rows looked up by the formula of the design."""
    table, size = np.asarray(model.log_probs), model.vocabulary
    strings = itertools.product(range(size), repeat=model.horizon)

    def row(prefix):
        code = sum(token * size ** (len(prefix) - 1 - i) for i, token in enumerate(prefix))
        return (size ** len(prefix) - 1) // (size - 1) + code

    return np.array([sum(table[row(x[:t]), x[t]] for t in range(model.horizon)) for x in strings])


@pytest.fixture
def testbed():
    return golden_testbed()


@pytest.fixture
def forbidding(testbed):
    """The reward, with every string that starts 0 1 or ends in 2 forbidden: one subtree has no mass, many have some."""
    model, reward = testbed
    strings = model.sequences()
    return jnp.where(((strings[:, 0] == 0) & (strings[:, 1] == 1)) | (strings[:, -1] == 2), -jnp.inf, reward)


# --- the law, and reference numbers -----------------------------------------------------------------------------------


def test_reference_numbers_of_the_law(testbed):
    model, reward = testbed
    log_p = model.sequence_log_probs()
    np.testing.assert_allclose(model.log_probs[0], (-0.592930, -0.881805, -3.403411), rtol=0, atol=SIX)
    np.testing.assert_allclose(jnp.exp(log_p[:3]), (0.014131, 0.027965, 0.257438), rtol=0, atol=SIX)
    mean = expectation(log_p, reward)
    np.testing.assert_allclose(mean, 0.6582115515, rtol=0, atol=TEN)
    np.testing.assert_allclose(expectation(log_p, (reward - mean) ** 2), 0.9912486563, rtol=0, atol=TEN)


def test_reference_numbers_of_the_tilt(testbed):
    model, reward = testbed
    log_p, log_tilt = model.sequence_log_probs(), model.tilt(reward, BETA).sequence_log_probs()
    log_z = model.log_z(reward, BETA)
    np.testing.assert_allclose(log_z, 2.1824197545565482, rtol=1e-14)
    np.testing.assert_allclose(expectation(log_tilt, reward), 1.2356780509, rtol=0, atol=TEN)
    np.testing.assert_allclose(divergence(log_tilt, log_p), 0.2889363472, rtol=0, atol=TEN)
    np.testing.assert_allclose(divergence(log_p, log_tilt), 0.8659966516, rtol=0, atol=TEN)
    twists = jnp.exp(model.soft_values(reward, BETA)[1] - log_z)
    np.testing.assert_allclose(twists, (1.042411, 1.000437, 0.289785), rtol=0, atol=SIX)
    np.testing.assert_allclose(jnp.exp(log_tilt[:3]), (0.003867, 0.051658, 0.386830), rtol=0, atol=SIX)
    np.testing.assert_array_equal(model.sequences()[jnp.argmax(log_tilt)], (0, 0, 0, 2))


@pytest.mark.parametrize(("vocabulary", "horizon"), [(3, 4), (2, 1), (5, 3)])
def test_sequences_are_in_the_order_of_their_codes(vocabulary, horizon):
    rows = (vocabulary**horizon - 1) // (vocabulary - 1)
    model = TabularLM(jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (rows, vocabulary))), horizon)
    assert model.sequences().tolist() == [list(x) for x in itertools.product(range(vocabulary), repeat=horizon)]
    np.testing.assert_allclose(model.sequence_log_probs(), brute_force_log_probs(model), rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(model.sequence_log_probs()).sum(), 1, rtol=1e-12)


def test_a_vocabulary_of_one_token_has_one_string():
    model = TabularLM(jnp.zeros((3, 1)), 3)
    np.testing.assert_array_equal(model.sequence_log_probs(), [0.0])
    np.testing.assert_allclose(model.log_z(jnp.array([0.7]), 0.5), 1.4, rtol=1e-12)


# --- tilts ------------------------------------------------------------------------------------------------------------


def test_tilt_is_the_definition(testbed, forbidding):
    model, reward = testbed
    for r in (reward, forbidding):
        log_weights = model.sequence_log_probs() + r / BETA
        log_z = jax.scipy.special.logsumexp(log_weights)
        np.testing.assert_allclose(model.log_z(r, BETA), log_z, rtol=1e-13)
        tilt = model.tilt(r, BETA)
        np.testing.assert_allclose(tilt.sequence_log_probs(), log_weights - log_z, rtol=1e-11)
        np.testing.assert_allclose(jnp.exp(tilt.log_probs).sum(-1), 1, rtol=1e-12)


def test_soft_and_hard_values_are_conditional_expectations(testbed):
    model, reward = testbed
    log_p = model.sequence_log_probs()
    for t, (soft, hard) in enumerate(zip(model.soft_values(reward, BETA), model.values(reward), strict=True)):
        below = jax.nn.softmax(log_p.reshape(3**t, -1), axis=-1)
        rewards = reward.reshape(3**t, -1)
        np.testing.assert_allclose(soft, jnp.log((below * jnp.exp(rewards / BETA)).sum(-1)), rtol=1e-11)
        np.testing.assert_allclose(hard, (below * rewards).sum(-1), rtol=1e-11)
        assert np.all(BETA * soft >= hard - 1e-14)
    only_the_first_token_counts = jnp.repeat(jnp.array([1.0, -2.0, 0.5]), 27)
    soft, hard = model.soft_values(only_the_first_token_counts, BETA)[1], model.values(only_the_first_token_counts)[1]
    np.testing.assert_allclose(BETA * soft, hard, rtol=1e-12)


def test_law_of_total_variance_on_the_token_tree(testbed):
    model, reward = testbed
    log_p, p = model.sequence_log_probs(), jnp.exp(model.log_probs)
    children = model.next_token_values(model.values(reward))
    variances = (p * children**2).sum(-1) - (p * children).sum(-1) ** 2
    along_paths = model.path_sums(jnp.broadcast_to(variances[:, None], children.shape))
    variance = expectation(log_p, reward**2) - expectation(log_p, reward) ** 2
    np.testing.assert_allclose(expectation(log_p, along_paths), variance, rtol=1e-12)


def test_divergences_from_the_tilt_follow_from_its_normaliser(testbed):
    model, reward = testbed
    log_p, log_tilt = model.sequence_log_probs(), model.tilt(reward, BETA).sequence_log_probs()
    log_z = model.log_z(reward, BETA)
    np.testing.assert_allclose(divergence(log_tilt, log_p), expectation(log_tilt, reward) / BETA - log_z, rtol=1e-12)
    np.testing.assert_allclose(divergence(log_p, log_tilt), log_z - expectation(log_p, reward) / BETA, rtol=1e-12)


def test_tilts_compose(testbed):
    model, reward = testbed
    twice = model.tilt(reward, BETA).tilt(reward[::-1], 0.8)
    once = model.tilt(reward / BETA + reward[::-1] / 0.8, 1.0)
    np.testing.assert_allclose(twice.log_probs, once.log_probs, rtol=1e-10)


def test_any_law_becomes_a_model_by_the_chain_rule(testbed, forbidding):
    model, _ = testbed
    log_p = model.sequence_log_probs()
    np.testing.assert_allclose(TabularLM.from_sequence_log_probs(log_p, 3, 4).log_probs, model.log_probs, rtol=1e-11)
    log_q = jax.nn.log_softmax(forbidding)
    law = TabularLM.from_sequence_log_probs(log_q + 3.0, 3, 4)
    np.testing.assert_allclose(law.sequence_log_probs(), log_q, rtol=1e-11)
    np.testing.assert_allclose(law.log_probs[1 + 3 + 1], -np.log(3), rtol=1e-12)  # after 0 1 there is no mass


def test_forbidden_strings_leave_no_nan(testbed, forbidding):
    model, _ = testbed
    soft, hard, tilt = model.soft_values(forbidding, BETA), model.values(forbidding), model.tilt(forbidding, BETA)
    for array in (*soft, *hard, tilt.log_probs, tilt.sequence_log_probs()):
        assert not np.isnan(array).any()
    assert soft[2][1] == -np.inf
    np.testing.assert_array_equal(tilt.log_probs[5], model.log_probs[5])
    gradients = {
        "reward and beta": jax.grad(model.log_z, argnums=(0, 1)),
        "model": lambda r, b: jax.grad(lambda model: model.log_z(r, b))(model),
        "values": lambda r, b: jax.grad(lambda model: model.values(r)[2][0])(model),
        "tilt": jax.grad(lambda r, b: model.tilt(r, b).log_probs[0, :2].sum(), argnums=(0, 1)),
        "forward": lambda r, b: jax.jvp(model.log_z, (r, b), (jnp.ones(81), 1.0)),
    }
    for name, gradient in gradients.items():
        leaves = jax.tree.leaves(jax.jit(gradient)(forbidding, BETA))
        assert all(np.isfinite(leaf).all() for leaf in leaves), name


def test_an_end_token_that_absorbs_has_no_nan():
    """Token 1 ends the string: after it only itself may follow, and forbidden continuations may have any reward."""
    free = jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (7, 2)))
    ended = jnp.array([row in (2, 4, 5, 6) for row in range(7)])  # after 1, 0 1, 1 0, 1 1
    model = TabularLM(jnp.where(ended[:, None], jnp.array([-jnp.inf, 0.0]), free), 3)
    reward = jnp.where(model.sequence_log_probs() == -jnp.inf, -jnp.inf, jnp.arange(8.0))
    assert np.isfinite(model.values(reward)[0]).all()
    gradient = jax.jit(jax.grad(lambda model: model.log_z(reward, BETA) + model.values(reward)[0][0]))(model)
    assert np.isfinite(gradient.log_probs).all()
    np.testing.assert_allclose(jnp.exp(model.tilt(reward, BETA).sequence_log_probs()).sum(), 1, rtol=1e-12)


def test_without_an_allowed_string_there_is_no_tilt(testbed):
    model, _ = testbed
    nothing = jnp.full(81, -jnp.inf)
    assert model.log_z(nothing, BETA) == -np.inf
    assert np.isnan(model.tilt(nothing, BETA).log_probs).all()


def test_gradients(testbed):
    model, reward = testbed
    gradient = jax.grad(model.log_z)(reward, BETA)
    np.testing.assert_allclose(gradient, jnp.exp(model.tilt(reward, BETA).sequence_log_probs()) / BETA, rtol=1e-10)
    strings = lambda table, reward, beta: TabularLM(table, 4).tilt(reward, beta).sequence_log_probs()  # noqa: E731
    check_grads(jax.jit(strings), (model.log_probs, reward, BETA), order=1, modes=("fwd", "rev"), eps=1e-6)
    check_grads(jax.jit(lambda *a: TabularLM(a[0], 4).values(a[1])[1]), (model.log_probs, reward), order=1, eps=1e-6)


def test_log_space_helpers_at_minus_infinity():
    x = jnp.array([[-jnp.inf, -jnp.inf], [-jnp.inf, 1.0]])
    np.testing.assert_array_equal(log_sum_exp(x), [-jnp.inf, 1.0])
    np.testing.assert_array_equal(jax.vmap(jax.grad(log_sum_exp))(x), [[0, 0], [0, 1]])
    assert np.isnan(log_sum_exp(jnp.array([jnp.nan, -jnp.inf])))
    rows, log_normalizers = normalize_log_weights(x, jnp.full((2, 2), -0.5))
    np.testing.assert_array_equal(rows, [[-0.5, -0.5], [-jnp.inf, 0.0]])
    np.testing.assert_array_equal(log_normalizers, [-jnp.inf, 1.0])
    np.testing.assert_array_equal(log_potential(jnp.array([-jnp.inf, 1.0]), 0.5), [-jnp.inf, 2.0])


# --- under transformations --------------------------------------------------------------------------------------------


def test_jit_and_vmap_over_beta_and_over_models(testbed):
    model, reward = testbed
    betas = jnp.array([0.3, 0.5, 2.0])
    tilt = jax.jit(jax.vmap(lambda model, reward, beta: model.tilt(reward, beta), in_axes=(None, None, 0)))
    tilts = tilt(model, reward, betas)
    assert isinstance(tilts, TabularLM)
    assert tilts.horizon == 4
    for i, beta in enumerate(betas):
        np.testing.assert_allclose(tilts.log_probs[i], model.tilt(reward, beta).log_probs, rtol=1e-12)
    normalizers = jax.jit(jax.vmap(lambda model: model.log_z(reward, BETA)))(tilts)
    expected = [model.tilt(reward, beta).log_z(reward, BETA) for beta in betas]
    np.testing.assert_allclose(normalizers, expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.03)])
def test_lower_precision_is_reduced_in_float32(testbed, dtype, tolerance):
    model, reward = testbed
    tilt = jax.jit(lambda model, reward: model.tilt(reward, BETA).sequence_log_probs())
    exact = tilt(model, reward)
    with jax.enable_x64(False):
        out = tilt(TabularLM(model.log_probs.astype(dtype), 4), reward.astype(dtype))
        assert out.dtype == jnp.float32
        assert golden_testbed()[0].log_probs.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, rtol=tolerance, atol=tolerance)


def test_wrong_shapes_are_named(testbed):
    model, reward = testbed
    with pytest.raises(ValueError, match=r"log_probs must have shape .* horizon T = 3, got \(40, 3\)"):
        TabularLM(model.log_probs, 3)
    with pytest.raises(ValueError, match=r"log_probs must have shape .* got \(40,\)"):
        TabularLM(jnp.zeros(40), 4).sequence_log_probs()
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        TabularLM(jnp.zeros((0, 3)), 0)
    for method in (lambda r: model.log_z(r, BETA), lambda r: model.tilt(r, BETA), model.values):
        with pytest.raises(ValueError, match=r"reward must have shape \[V\*\*T\] = \[3\*\*4\] = \(81,\), got \(80,\)"):
            method(reward[:80])
    with pytest.raises(ValueError, match=r"log_probs must have shape .* \(81,\), got \(3, 27\)"):
        TabularLM.from_sequence_log_probs(reward.reshape(3, 27), 3, 4)
    with pytest.raises(ValueError, match="values must have shapes"):
        model.next_token_values(model.values(reward)[1:])
    with pytest.raises(ValueError, match=r"must have one shape: table \(13, 3\)"):
        model.path_sums(model.log_probs[:13])


# --- token by token ---------------------------------------------------------------------------------------------------


def empty_prompts(n):
    return jnp.zeros((n, 0), jnp.int32), jnp.zeros((n, 0))


def read_stepwise(lm, tokens):
    """Logits before each token and after the last, `[B, T + 1, V]`, and the cache."""
    logits, cache = lm.init(*empty_prompts(tokens.shape[0]))
    seen = [logits]
    for token in tokens.T:
        logits, cache = lm.step(cache, token)
        seen.append(logits)
    return jnp.stack(seen, 1), cache


def test_reading_token_by_token_gives_the_law_of_the_strings(testbed, forbidding):
    for model in (testbed[0], testbed[0].tilt(testbed[1], BETA), testbed[0].tilt(forbidding, BETA)):
        tokens = model.sequences()
        logits, cache = read_stepwise(model.language_model(), tokens)
        taken = jnp.take_along_axis(logits[:, :-1], tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(taken.sum(1), model.sequence_log_probs(), rtol=1e-12)
        assert all(leaf.shape == (81,) for leaf in jax.tree.leaves(cache))


def test_past_the_horizon_token_0_is_certain(testbed):
    lm = testbed[0].language_model()
    _, cache = read_stepwise(lm, testbed[0].sequences())
    for token in (jnp.zeros(81, int), jnp.full(81, 2)):
        np.testing.assert_array_equal(lm.step(cache, token)[0], np.tile([0.0, -np.inf, -np.inf], (81, 1)))


def test_extend_is_as_many_steps(testbed):
    lm = testbed[0].language_model()
    tokens = jax.random.randint(jax.random.key(1), (9, 6), 0, 3)  # two of them past the horizon
    logits, cache = read_stepwise(lm, tokens)
    first, start = lm.init(*empty_prompts(9))
    for extend in (lm.extend, jax.jit(lm.extend)):
        extended, end = extend(start, tokens)
        np.testing.assert_array_equal(jnp.concatenate([first[:, None], extended], 1), logits)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), end, cache))
    assert lm.extend(start, tokens[:, :0])[0].shape == (9, 0, 3)


def test_rewind_undoes_each_rows_own_number_of_tokens(testbed):
    lm = testbed[0].language_model()
    tokens = jax.random.randint(jax.random.key(2), (7, 6), 0, 3)
    logits, cache = read_stepwise(lm, tokens)
    n = jnp.arange(7)  # from none to all, through the tokens past the horizon
    back = jax.jit(lm.rewind)(cache, n)
    again = jnp.where(n > 0, tokens[jnp.arange(7), 6 - n], 0)
    expected = jnp.where((n > 0)[:, None], logits[jnp.arange(7), jnp.minimum(7 - n, 6)], logits[:, 6])
    np.testing.assert_array_equal(lm.step(back, again)[0], expected)
    np.testing.assert_array_equal(lm.rewind(cache, jnp.full(7, 50)).depth, 0)


def test_left_padding_is_skipped_whatever_it_holds(testbed):
    lm = testbed[0].language_model()
    prompt = jnp.array([[9, -4, 7, 2, 0], [1, 1, 0, 1, 2], [5, 5, 5, 5, 5]])
    mask = jnp.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    for init in (lm.init, jax.jit(lm.init)):
        logits, cache = init(prompt, mask)
        for row, tokens in enumerate(([2, 0], [0, 1, 2], [])):
            alone, _ = lm.init(jnp.array([tokens], jnp.int32), jnp.ones((1, len(tokens)), bool))
            np.testing.assert_array_equal(logits[row], alone[0])
        np.testing.assert_array_equal(cache.depth, [2, 3, 0])
    np.testing.assert_array_equal(logits[0], testbed[0].log_probs[4 + 2 * 3])
    full = lm.init(testbed[0].sequences()[40:41], jnp.ones((1, 4)))[1]
    np.testing.assert_array_equal(full.code, [40])


def test_bad_prompts_are_named(testbed):
    lm = testbed[0].language_model()
    with pytest.raises(ValueError, match=r"prompt must be integers \[B, T0\], got float64 \(2, 3\)"):
        lm.init(jnp.zeros((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"prompt \(2, 3\), mask \(2, 2\)"):
        lm.init(jnp.zeros((2, 3), int), jnp.ones((2, 2)))


def test_the_gradient_passes_through_the_language_model(testbed):
    def last_logit(model):
        return model.language_model().init(jnp.array([[1, 2]]), jnp.ones((1, 2)))[0][0, 0]

    gradient = jax.grad(last_logit)(testbed[0]).log_probs
    assert gradient[4 + 1 * 3 + 2, 0] == 1
    assert jnp.abs(gradient).sum() == 1

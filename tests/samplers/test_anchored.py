"""Anchored sampling: its gradient in closed form, its law where that is known, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esscher.core import categorical
from esscher.core.exact import masked
from esscher.samplers.diffusion import anchored, discrete, restarts

pytestmark = pytest.mark.usefixtures("x64", "compile_quickly")

V, L, MASK = 3, 2, 3
RNG = np.random.default_rng(0)
P = np.array([0.2, 0.05, 0.1, 0.03, 0.02, 0.3, 0.1, 0.15, 0.05])
LOG_P, STATES = np.log(P), masked.states(V + 1, L)
TABLE, PULL = RNG.normal(size=(V, 2)), RNG.normal(size=(L, 2))
REWARDS = np.sum(TABLE[np.asarray(masked.states(V, L))] * PULL, (1, 2))
ALPHA, TIMES = categorical.linear_alpha, jnp.array([1.0, 0.5, 0.0])


def denoiser(x, t):
    return masked.conditionals(jnp.asarray(LOG_P), x)


def linear(e):
    return jnp.sum(e * PULL, (1, 2))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def code(x):
    return np.asarray(x @ np.array([V, 1]))


@pytest.mark.parametrize("mode", ["sample", "argmax", "nearest"])
def test_a_linear_reward_has_the_gradient_of_the_mean_and_the_value_of_one_token(mode):
    """`(diag(p) - p p^T) E c / tau`, whatever token stands there."""
    tau, logits = 0.7, jnp.asarray(RNG.normal(size=(1, L, V)))
    p = softmax(np.asarray(logits)[0] / tau)
    expected = [(np.diag(q) - np.outer(q, q)) @ TABLE @ c / tau for q, c in zip(p, PULL, strict=True)]

    @jax.jit
    def look(key):
        value = lambda logits: linear(anchored.st_embed(key, logits, TABLE, tau, mode=mode))[0]  # noqa: E731
        return jax.grad(value)(logits), anchored.st_embed(key, logits, TABLE, tau, mode=mode)

    tokens = []
    for i in range(8):
        slope, e = look(jax.random.key(i))
        np.testing.assert_allclose(slope[0], expected, rtol=1e-9)
        gaps = np.abs(np.asarray(e)[0, :, None] - TABLE).sum(-1)
        np.testing.assert_allclose(gaps.min(-1), 0, atol=1e-12)
        tokens.append(tuple(gaps.argmin(-1)))
    soft = p @ TABLE
    nearest = np.square(soft[:, None] - TABLE).sum(-1).argmin(-1)
    known = {"argmax": tuple(p.argmax(-1)), "nearest": tuple(nearest)}
    assert set(tokens) == {known[mode]} if mode in known else len(set(tokens)) > 1


def test_sampled_embeddings_are_those_of_tokens_of_the_law():
    """Frequencies of 20,000 tokens within 5 standard errors; impossible ones never come."""
    logits = jnp.array([0.3, -jnp.inf, -0.5])
    e = anchored.st_embed(jax.random.key(0), jnp.tile(logits, (1, 20_000, 1)), TABLE)
    counts = (np.abs(np.asarray(e)[0, :, None] - TABLE).sum(-1) < 1e-9).mean(0)
    p = softmax(np.array([0.3, -np.inf, -0.5]))
    assert np.all(np.abs(counts - p) <= 5 * np.sqrt(p * (1 - p) / 20_000))


def test_inner_steps_climb_at_masked_positions_only():
    logits, is_mask = jnp.asarray(RNG.normal(size=(2, L, V))), jnp.array([[True, False], [False, True]])
    objective = lambda key, phi: linear(anchored.st_embed(key, phi, TABLE))  # noqa: E731
    run = lambda optimizer, n: anchored.inner_logit_guidance(  # noqa: E731
        jax.random.key(0), logits, is_mask, objective, optimizer, n
    )
    np.testing.assert_array_equal(run(optax.adam(1.0), 0), logits)
    once, p = run(optax.sgd(0.5), 1), softmax(np.asarray(logits))
    gains = PULL @ TABLE.T  # [L, V]
    slope = p * (gains - np.sum(p * gains, -1, keepdims=True))
    np.testing.assert_allclose(once, logits + 0.5 * slope * is_mask[..., None], rtol=1e-9)
    adam = run(optax.adam(1.0), 1)  # the first step of Adam is the sign of the gradient
    np.testing.assert_allclose(adam, logits + np.sign(slope) * is_mask[..., None], rtol=1e-4)
    held = logits.at[:, :, 0].set(-jnp.inf)
    kept = anchored.inner_logit_guidance(jax.random.key(0), held, is_mask, objective, optax.adam(1.0), 3)
    assert np.all(kept[:, :, 0] == -np.inf)
    assert np.all(np.isfinite(kept[:, :, 1:]))


def sample(n_steps, optimizer, n=20_000, **options):
    """Strings drawn from all masks."""
    x, key = jnp.full((n, L), MASK), jax.random.key(3)
    run = lambda x: anchored.anchored(  # noqa: E731
        key, denoiser, linear, TABLE, x, TIMES, ALPHA, MASK, optimizer, n_steps=n_steps, **options
    )
    return jax.jit(run)(x)


def test_without_inner_steps_or_of_no_length_it_is_the_sampler_by_confidence():
    x = jnp.full((200, L), MASK)
    plain = jax.jit(
        lambda x: discrete.confidence_unmask(jax.random.key(3), denoiser, x, TIMES, ALPHA, MASK, confidence="entropy")
    )(x)
    np.testing.assert_array_equal(sample(0, optax.adam(1.0), n=200), plain)
    np.testing.assert_array_equal(sample(2, optax.sgd(0.0), n=200), plain)
    assert np.any(sample(2, optax.adam(1.0), n=200) != plain)


def moved_law(lr):
    """Of one plain step of descent: every position's law moves by a known vector, and the surest position is first."""
    law = np.zeros((V, V))

    def moved(state, i):
        logits = np.asarray(masked.conditionals(jnp.asarray(LOG_P), jnp.array([state])))[0, i]
        p = np.exp(logits)
        return softmax(logits + lr * (np.diag(p) - np.outer(p, p)) @ TABLE @ PULL[i])

    both = [moved((MASK, MASK), i) for i in range(L)]
    first = int(np.argmax([np.sum(p * np.log(p)) for p in both]))
    for v in range(V):
        state = [MASK, MASK]
        state[first] = v
        row = both[first][v] * moved(tuple(state), 1 - first)
        law[(v, slice(None)) if first == 0 else (slice(None), v)] = row
    return law.reshape(-1)


def test_its_law_for_a_linear_reward_is_that_of_the_moved_logits():
    lr, n = 4.0, 20_000
    law = moved_law(lr)
    counts = np.bincount(code(sample(1, optax.sgd(lr))), minlength=V**L)
    assert np.all(np.abs(counts - n * law) <= 5 * np.sqrt(n * law * (1 - law)))
    tilt = P * np.exp(REWARDS) / (P @ np.exp(REWARDS))
    assert law @ REWARDS > P @ REWARDS + 0.1  # the reward rises
    assert 0.5 * np.abs(law - tilt).sum() > 0.03  # and it is not the tilt


def test_restarts_have_the_law_of_the_best_of_its_samples():
    """`F(r)^3 - F(r-)^3`, by the exact law of one run and rewards that all differ."""
    lr, n = 4.0, 20_000
    law, order = moved_law(lr), np.argsort(REWARDS)
    best = np.zeros(V**L)
    best[order] = np.diff(np.cumsum(law[order]) ** 3, prepend=0.0)
    x = jnp.full((n, L), MASK)
    run = lambda key: anchored.anchored(  # noqa: E731
        key, denoiser, linear, TABLE, x, TIMES, ALPHA, MASK, optax.sgd(lr), n_steps=1
    )
    found = jax.jit(lambda key: restarts.best_of(key, run, lambda x: linear(jnp.asarray(TABLE)[x]), 3))
    counts = np.bincount(code(found(jax.random.key(5))), minlength=V**L)
    assert np.all(np.abs(counts - n * best) <= 5 * np.sqrt(n * best * (1 - best)))
    assert best @ REWARDS > law @ REWARDS + 0.3


@pytest.mark.parametrize("mode", ["sample", "argmax", "nearest"])
def test_adam_finds_strings_of_high_reward(mode):
    found = REWARDS[code(sample(3, optax.adam(1.0), n=2000, mode=mode))]
    assert found.mean() > P @ REWARDS + 0.3 * (REWARDS.max() - P @ REWARDS)


@pytest.mark.parametrize("mode", ["sample", "argmax", "nearest"])
def test_at_temperature_0_an_embedding_is_that_of_the_most_likely_token_and_nothing_guides(mode):
    logits = jnp.asarray(RNG.normal(size=(2, L, V)))
    value = lambda phi: linear(anchored.st_embed(jax.random.key(0), phi, TABLE, 0.0, mode=mode)).sum()  # noqa: E731
    found = anchored.st_embed(jax.random.key(0), logits, TABLE, 0.0, mode=mode)
    np.testing.assert_array_equal(found, TABLE[np.argmax(logits, -1)])
    np.testing.assert_array_equal(jax.grad(value)(logits), 0)
    law, best = P.reshape(V, V), np.zeros(L, int)
    first = np.argmax([np.ptp(np.sort(np.log(q))[-2:]) for q in (law.sum(1), law.sum(0))])
    best[first] = law.sum(1 - first).argmax()
    best[1 - first] = np.take(law, best[first], first).argmax()
    np.testing.assert_array_equal(sample(2, optax.adam(1.0), n=50, temperature=0.0, mode=mode), [best] * 50)


def test_tokens_that_are_given_reach_the_reward_and_stay():
    """The reward of the second token has the sign of the first."""
    x = jnp.array([[0, MASK], [1, MASK]] * 100)
    table = jnp.array([[1.0], [-1.0], [0.0]])
    run = lambda key: anchored.anchored(  # noqa: E731
        key,
        lambda x, t: jnp.zeros((*x.shape, V)),
        lambda e: 5 * e[:, 0, 0] * e[:, 1, 0],
        table,
        x,
        TIMES,
        ALPHA,
        MASK,
        optax.adam(2.0),
        n_steps=3,
    )
    out = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    assert np.mean(out[:, 1] == out[:, 0]) > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, s: anchored.st_embed(k, s, TABLE[:2]), r"logits must be \[B, L, V\] and table \[V, D\], got"),
        (lambda k, s: anchored.st_embed(k, s, TABLE, mode="mean"), "mode must be"),
        (lambda k, s: anchored.st_embed(k, s, TABLE, jnp.ones(3)), "temperature must be a scalar or have shape"),
        (lambda k, s: anchored.st_embed(k, s, TABLE, -1.0), "temperature must be at least 0, got -1"),
        (
            lambda k, s: anchored.inner_logit_guidance(k, s, s[0, 0] > 0, None, optax.sgd(1.0), 1),
            "is_mask must have the leading axes of logits",
        ),
        (
            lambda k, s: anchored.inner_logit_guidance(
                k, s, s[..., 0] > 0, lambda key, phi: phi.sum(-1), optax.sgd(1.0), 1
            ),
            r"objective must return shape \(2,\), one value per example, got \(2, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0), jnp.zeros((2, L, V)))

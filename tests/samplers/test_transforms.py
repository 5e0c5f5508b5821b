"""Transforms of logits against their definitions, written token by token in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.samplers import decoding

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=2.0, size=(40, 11)).astype(np.float32)
TIED = np.round(LOGITS)  # several tokens of a row have one logit
FORBIDDEN = np.where(RNG.random(LOGITS.shape) < 0.4, -np.inf, LOGITS).astype(np.float32)
FORBIDDEN[:, 3] = LOGITS[:, 3]  # something is left in each row


def apply(transform, logits, carry=()):
    return np.asarray(transform.apply(jnp.asarray(logits), carry))


def softmax(row):
    p = np.exp(np.asarray(row, np.float64) - np.max(row))
    return p / p.sum()


# --- what is kept, by definition; ties with the last token kept are kept ----------------------------------------------


def until(mass, order, p):
    """How many tokens, in order, it takes to reach a mass; at least one, and never more than there are."""
    total = 0.0
    for i, v in enumerate(order):
        total += p[v]
        if total >= mass:
            return i + 1
    return len(order)


def kept_by_top_k(row, k):
    return row >= np.sort(row)[::-1][max(int(k), 1) - 1 if k <= row.size else -1]


def kept_by_top_p(row, mass):
    p, order = softmax(row), np.argsort(-row, kind="stable")
    return row >= row[order[until(mass, order, p) - 1]]


def kept_by_min_p(row, ratio):
    p = softmax(row)
    return p >= min(ratio, 1) * p.max() * (1 - 1e-9)


def kept_by_typical_p(row, mass):
    p = softmax(row)
    surprise = -np.log(np.maximum(p, 1e-300))
    distance = np.where(p > 0, np.abs(surprise - np.sum(p * surprise)), np.inf)
    order = np.argsort(distance, kind="stable")
    return distance <= distance[order[until(mass, order, p) - 1]] * (1 + 1e-5)


TRUNCATIONS = {
    "top_k": (decoding.top_k, kept_by_top_k, (1, 2, 5, 11)),
    "top_p": (decoding.top_p, kept_by_top_p, (0.05, 0.3, 0.8, 0.95)),
    "min_p": (decoding.min_p, kept_by_min_p, (0.05, 0.2, 0.7, 0.999)),
    "typical_p": (decoding.typical_p, kept_by_typical_p, (0.05, 0.3, 0.8, 0.95)),
}
WITHOUT_EFFECT = {"top_k": 11, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@pytest.mark.parametrize("logits", [LOGITS, TIED, FORBIDDEN], ids=["plain", "tied", "forbidden"])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncations_keep_what_they_say(name, logits):
    make, kept, values = TRUNCATIONS[name]
    for value in values:
        expected = np.stack([np.where(kept(row, value), row, -np.inf) for row in logits])
        np.testing.assert_array_equal(apply(make(value), logits), expected, err_msg=f"{name}({value})")


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_the_value_without_effect(name):
    """Also where one token has all the mass up to rounding: the rarest keep their logits."""
    make, value = TRUNCATIONS[name][0], WITHOUT_EFFECT[name]
    peaked = np.array([[0.0, -30.0, -60.0, -90.0, 1.0]], np.float32)
    for logits in (LOGITS, TIED, FORBIDDEN, peaked):
        np.testing.assert_array_equal(apply(make(value), logits), logits)


@pytest.mark.parametrize(("name", "values"), [("top_k", (0, -1)), ("top_p", (0.0, -1.0)), ("typical_p", (0.0, -1.0))])
def test_at_least_one_token_is_kept(name, values):
    for value in values:
        assert np.all(np.sum(apply(TRUNCATIONS[name][0](value), LOGITS) > -np.inf, axis=-1) == 1)


def test_the_most_likely_token_alone():
    """By k = 1, by mass 0, by ratio 1 and beyond; ties stay."""
    best = TIED.max(-1, keepdims=True) == TIED
    for transform in (decoding.top_k(1), decoding.top_p(0.0), decoding.min_p(1.0), decoding.min_p(7.0)):
        np.testing.assert_array_equal(apply(transform, TIED) > -np.inf, best)


def test_top_k_counts_no_further_than_the_vocabulary():
    np.testing.assert_array_equal(apply(decoding.top_k(99), LOGITS), LOGITS)


# --- temperature, penalties, biases, masks ----------------------------------------------------------------------------


def test_temperature_divides():
    np.testing.assert_allclose(apply(decoding.temperature(0.7), FORBIDDEN), FORBIDDEN / np.float32(0.7), rtol=1e-6)
    np.testing.assert_array_equal(apply(decoding.temperature(1.0), LOGITS), LOGITS)
    coldest = apply(decoding.temperature(0.0), TIED)
    np.testing.assert_array_equal(np.argmax(coldest, -1), np.argmax(TIED, -1))
    assert np.all(np.sum(coldest > -np.inf, axis=-1) == 1)  # of several, the first


def test_a_repetition_penalty_marks_prompt_and_text():
    """The formula of Hugging Face's processor, over the tokens so far: gather, scale by the sign, scatter."""
    theta, rng = 1.7, np.random.default_rng(1)
    prompt, mask = rng.integers(0, 11, (40, 4)), rng.random((40, 4)) < 0.6
    text = rng.integers(0, 11, (40, 3))
    transform = decoding.repetition_penalty(theta)
    carry = transform.init(jnp.asarray(prompt), jnp.asarray(mask), 11)
    for t in range(4):
        expected = FORBIDDEN.copy()
        for row in range(40):
            seen = np.concatenate([prompt[row][mask[row]], text[row, :t]]).astype(int)
            scores = FORBIDDEN[row, seen]
            expected[row, seen] = np.where(scores < 0, scores * np.float32(theta), scores / np.float32(theta))
        np.testing.assert_allclose(apply(transform, FORBIDDEN, carry), expected, rtol=1e-6)
        if t < 3:
            carry = transform.update(carry, jnp.asarray(text[:, t]))
    np.testing.assert_array_equal(apply(decoding.repetition_penalty(1.0), LOGITS, carry), LOGITS)


@pytest.mark.parametrize("shape", [(11,), (40, 11)])
def test_biases_and_masks(shape):
    rng = np.random.default_rng(2)
    bias, allowed = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.5
    nothing = jnp.zeros((40, 0), jnp.int32)
    for transform, expected in (
        (decoding.logit_bias(bias), LOGITS + bias),
        (decoding.token_mask(allowed), np.where(allowed, LOGITS, -np.inf)),
        (decoding.token_mask(allowed.astype(int)), np.where(allowed, LOGITS, -np.inf)),
    ):
        carry = transform.init(nothing, nothing, 11)
        np.testing.assert_array_equal(apply(transform, LOGITS, carry), expected)
        np.testing.assert_array_equal(apply(transform, LOGITS, transform.update(carry, nothing[:, :0])), expected)


def test_stateless_makes_a_transform_of_a_function():
    transform = decoding.stateless(jax.nn.log_softmax)
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    assert transform.apply(half, ()).dtype == jnp.float32
    np.testing.assert_array_equal(apply(transform, half), jax.nn.log_softmax(half.astype(jnp.float32)))
    assert transform.init(None, None, 11) == transform.update((), None) == ()


# --- parameters, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (decoding.temperature, (0.0, 0.5, 2.0)),
        (decoding.top_k, (1, 4, 30)),
        (decoding.top_p, (0.0, 0.5, 1.0)),
        (decoding.min_p, (0.0, 0.1, 1.0)),
        (decoding.typical_p, (0.0, 0.5, 1.0)),
        (decoding.repetition_penalty, (0.8, 1.0, 1.4)),
    ],
)
def test_parameters_may_be_traced(make, values):
    carry = jnp.asarray(TIED > 1) if make is decoding.repetition_penalty else ()
    mapped = jax.jit(jax.vmap(lambda value: make(value).apply(jnp.asarray(LOGITS), carry)))(jnp.asarray(values))
    for value, result in zip(values, mapped, strict=True):
        np.testing.assert_allclose(result, apply(make(value), LOGITS, carry), rtol=1e-6)


def test_wrong_arguments_are_named():
    nothing, whole = jnp.zeros((40, 0), jnp.int32), jnp.asarray(LOGITS).astype(int)
    for make, name in ((decoding.logit_bias, "bias"), (decoding.token_mask, "allowed")):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[V\] or \[B, V\], got \(\)"):
            make(jnp.ones(()))
        for shape in ((10,), (39, 11), (40, 1)):
            transform = make(jnp.ones(shape))
            with pytest.raises(ValueError, match=f"{name} must have the shape of logits"):
                apply(transform, LOGITS, transform.init(nothing, nothing, 11))
    for transform in (
        decoding.top_p(0.5),
        decoding.repetition_penalty(1.2),
        decoding.logit_bias(jnp.ones((40, 11))),
        decoding.logit_bias(jnp.ones(11)),
    ):
        with pytest.raises(ValueError, match="logits must be of a floating type"):
            transform.apply(whole, transform.init(nothing, nothing, 11))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoding.temperature(-0.5), "tau must be at least 0, got -0.5"),
        (lambda: decoding.temperature(jnp.array([1.0, jnp.nan])), "tau must be at least 0"),
        (lambda: decoding.top_p(np.nan), "p must be a number, got nan"),
        (lambda: decoding.typical_p(np.nan), "mass must be a number, got nan"),
        (lambda: decoding.min_p(-0.1), "ratio must be at least 0, got -0.1"),
        (lambda: decoding.repetition_penalty(0.0), "theta must be above 0, got 0.0"),
        (lambda: decoding.token_mask(jnp.array([[0, 1], [0, 0]])), "allowed must be 1 for some token of every row"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

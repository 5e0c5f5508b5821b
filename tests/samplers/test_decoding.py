"""Sampling token by token against the exact laws of tabular models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.contracts import LanguageModel
from esscher.core.exact import decoder_laws
from esscher.core.exact.tabular_lm import golden_testbed
from esscher.samplers import decoding

MODEL, _ = golden_testbed()
LM = MODEL.language_model()
LOG_P = np.asarray(MODEL.sequence_log_probs())
STRINGS = np.asarray(MODEL.sequences())
CODE = np.array([27, 9, 3, 1])  # of a string: its place in STRINGS
N = 20_000
NOTHING = jnp.zeros((1, 0), jnp.int32)


@functools.partial(jax.jit, static_argnames=("length", "transforms", "choose", "stop", "n", "pad"))
def generate(key, prompt=NOTHING, mask=None, length=4, **options):
    mask = jnp.ones_like(prompt) if mask is None else mask
    return decoding.generate(key, LM, prompt, mask, length, **options)


def assert_law(codes, p):
    """Chi squared and total variation against the exact law.

    Cells expected less than 5 times make up one; chi squared below its mean + 4.5 standard deviations (false alarms
    1e-4), total variation below twice what is expected under the law. No mass where there is none.
    """
    p = np.asarray(p, np.float64)
    n, counts = codes.size, np.bincount(codes, minlength=p.size)
    assert counts[p == 0].sum() == 0
    frequent = n * p >= 5
    seen, expected = (np.append(x[frequent], x[~frequent].sum()) for x in (counts, n * p))
    chi2, freedom = np.sum((seen - expected) ** 2 / np.maximum(expected, 1e-9)), frequent.sum()
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)
    assert 0.5 * np.abs(counts / n - p).sum() < np.sum(np.sqrt(2 * p * (1 - p) / (np.pi * n)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_logits_in_half_precision_samples_have_the_law_of_these_logits(dtype):
    """Gumbel noise in bfloat16 has some hundred values: rare tokens would come too often or never."""
    logits = jnp.linspace(0, -6, 100).astype(dtype)
    narrow = decoding.temperature(1.0)._replace(apply=lambda logits, carry: logits.astype(dtype))
    step = lambda cache, token: (jnp.broadcast_to(logits, (len(token), 100)), ())  # noqa: E731
    model = LanguageModel(lambda prompt, mask: (logits[None], ()), step)
    for transforms in ((), (narrow,)):
        draw = functools.partial(decoding.generate, length=1, n=30_000, transforms=transforms)
        out = jax.jit(lambda key, draw=draw: draw(key, model, NOTHING, NOTHING))(jax.random.key(0))
        law = jax.nn.softmax(logits.astype(jnp.float32))
        assert_law(np.asarray(out.tokens).ravel(), law)
        np.testing.assert_allclose(out.logp.ravel(), jnp.log(law)[out.tokens.ravel()], atol=1e-5)


def test_in_double_precision_so_are_the_log_probabilities(x64):
    logits = jnp.linspace(0.0, -6.0, 20)
    model = LanguageModel(lambda prompt, mask: (logits[None], ()), lambda cache, token: (logits[None].repeat(3, 0), ()))
    out = jax.jit(lambda key: decoding.generate(key, model, NOTHING, NOTHING, 1, n=3))(jax.random.key(0))
    assert out.logp.dtype == out.model_logp.dtype == jnp.float64


def exact(*transforms):
    """The law of all strings when each token is drawn after the transforms, which need no carry."""
    law = MODEL
    for transform in transforms:
        law = decoder_laws.filtered(law, lambda x, t=transform: t.apply(x, ()))
    return np.asarray(law.sequence_log_probs())


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transforms",
    [(), (decoding.temperature(0.7),), (decoding.top_p(0.8),), (decoding.temperature(0.7), decoding.top_p(0.8))],
    ids=["plain", "temperature", "top-p", "both"],
)
def test_samples_have_the_exact_law(transforms):
    out = generate(jax.random.key(0), n=N, transforms=transforms)
    codes, log_law = np.asarray(out.tokens[0]) @ CODE, exact(*transforms)
    assert out.mask.all()
    assert_law(codes, np.exp(log_law))
    np.testing.assert_allclose(out.logp[0].sum(-1), log_law[codes], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.model_logp[0].sum(-1), LOG_P[codes], rtol=1e-5)


def test_reference_numbers_of_temperature_and_top_p():
    """Five strings survive top-p 0.8; the gap of a local to a global temperature; as the design gives them."""
    log_q = exact(decoding.top_p(0.8))
    alive = log_q > -np.inf
    assert alive.sum() == 5
    np.testing.assert_allclose(np.sum(np.exp(log_q[alive]) * (log_q - LOG_P)[alive]), 0.3879179027, rtol=1e-5)
    log_q = exact(decoding.temperature(0.7))
    log_global = np.asarray(jax.nn.log_softmax(LOG_P / 0.7))
    np.testing.assert_allclose(np.sum(np.exp(log_q) * (log_q - log_global)), 0.0070165658, rtol=1e-3)


def test_greedy_takes_the_most_likely_tokens():
    for options in ({"choose": decoding.greedy}, {"transforms": (decoding.temperature(0.0),)}):
        out = generate(jax.random.key(0), **options)
        np.testing.assert_array_equal(out.tokens, [[0, 0, 0, 2]])
        np.testing.assert_allclose(out.model_logp.sum(), -1.3569770480, rtol=1e-6)
    np.testing.assert_array_equal(out.logp, np.zeros((1, 4)))  # at temperature 0 the text is certain


def test_a_carry_follows_the_tokens_chosen():
    """A penalty on what was drawn before: the law of each token depends on all before it, by enumeration."""
    theta, table = 2.0, np.asarray(MODEL.log_probs, np.float64)
    log_law = np.zeros(81)
    for code, string in enumerate(STRINGS):
        for t, token in enumerate(string):
            logits = table[(3**t - 1) // 2 + code // 3 ** (4 - t)].copy()
            logits[list(set(string[:t].tolist()))] *= theta  # log-probs are never positive
            log_law[code] += logits[token] - np.logaddexp.reduce(logits)
    out = generate(jax.random.key(1), n=N, transforms=(decoding.repetition_penalty(theta),))
    codes = np.asarray(out.tokens[0]) @ CODE
    assert_law(codes, np.exp(log_law))
    np.testing.assert_allclose(out.logp[0].sum(-1), log_law[codes], rtol=1e-4)


def test_transforms_apply_in_order():
    """Top-p first keeps more than after the temperature has sharpened the law."""
    transforms = decoding.temperature(0.5), decoding.top_p(0.7)
    for order in (transforms, transforms[::-1]):
        out = generate(jax.random.key(2), n=2000, transforms=order)
        assert set((np.asarray(out.tokens[0]) @ CODE).tolist()) <= set(np.flatnonzero(exact(*order) > -np.inf))
    assert np.sum(exact(*transforms) > -np.inf) < np.sum(exact(*transforms[::-1]) > -np.inf)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_rows_stop_after_a_stop_token():
    out = generate(jax.random.key(3), n=N, stop=(2, 7), pad=5)
    tokens, mask = np.asarray(out.tokens[0]), np.asarray(out.mask[0])
    np.testing.assert_array_equal(mask, np.cumsum(tokens == 2, axis=1) - (tokens == 2) == 0)
    assert np.all(tokens[~mask] == 5)
    assert not out.logp[0][~mask].any()
    assert not out.model_logp[0][~mask].any()
    after = np.cumsum(STRINGS == 2, axis=1) - (STRINGS == 2) > 0
    law = np.bincount(np.where(after, 0, STRINGS) @ CODE, np.exp(LOG_P, dtype=np.float64), 81)
    codes = np.where(mask, tokens, 0) @ CODE
    assert_law(codes, law)
    np.testing.assert_allclose(np.exp(out.logp[0].sum(-1)), law[codes], rtol=1e-4)


def test_the_loop_ends_when_all_rows_have_stopped():
    """Past the horizon token 0 is certain, so with it as stop token at most 5 tokens are drawn, of 50 allowed."""
    calls = []

    def step(cache, token):
        jax.debug.callback(lambda: calls.append(None))
        return LM.step(cache, token)

    out = decoding.generate(jax.random.key(0), LanguageModel(LM.init, step), NOTHING, NOTHING, 50, stop=(0,), n=100)
    jax.effects_barrier()
    assert out.tokens.shape == (1, 100, 50)
    assert len(calls) == int(out.mask.sum(-1).max()) - 1 <= 4  # the first token needs no step


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_once_for_all_their_continuations():
    shapes = []

    def init(prompt, mask):
        shapes.append(prompt.shape)
        return LM.init(prompt, mask)

    prompt = jnp.array([[0, 1], [2, 2]])
    out = decoding.generate(jax.random.key(0), LanguageModel(init, LM.step), prompt, prompt * 0 + 1, 2, n=5000)
    assert shapes == [(2, 2)]
    assert out.tokens.shape == out.mask.shape == out.logp.shape == out.model_logp.shape == (2, 5000, 2)
    p = np.exp(LOG_P, dtype=np.float64).reshape(3, 3, 9)
    for row, given in enumerate((p[0, 1], p[2, 2])):
        assert_law(np.asarray(out.tokens[row]) @ CODE[2:], given / given.sum())


def test_padding_on_the_left_changes_nothing():
    padded, mask = jnp.array([[9, 9, 0, 1], [9, 2, 2, 0]]), jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    transforms = (decoding.repetition_penalty(1.3),)
    for row, prompt in enumerate(([0, 1], [2, 2, 0])):
        rows = jnp.stack([padded[row]] * 2), jnp.stack([mask[row]] * 2)
        ours = generate(jax.random.key(4), *rows, length=1, transforms=transforms)
        plain = generate(jax.random.key(4), jnp.array([prompt] * 2), length=1, transforms=transforms)
        jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_each_row_has_its_own_bias_also_when_prompts_are_repeated():
    allowed = jnp.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    prompts = jnp.zeros((3, 0), jnp.int32)
    mask = decoding.token_mask(allowed)
    for tokens in (
        generate(jax.random.key(5), prompts, n=200, transforms=(mask,)).tokens,
        generate(jax.random.key(5), prompts, n=200, transforms=(decoding.logit_bias(100.0 * allowed),)).tokens,
        generate(jax.random.key(5), prompts, transforms=(mask,)).tokens[:, None],
    ):
        for row in range(3):
            assert set(np.unique(tokens[row])) <= set(np.flatnonzero(allowed[row]))
    assert set(np.unique(generate(jax.random.key(5), prompts, n=50, transforms=(mask,)).tokens[1])) == {1, 2}


# --- keys, compilation, errors ----------------------------------------------------------------------------------------


def test_same_key_same_sample_compiled_or_not():
    plain = decoding.generate(jax.random.key(6), LM, NOTHING, NOTHING, 4, n=50)
    first, again, other = (generate(jax.random.key(k), n=50) for k in (6, 6, 7))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    np.testing.assert_array_equal(first.tokens, plain.tokens)
    np.testing.assert_allclose(first.logp, plain.logp, rtol=1e-6)
    assert np.any(first.tokens != other.tokens)


def test_prompts_of_one_padded_length_are_one_program():
    traces = []

    @jax.jit
    def run(key, prompt, mask):
        traces.append(prompt)
        return decoding.generate(key, LM, prompt, mask, 2).tokens

    for prompt, mask in (([[1, 2]], [[1, 1]]), ([[0, 1]], [[0, 1]]), ([[0, 0]], [[0, 0]])):
        run(jax.random.key(0), jnp.array(prompt), jnp.array(mask))
    assert len(traces) == 1


def test_a_sweep_of_temperatures_is_one_program():
    def mean_logp(tau):
        transforms = (decoding.temperature(tau),)
        return decoding.generate(jax.random.key(8), LM, NOTHING, NOTHING, 4, n=N, transforms=transforms).logp[0].sum(-1)

    taus = jnp.array([0.5, 1.0, 2.0])
    for tau, logp in zip(taus.tolist(), np.asarray(jax.jit(jax.vmap(mean_logp))(taus), np.float64), strict=True):
        log_q = exact(decoding.temperature(tau)).astype(np.float64)
        assert abs(logp.mean() - np.sum(np.exp(log_q) * log_q)) < 4 * logp.std() / np.sqrt(N)  # false alarms: 6e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": jnp.zeros((1, 2))}, "prompt must be integers"),
        ({"prompt": jnp.zeros(2, jnp.int32)}, "prompt must be integers"),
        ({"mask": jnp.ones((1, 3))}, "mask must have the shape of prompt"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"prompt": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2)), "length": 2, **options}
    with pytest.raises(ValueError, match=message):
        decoding.generate(jax.random.key(0), LM, **arguments)

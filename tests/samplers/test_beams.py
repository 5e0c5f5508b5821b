"""Beam search against enumeration of all strings, and sampling without replacement against its exact law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.contracts import LanguageModel
from esscher.core.exact.tabular_lm import TabularLM, golden_testbed
from esscher.samplers import decoding

MODEL, _ = golden_testbed()
LM = MODEL.language_model()
STRINGS, LOG_P = np.asarray(MODEL.sequences()), np.asarray(MODEL.sequence_log_probs(), np.float64)
CODE = np.array([27, 9, 3, 1])  # of a string: its place in STRINGS
EMPTY = jnp.zeros((1, 0), jnp.int32)
NAMES = ("width", "stop", "length", "pad")


@functools.partial(jax.jit, static_argnames=NAMES)
def search(prompt=EMPTY, mask=None, *, length=4, **options):
    mask = jnp.ones_like(prompt) if mask is None else mask
    return decoding.beam_search(LM, prompt, mask, length, **options)


@functools.partial(jax.jit, static_argnames=(*NAMES, "n"))
def draw(key, n, *, length=4, **options):
    """`n` independent sets of beams, as rows of one batch."""
    nothing = jnp.zeros((n, 0), jnp.int32)
    return decoding.stochastic_beam_search(key, LM, nothing, nothing, length, **options)


def ended(stop):
    """All texts that end with `stop` or at the horizon, as `{tokens: log p}`, by merging strings with one beginning."""
    texts = {}
    for string, log_p in zip(STRINGS.tolist(), LOG_P, strict=True):
        text = tuple(string[: string.index(stop) + 1] if stop in string else string)
        texts[text] = np.logaddexp(texts.get(text, -np.inf), log_p)
    return texts


def texts(beams, row=0):
    tokens, mask = np.asarray(beams.tokens[row]), np.asarray(beams.mask[row])
    return [tuple(t[m].tolist()) for t, m in zip(tokens, mask, strict=True)]


# --- beam search ------------------------------------------------------------------------------------------------------


def test_reference_beams():
    one, two = search(width=1), search(width=2)
    np.testing.assert_array_equal(one.tokens[0], [(0, 0, 0, 2)])
    np.testing.assert_allclose(one.score[0], [-1.3569770480], rtol=1e-6)
    np.testing.assert_array_equal(two.tokens[0], [(1, 2, 2, 0), (0, 0, 0, 2)])
    np.testing.assert_allclose(two.score[0], [-1.3459923269, -1.3569770480], rtol=1e-6)
    nothing = jnp.zeros((1, 0))
    greedy = decoding.generate(jax.random.key(0), LM, EMPTY, nothing, 4, choose=decoding.greedy)
    np.testing.assert_array_equal(one.tokens[0], greedy.tokens)


@pytest.mark.usefixtures("x64")
def test_reference_numbers_to_ten_places_in_double_precision():
    model = golden_testbed()[0].language_model()
    options = {"width": 2, "length_penalty": jnp.asarray(0.0)}
    beams = decoding.beam_search(model, EMPTY, EMPTY, 4, **options)
    np.testing.assert_allclose(beams.score[0], [-1.3459923269, -1.3569770480], rtol=0, atol=5e-11)
    single = decoding.beam_search(LM, EMPTY, EMPTY, 4, **options)  # a penalty of more digits than the logits have
    np.testing.assert_allclose(single.score, beams.score, rtol=1e-6)


@pytest.mark.parametrize("width", [27, 81])
def test_with_a_beam_for_each_prefix_the_best_strings_are_found(width):
    beams = search(width=width)
    best = np.argsort(-LOG_P)[:width]
    np.testing.assert_allclose(beams.score[0], LOG_P[best], rtol=1e-5)
    np.testing.assert_array_equal(beams.tokens[0] @ CODE, best)
    assert beams.mask.all()


def test_beams_that_do_not_exist_are_marked():
    beams = search(width=100, pad=7)
    assert np.all(beams.score[0, :81] > -np.inf)
    assert np.all(beams.score[0, 81:] == -np.inf)
    assert not beams.mask[0, 81:].any()
    assert np.all(beams.tokens[0, 81:] == 7)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("stop", [0, 2])
def test_stopped_beams_and_length_penalties_against_enumeration(stop, alpha):
    """A beam for each text at each length, so that nothing is lost; scores are log p over a power of the length."""
    expected = {text: log_p / len(text) ** alpha for text, log_p in ended(stop).items()}
    best = sorted(expected, key=expected.get, reverse=True)
    beams = search(width=len(best) + 2, stop=(stop,), length_penalty=alpha, pad=9)
    assert texts(beams)[:-2] == best
    np.testing.assert_allclose(beams.score[0, :-2], [expected[text] for text in best], rtol=1e-5)
    assert np.all(beams.score[0, -2:] == -np.inf)
    assert np.all(np.where(beams.mask, 9, beams.tokens) == 9)


def test_a_narrow_beam_is_the_search_by_hand():
    """Kept, at each length, are the best of all children and of what has stopped; with a stop and a penalty."""
    width, alpha, stop = 3, 0.8, 1
    table, kept = np.asarray(MODEL.log_probs, np.float64), [((), 0.0)]

    def children(text, log_p):
        if stop in text:
            return [(text, log_p)]
        row = (3 ** len(text) - 1) // 2 + sum(token * 3**i for i, token in enumerate(reversed(text)))
        return [((*text, v), log_p + table[row, v]) for v in range(3)]

    def score(beam):
        return beam[1] / len(beam[0]) ** alpha

    for _ in range(4):
        kept = sorted((child for beam in kept for child in children(*beam)), key=score, reverse=True)[:width]
    beams = search(width=width, stop=(stop,), length_penalty=alpha)
    assert texts(beams) == [text for text, _ in kept]
    np.testing.assert_allclose(beams.score[0], [score(beam) for beam in kept], rtol=1e-5)


def test_prompts_are_searched_apart_and_may_be_padded():
    prompt, mask = jnp.array([[5, 0, 1], [2, 2, 0], [5, 5, 2]]), jnp.array([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    beams = search(prompt, mask, width=3, length=1)
    for row, alone in enumerate(([0, 1], [2, 2, 0], [2])):
        single = search(jnp.array([alone]), width=3, length=1)
        np.testing.assert_array_equal(beams.tokens[row], single.tokens[0])
        np.testing.assert_allclose(beams.score[row], single.score[0], rtol=1e-6)


def test_the_search_ends_when_all_beams_have_stopped():
    """Token 0 is certain past the horizon, so after 4 tokens all texts stop; of 50 allowed, 5 are looked at."""
    calls = []

    def step(cache, token):
        jax.debug.callback(lambda: calls.append(None))
        return LM.step(cache, token)

    beams = decoding.beam_search(LanguageModel(LM.init, step), EMPTY, EMPTY, 50, width=4, stop=(0,))
    jax.effects_barrier()
    assert len(calls) <= 4  # the first token needs no step
    assert beams.mask.sum(-1).max() <= 5


@pytest.mark.parametrize(("name", "bad"), [("width", 0), ("length", 0)])
def test_numbers_below_one_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        search(**{"width": 2, name: bad})


# --- stochastic beam search -------------------------------------------------------------------------------------------


def test_the_first_two_are_drawn_without_replacement():
    """P(first = i, second = j) = p_i p_j / (1 - p_i) for each pair of strings that is expected 5 times or more.

    Chi squared with the other pairs as one cell, below mean + 4.5 standard deviations: false alarms below 1e-4.
    """
    n, p = 200_000, np.exp(LOG_P)
    beams = draw(jax.random.key(0), n, width=2)
    pairs = np.asarray(beams.tokens) @ CODE
    counts = np.zeros((81, 81))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    expected = n * p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(expected, 0)
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    cells = [np.append(x[frequent], x[~frequent].sum()) for x in (counts, expected)]
    chi2, freedom = np.sum((cells[0] - cells[1]) ** 2 / cells[1]), frequent.sum()
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(beams.logp, LOG_P[pairs], rtol=1e-5)


def test_perturbed_log_probs_and_the_threshold_descend():
    beams = draw(jax.random.key(1), 500, width=5)
    assert np.all(np.diff(beams.perturbed) < 0)
    assert np.all(beams.kappa < beams.perturbed[:, -1])
    assert all(len(set(row)) == 5 for row in np.asarray(beams.tokens) @ CODE)
    # The largest is a Gumbel variable at log 1, with mean 0.5772 and variance pi^2 / 6.
    z = (np.mean(beams.perturbed[:, 0]) - np.euler_gamma) / np.sqrt(np.pi**2 / 6 / 500)
    assert abs(z) < 4


def test_the_threshold_is_the_next_perturbed_log_prob():
    """Its law is that of the third value of a search of width 3: two samples of 2,000, by Kolmogorov and Smirnov."""
    n = 2000
    kappa = np.sort(draw(jax.random.key(2), n, width=2).kappa)
    third = np.sort(draw(jax.random.key(3), n, width=3).perturbed[:, 2])
    both = np.concatenate([kappa, third])
    distance = np.abs(np.searchsorted(kappa, both, "right") - np.searchsorted(third, both, "right")).max() / n
    assert distance < 2.3 * np.sqrt(2 / n)  # exceeded with probability 5e-5


@pytest.mark.parametrize("stop", [(), (2,)])
def test_inclusion_weights_are_unbiased(stop):
    """Means of the estimates of `E_p[f]` and of 1 are within 4 standard errors (false alarms: 6e-5 each)."""
    n, f = 50_000, jnp.array([1.0, -0.7, 0.4, 2.0])
    beams = draw(jax.random.key(4), n, width=3, stop=stop)
    weights = jnp.exp(decoding.log_inclusion_weights(beams.logp, beams.kappa))
    values = (beams.mask * (beams.tokens + 1)) @ f
    law = ended(*stop) if stop else dict(zip(map(tuple, STRINGS.tolist()), LOG_P, strict=True))
    exact = sum(np.exp(log_p) * (np.array(text) + 1) @ f[: len(text)] for text, log_p in law.items())
    for estimates, truth in ((weights.sum(-1), 1.0), ((weights * values).sum(-1), exact)):
        estimates = np.asarray(estimates, np.float64)
        assert abs(estimates.mean() - truth) < 4 * estimates.std() / np.sqrt(n)


def test_all_strings_have_weight_p():
    beams = draw(jax.random.key(5), 3, width=85)
    assert np.all(beams.kappa == -np.inf)
    assert np.all(np.sort(np.asarray(beams.tokens[:, :81]) @ CODE) == np.arange(81))
    assert not beams.mask[:, 81:].any()
    log_weights = decoding.log_inclusion_weights(beams.logp, beams.kappa)
    np.testing.assert_allclose(log_weights, beams.logp, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(log_weights).sum(-1), 1, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_log_inclusion_weights_keep_their_digits():
    """Equal to the definition where that can be computed, and to `kappa` where `q` is `exp(logp - kappa)`."""
    logp = jnp.array([-0.1, -3.0, -7.0, -np.inf])
    for kappa in (-12.0, -2.0, 1.0):
        q = -np.expm1(-np.exp(np.asarray(logp[:3]) - kappa))
        weights = decoding.log_inclusion_weights(logp, jnp.asarray(kappa))
        np.testing.assert_allclose(weights, [*(np.asarray(logp[:3]) - np.log(q)), -np.inf], rtol=1e-12)
    small = decoding.log_inclusion_weights(jnp.array([-900.0, -135.0]), jnp.asarray(-100.0))
    np.testing.assert_allclose(small, [-100.0, -100.0], rtol=1e-14)
    with pytest.raises(ValueError, match="logp must have the shape of kappa"):
        decoding.log_inclusion_weights(logp, logp)


def test_same_key_same_sets_and_a_vocabulary_of_one_token():
    first, again, other = (draw(jax.random.key(k), 10, width=2).tokens for k in (6, 6, 7))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    single = TabularLM(jnp.zeros((3, 1)), 3).language_model()
    beams = decoding.stochastic_beam_search(jax.random.key(0), single, EMPTY, EMPTY, 3, width=2)
    np.testing.assert_array_equal(beams.logp, [[0, -np.inf]])
    assert beams.kappa[0] == -np.inf

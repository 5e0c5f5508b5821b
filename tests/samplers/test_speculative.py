"""Speculative sampling against the target's exact law, for the rule and for whole strings."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.exact import decoder_laws
from esscher.core.exact.tabular_lm import TabularLM, golden_testbed
from esscher.core.tokens import token_logps
from esscher.models import decoder
from esscher.models.language_model import language_model
from esscher.samplers import decoding

TARGET, _ = golden_testbed()
DRAFT = TabularLM(jax.nn.log_softmax(0.6 * TARGET.log_probs + jnp.sin(jnp.arange(120.0)).reshape(40, 3)), 4)
CODE = np.array([27, 9, 3, 1])  # of a string: its place among all
SHAPED = (decoding.temperature(0.7), decoding.top_p(0.9))
N = 30_000


@functools.partial(jax.jit, static_argnames=("n", "length", "ahead", "transforms", "stop", "pad"))
def generate(key, target=TARGET, draft=DRAFT, *, n=N, length=4, **options):
    """Continues `n` empty prompts."""
    nothing = jnp.zeros((n, 0), jnp.int32)
    models = target.language_model(), draft.language_model()
    return decoding.speculative_generate(key, *models, nothing, nothing, length, **options)


def assert_law(codes, p):
    """Chi squared over cells expected 5 times or more, the rest as one, below mean + 4.5 standard deviations (1e-4).

    And no mass where there is none.
    """
    p = np.asarray(p, np.float64)
    counts, expected = np.bincount(codes, minlength=p.size), codes.size * p / p.sum()
    assert counts[p == 0].sum() == 0
    frequent = expected >= 5
    cells = [np.append(x[frequent], x[~frequent].sum()) for x in (counts, expected)]
    chi2, freedom = np.sum((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9)), frequent.sum()
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)


# --- the rule ---------------------------------------------------------------------------------------------------------


def laws_of_the_rule(ahead):
    """Exact probabilities of each outcome of a round from the empty prefix.

    Returns the drafts `[M, G]` with `log q` of each, the laws at each position, and for each draft the probabilities of
    `(n_accepted, token)`, by multiplying out what the rule says.
    """
    p, q = (np.exp(np.asarray(model.log_probs, np.float64)) for model in (TARGET, DRAFT))
    drafts = np.array(list(itertools.product(range(3), repeat=ahead)))
    rows = [[(3**t - 1) // 2 + int(d[:t] @ 3 ** np.arange(t)[::-1]) for t in range(ahead + 1)] for d in drafts]
    p, q = p[np.array(rows)], q[np.array(rows)[:, :ahead]]
    outcomes = np.zeros((len(drafts), ahead + 1, 3))
    for m, draft in enumerate(drafts):
        reached = 1.0
        for i, v in enumerate(draft):
            accept = min(1, p[m, i, v] / q[m, i, v])
            residual = np.maximum(p[m, i] - q[m, i], 0)
            outcomes[m, i] = reached * (1 - accept) * residual / residual.sum()
            reached *= accept
        outcomes[m, ahead] = reached * p[m, ahead]
    drawn = np.prod([q[:, i, :][np.arange(len(drafts)), drafts[:, i]] for i in range(ahead)], axis=0)
    return drafts, drawn, p, q, outcomes


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_rule_as_enumerated_keeps_the_law_of_the_target(ahead):
    """What follows from the outcomes: the first token is from p, and given it (if the round has it) the second, ..."""
    drafts, drawn, _, _, outcomes = laws_of_the_rule(ahead)
    texts = {}
    for draft, q, outcome in zip(drafts, drawn, outcomes, strict=True):
        for n, v in itertools.product(range(ahead + 1), range(3)):
            text = (*draft[:n].tolist(), v)
            texts[text] = texts.get(text, 0.0) + q * outcome[n, v]
    for depth in range(1, ahead + 2):
        for prefix in itertools.product(range(3), repeat=depth):
            # A round of fewer tokens goes on from the target, so what it lacks is filled up with p.
            row = [(3**t - 1) // 2 + sum(v * 3**j for j, v in enumerate(reversed(prefix[:t]))) for t in range(depth)]
            p = np.exp(np.asarray(TARGET.log_probs, np.float64)[row, list(prefix)])
            mass = sum(
                w * (np.prod(p[len(text) :]) if prefix[: len(text)] == text else text[:depth] == prefix)
                for text, w in texts.items()
            )
            np.testing.assert_allclose(mass, np.prod(p), rtol=1e-6)


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_rule_has_the_enumerated_law(ahead):
    """The number accepted and the token after them, jointly, for each draft; chi squared."""
    drafts, _, p, q, outcomes = laws_of_the_rule(ahead)

    @functools.partial(jax.jit, static_argnums=1)
    def accept(key, n):
        repeat = lambda x: jnp.repeat(jnp.asarray(x, jnp.float32), n, axis=0)  # noqa: E731
        draft = jnp.repeat(jnp.asarray(drafts), n, axis=0)
        return decoding.speculative_accept(key, jnp.log(repeat(p)), jnp.log(repeat(q)), draft)

    n, token = (np.asarray(x).reshape(len(drafts), -1) for x in accept(jax.random.key(ahead), 10_000))
    for m in range(len(drafts)):
        assert_law(n[m] * 3 + token[m], outcomes[m].reshape(-1))


def test_a_token_is_accepted_with_probability_one_minus_total_variation():
    """And of `G` alike, `a + ... + a^G` are kept on average: `(1 - a^(G+1)) / (1 - a)` with the token after them."""
    n, ahead = 40_000, 3
    p, q = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.3, -1.0, 0.9], [1.0, 0.2, 0.1]))
    draft = jax.random.categorical(jax.random.key(0), q, shape=(n, ahead))
    laws = (jnp.broadcast_to(x, (n, g, 3)) for x, g in ((p, ahead + 1), (q, ahead)))
    kept = np.asarray(jax.jit(decoding.speculative_accept)(jax.random.key(1), *laws, draft)[0])
    a = 1 - 0.5 * float(jnp.abs(jnp.exp(p) - jnp.exp(q)).sum())
    tested = np.minimum(kept + 1, ahead).sum()
    assert abs(kept.sum() / tested - a) < 4 * np.sqrt(a * (1 - a) / tested)  # false alarms: 6e-5 each
    assert abs(1 + kept.mean() - (1 - a ** (ahead + 1)) / (1 - a)) < 4 * kept.std() / np.sqrt(n)


def test_degenerate_laws():
    """Greedy models accept where they agree; forbidden tokens are never kept nor drawn; equal laws keep everything."""
    point = jnp.where(jnp.eye(3, dtype=bool), 0.0, -jnp.inf)
    target, proposals = point[jnp.array([[0, 1, 2], [1, 1, 2]])], jnp.array([[0, 0], [1, 1]])
    n, token = decoding.speculative_accept(jax.random.key(0), target, point[proposals], proposals)
    np.testing.assert_array_equal(n, [1, 2])
    np.testing.assert_array_equal(token, [1, 2])
    p = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (500, 4, 3)))
    draft = jax.random.categorical(jax.random.key(2), p[:, :3])
    assert np.all(decoding.speculative_accept(jax.random.key(3), p, p[:, :3], draft)[0] == 3)
    nearly = p[:, :3] + 1e-6 * jax.random.normal(jax.random.key(4), (500, 3, 3))
    assert np.mean(decoding.speculative_accept(jax.random.key(3), p, nearly, draft)[0]) > 2.99


def test_wrong_arguments_of_the_rule_are_named():
    logp, draft = jnp.zeros((2, 4, 3)), jnp.zeros((2, 3), jnp.int32)
    accept = functools.partial(decoding.speculative_accept, jax.random.key(0))
    with pytest.raises(ValueError, match=r"target_logp must be \[B, G \+ 1, V\]"):
        accept(logp, logp, draft)
    with pytest.raises(ValueError, match="draft must be integers"):
        accept(logp, logp[:, :3], draft * 1.0)
    with pytest.raises(ValueError, match="target_logp must be of a floating type"):
        accept(logp.astype(int), logp[:, :3], draft)


# --- whole strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "transforms"), [(1, ()), (2, ()), (3, SHAPED), (5, ())])
def test_strings_have_the_law_of_the_target(ahead, transforms):
    out, counts = generate(jax.random.key(ahead), ahead=ahead, transforms=transforms)
    law = TARGET
    for transform in transforms:
        law = decoder_laws.filtered(law, lambda x, t=transform: t.apply(x, ()))
    codes, log_law = np.asarray(out.tokens) @ CODE, np.asarray(law.sequence_log_probs())
    assert out.mask.all()
    assert_law(codes, np.exp(log_law))
    np.testing.assert_allclose(out.logp.sum(-1), log_law[codes], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.model_logp.sum(-1), TARGET.sequence_log_probs()[codes], rtol=1e-4)
    assert np.all(counts.accepted <= counts.proposed)
    assert np.all(counts.proposed % ahead == 0)


def test_a_draft_equal_to_the_target_is_accepted():
    """Of 4 tokens the first is the target's, then a round has three: there is one."""
    _, counts = generate(jax.random.key(0), TARGET, TARGET, n=100, ahead=2, transforms=SHAPED)
    np.testing.assert_array_equal(counts, np.full((2, 100), 2))


def test_stop_tokens_end_rows_at_different_times():
    out, counts = generate(jax.random.key(7), n=N, ahead=2, stop=(2,), pad=5)
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    stopped_before = np.cumsum(tokens == 2, axis=1) - (tokens == 2) > 0
    np.testing.assert_array_equal(mask, ~stopped_before)
    assert np.all(tokens[~mask] == 5)
    assert not out.logp[~mask].any()
    assert not out.model_logp[~mask].any()
    # Strings that agree up to their stop are one text: the first of them stands for all.
    strings = np.asarray(TARGET.sequences())
    after = np.cumsum(strings == 2, axis=1) - (strings == 2) > 0
    law = np.bincount(np.where(after, 0, strings) @ CODE, np.exp(TARGET.sequence_log_probs()), 81)
    assert_law(np.where(mask, tokens, 0) @ CODE, law)
    only_one = np.asarray(out.mask.sum(-1)) == 1
    assert not counts.proposed[only_one].any()  # they ended before the first round


def test_prompts_differ_in_length():
    """Of three prompts, the last two one text: each continues by the target's law given it."""
    prompt, mask = jnp.array([[0, 1], [9, 2], [2, 9]]), jnp.array([[1, 1], [0, 1], [1, 0]])
    n = 20_000
    models = TARGET.language_model(), DRAFT.language_model()
    many = (jnp.repeat(x, n, axis=0) for x in (prompt, mask))
    run = jax.jit(lambda key, *many: decoding.speculative_generate(key, *models, *many, 2, ahead=2)[0])
    codes = np.asarray(run(jax.random.key(3), *many).tokens).reshape(3, n, 2) @ CODE[2:]
    p = np.exp(np.asarray(TARGET.sequence_log_probs(), np.float64)).reshape(3, 3, 9)
    assert_law(codes[0], p[0, 1])
    first_two = np.exp(np.asarray(TARGET.sequence_log_probs(), np.float64)).reshape(3, 9, 3).sum(-1)
    assert_law(codes[1], first_two[2])
    assert_law(codes[2], first_two[2])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_of_a_decoder_holds_what_was_accepted(rows):
    """Log-probs from caches that were rewound by different numbers, of documented capacity, are those read in order."""
    length, ahead = 8, 2
    config = decoder.Config(vocabulary=7, width=8, depth=1, heads=2, kv_heads=1, head_dim=4, mlp=8)
    weights = [jax.tree.map(lambda x: 4 * x, decoder.init(jax.random.key(seed), config)) for seed in (0, 1)]
    prompt = jnp.array([[1, 2, 3], [0, 5, 4], [0, 0, 6]])[:rows]
    mask, stop = jnp.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]])[:rows], () if rows == 1 else (0,)
    capacity = 3 + length + ahead if rows == 1 else 3 + (ahead + 1) * length
    models = [language_model(params, config, capacity) for params in weights]
    run = functools.partial(decoding.speculative_generate, length=length, ahead=ahead, stop=stop)
    out, counts = run(jax.random.key(0), *models, prompt, mask)
    assert 0 < counts.accepted.sum() < counts.proposed.sum()
    whole = language_model(weights[0], config, 3 + length)
    first, cache = whole.init(prompt, mask)
    rest, _ = whole.extend(cache, out.tokens[:, :-1])
    logp = token_logps(jnp.concatenate([first[:, None], rest], axis=1), out.tokens)
    np.testing.assert_allclose(out.model_logp, jnp.where(out.mask, logp, 0), rtol=1e-5, atol=1e-5)


def test_same_key_same_sample_and_one_token():
    first, again, other = (generate(jax.random.key(k), n=50)[0].tokens for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    out, counts = generate(jax.random.key(2), n=N, length=1)
    assert_law(np.asarray(out.tokens[:, 0]), np.exp(TARGET.log_probs[0]))
    assert not np.any(counts.proposed)


@pytest.mark.usefixtures("x64")
def test_double_precision_is_traced():
    target = TabularLM(TARGET.log_probs.astype(jnp.float64), 4)
    assert generate(jax.random.key(0), target, target, n=3)[0].tokens.dtype == jnp.int32


def test_models_and_transforms_that_cannot_be_used():
    target, draft = TARGET.language_model(), DRAFT.language_model()
    nothing = jnp.zeros((2, 0), jnp.int32)

    def run(target=target, draft=draft, **options):
        return decoding.speculative_generate(jax.random.key(0), target, draft, nothing, nothing, 4, **options)

    with pytest.raises(ValueError, match="target must have extend and rewind"):
        run(target=target._replace(extend=None, rewind=None))
    with pytest.raises(ValueError, match="draft must have rewind"):
        run(draft=draft._replace(rewind=None))
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        run(ahead=0)
    with pytest.raises(ValueError, match="one vocabulary"):
        run(draft=TabularLM.uniform(2, 4).language_model())
    with pytest.raises(ValueError, match="transforms must have no carry"):
        run(transforms=(decoding.repetition_penalty(1.2),))

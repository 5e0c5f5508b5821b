"""The tilted bigram against enumeration of its strings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from esscher.core.exact import TabularLM
from esscher.core.exact.bigram import TiltedBigram

pytestmark = pytest.mark.usefixtures("x64")

VOCABULARY, HORIZON = 3, 4
# The strings with exactly two 2s: states count them, the last one is reached by the third.
TWO_TWOS = jnp.array([[0, 0, 1], [1, 1, 2], [2, 2, 3], [3, 3, 3]])


@pytest.fixture
def law():
    keys = jax.random.split(jax.random.key(0), 3)
    return TiltedBigram(
        start=jax.nn.log_softmax(jax.random.normal(keys[0], (VOCABULARY,))),
        transitions=jax.nn.log_softmax(jax.random.normal(keys[1], (VOCABULARY, VOCABULARY))),
        scores=1.5 * jax.random.normal(keys[2], (HORIZON, VOCABULARY)),
        next_state=TWO_TWOS,
        accepting=jnp.array([False, False, True, False]),
    )


def enumerated(law):
    """The bigram model as a table, and the reward of every string, `-inf` if it is not accepted."""
    rows = [law.start[None]] + [jnp.tile(law.transitions, (VOCABULARY**t, 1)) for t in range(HORIZON - 1)]
    model = TabularLM(jnp.concatenate(rows), HORIZON)
    strings = model.sequences()
    state = jnp.full(strings.shape[0], law.first_state)
    for token in strings.T:
        state = law.next_state[state, token]
    return model, jnp.where(law.accepting[state], law.scores[jnp.arange(HORIZON), strings].sum(-1), -jnp.inf)


@pytest.mark.parametrize("first_state", [0, 1, 2])
def test_normaliser_and_next_token_laws_agree_with_enumeration(law, first_state):
    law = law._replace(first_state=first_state)
    model, reward = enumerated(law)
    np.testing.assert_allclose(law.log_z(), model.log_z(reward, 1.0), rtol=1e-12)
    tilt, strings = model.tilt(reward, 1.0), model.sequences()
    logits, cache = tilt.language_model().init(jnp.zeros((81, 0), int), jnp.zeros((81, 0)))
    following, _ = tilt.language_model().extend(cache, strings[:, :-1])
    expected = jnp.concatenate([logits[:, None], following], 1)
    np.testing.assert_allclose(law.next_token_log_probs(strings), expected, rtol=1e-10, atol=1e-13)
    taken = jnp.take_along_axis(law.next_token_log_probs(strings), strings[..., None], -1).sum((1, 2))
    accepted = reward > -jnp.inf
    np.testing.assert_allclose(taken[accepted], tilt.sequence_log_probs()[accepted], rtol=1e-10)


def test_samples_follow_the_law(law):
    n = 50_000
    model, reward = enumerated(law)
    expected = n * jnp.exp(model.tilt(reward, 1.0).sequence_log_probs())
    drawn = jax.jit(lambda law, key: law.sample(key, n))(law, jax.random.key(1))
    assert drawn.shape == (n, HORIZON)
    counts = jnp.bincount(drawn @ VOCABULARY ** jnp.arange(HORIZON)[::-1], length=81)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    pearson = jnp.sum((counts - expected)[common] ** 2 / expected[common])
    degrees = int(common.sum())
    assert degrees > 10
    assert pearson < degrees + 5 * np.sqrt(2 * degrees)  # false alarms: below 1e-4
    np.testing.assert_array_equal(drawn, law.sample(jax.random.key(1), n))


def test_long_independent_tokens_factorise():
    """With a token law that forgets and no constraint, `log Z` is a sum over three hundred positions."""
    law = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (7,)))
    scores = 3 * jax.random.normal(jax.random.key(3), (300, 7))
    chain = TiltedBigram(law, jnp.tile(law, (7, 1)), scores, jnp.zeros((1, 7), int), jnp.array([True]))
    np.testing.assert_allclose(chain.log_z(), jax.scipy.special.logsumexp(law + scores, axis=-1).sum(), rtol=1e-12)
    tokens = chain.sample(jax.random.key(4), 2)
    np.testing.assert_allclose(chain.next_token_log_probs(tokens)[1], jax.nn.log_softmax(law + scores), rtol=1e-9)


def test_a_long_constraint_is_kept(law):
    scores = jax.random.normal(jax.random.key(5), (250, VOCABULARY))
    drawn = law._replace(scores=scores).sample(jax.random.key(6), 20)
    np.testing.assert_array_equal((drawn == 2).sum(-1), 2)


def test_nothing_accepted_and_forbidden_tokens(law):
    assert law._replace(accepting=jnp.zeros(4, bool)).log_z() == -np.inf
    forbidding = law._replace(scores=law.scores.at[1, 0].set(-jnp.inf))
    gradient = jax.grad(lambda scores: law._replace(scores=scores).log_z())(forbidding.scores)
    assert np.isfinite(gradient).all()
    assert gradient[1, 0] == 0
    model, reward = enumerated(forbidding)
    np.testing.assert_allclose(forbidding.log_z(), model.log_z(reward, 1.0), rtol=1e-12)


def test_gradient_is_the_probability_of_each_token(law):
    model, reward = enumerated(law)
    marginals = jax.nn.one_hot(model.sequences(), VOCABULARY) * jnp.exp(
        model.tilt(reward, 1.0).sequence_log_probs()[:, None, None]
    )
    gradient = jax.grad(lambda scores: law._replace(scores=scores).log_z())(law.scores)
    np.testing.assert_allclose(gradient, marginals.sum(0), rtol=1e-10, atol=1e-14)
    check_grads(lambda *a: TiltedBigram(*a, *law[3:]).log_z(), law[:3], order=1, modes=("fwd", "rev"), eps=1e-6)


def test_jit_vmap_over_beta_and_single_precision(law):
    betas = jnp.array([0.5, 1.0, 3.0])
    normalizers = jax.jit(jax.vmap(lambda beta: law._replace(scores=law.scores / beta).log_z()))(betas)
    expected = [law._replace(scores=law.scores / beta).log_z() for beta in betas]
    np.testing.assert_allclose(normalizers, expected, rtol=1e-12)
    with jax.enable_x64(False):
        low = law._replace(**{name: getattr(law, name).astype(jnp.float32) for name in law._fields[:3]})
        out = low.log_z()
        assert out.dtype == jnp.float32
        assert low.next_token_log_probs(low.sample(jax.random.key(0), 3)).dtype == jnp.float32
    np.testing.assert_allclose(out, law.log_z(), rtol=1e-5)


def test_wrong_shapes_and_states_are_named(law):
    for name, wrong, message in (
        ("transitions", jnp.zeros((2, 3)), r"transitions must have shape \(3, 3\), got \(2, 3\)"),
        ("scores", jnp.zeros((4, 2)), r"scores must have shape \(4, 3\), got \(4, 2\)"),
        ("next_state", TWO_TWOS[:2], r"next_state must have shape \(4, 3\), got \(2, 3\)"),
        ("next_state", TWO_TWOS * 1.0, "next_state must be integers, got float64"),
        ("next_state", TWO_TWOS + 1, r"next_state must be in 0\.\.3, got \[\[1"),
        ("first_state", 7, r"first_state must be in 0\.\.3, got 7"),
        ("first_state", -1, r"first_state must be in 0\.\.3, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            law._replace(**{name: wrong}).log_z()
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, 4\], got \(5, 3\)"):
        law.next_token_log_probs(jnp.zeros((5, 3), int))

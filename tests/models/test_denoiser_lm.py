"""The denoiser of tokens: what it sees, what it must not depend on, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esscher.core import categorical
from esscher.core.exact import masked
from esscher.models import decoder, denoiser_lm
from esscher.models.decoder import Config
from esscher.models.functional import AXES

TINY = Config(vocabulary=5, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp=24)
MASK = 4
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
run = jax.jit(denoiser_lm.logits, static_argnames="config")


def draw(time=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: denoiser_lm.init(key, TINY, time=time), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), "float32"), shapes)


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 5, (4, 6)), jnp.int32)
TIMES = jnp.array([0.1, 0.4, 0.8, 1.0])


@pytest.mark.parametrize("time", [False, True])
def test_every_parameter_names_its_axes(time):
    params, axes = draw(time), denoiser_lm.axes(TINY, time=time)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(leaf.ndim, len(names)), params, axes)
    assert {name for names in jax.tree.leaves(axes) for name in [names]} <= {*AXES, None}
    assert set(params) - set(decoder.shapes(TINY)) == ({"time"} if time else set())


def test_a_single_token_is_read_as_by_the_decoder_and_more_are_not():
    """Without others to see the two are one network."""
    params, one = draw(), TOKENS[:, :1]
    expected = decoder.logits(params, TINY, decoder.hidden(params, TINY, one))
    close(run(params, TINY, one), expected)
    causal = decoder.logits(params, TINY, decoder.hidden(params, TINY, TOKENS))
    assert np.abs(run(params, TINY, TOKENS) - causal)[:, 0].max() > 0.01


def test_every_token_depends_on_every_other_and_on_no_other_row():
    """Gradients through the embeddings of four tokens of their own, one for each position of the first row."""
    params, tokens = draw(), jnp.array([[0, 1, 2, 3], [4, 4, 4, 4]])
    slopes = jax.jacobian(lambda table: run(params | {"embedding": table}, TINY, tokens)[..., 0])(params["embedding"])
    reach = np.abs(slopes).max(-1)  # [B, L, V]
    assert np.all(reach[0, :, :4] > 1e-5)
    assert not np.any(reach[0, :, 4])
    assert not np.any(reach[1, :, :4])


def test_rows_in_another_order_give_logits_in_that_order_and_positions_count():
    params, order = draw(), jnp.array([2, 0, 3, 1])
    out = run(params, TINY, TOKENS)
    close(run(params, TINY, TOKENS[order]), out[order])
    turned = run(params, TINY, TOKENS[:, ::-1])[:, ::-1]
    assert np.abs(turned - out).max() > 0.01


def test_padding_on_either_side_changes_nothing():
    """And may hold anything."""
    params, out = draw(), run(draw(), TINY, TOKENS)
    for left in (0, 2):
        padded = jnp.full((4, 8), 99).at[:, left : left + 6].set(TOKENS)
        mask = jnp.zeros((4, 8)).at[:, left : left + 6].set(1)
        close(run(params, TINY, padded, mask=mask)[:, left : left + 6], out)
    assert np.abs(run(params, TINY, jnp.pad(TOKENS, ((0, 0), (0, 2))))[:, :6] - out).max() > 0.01
    assert np.all(np.isnan(run(params, TINY, TOKENS.at[1, 2].set(99))[1]))


def test_time_is_used_by_parameters_that_have_it():
    plain, timed = draw(), draw(time=True)
    close(run(plain, TINY, TOKENS, TIMES), run(plain, TINY, TOKENS))
    out = run(timed, TINY, TOKENS, TIMES)
    other = run(timed, TINY, TOKENS, TIMES.at[1].set(0.9))
    close(other[jnp.array([0, 2, 3])], out[jnp.array([0, 2, 3])])
    assert np.abs(other[1] - out[1]).max() > 0.01
    fresh = denoiser_lm.init(jax.random.key(0), TINY, time=True)
    assert not np.any(fresh["time"])  # at the start it does not matter


def test_bfloat16_stays_near_float32_and_logits_are_float32():
    params = draw(time=True)
    coarse = run(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), TINY, TOKENS, TIMES)
    exact = run(params, TINY, TOKENS, TIMES)
    assert coarse.dtype == exact.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((coarse - exact) ** 2) / jnp.mean(exact**2))
    assert 1e-4 < error < 0.05


def test_a_time_of_another_type_leaves_the_network_its_own():
    params = draw() | {"time": draw(time=True)["time"]}
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), draw()) | {"time": params["time"]}
    seen = []

    def attention(query, key, value, **options):
        seen.append(query.dtype)
        return query

    jax.eval_shape(lambda params: denoiser_lm.logits(params, TINY, TOKENS, TIMES, attention=attention), half)
    assert {*seen} == {jnp.dtype("bfloat16")}


def test_keeping_less_for_the_gradient_changes_nothing():
    params = draw()
    loss = lambda params, remat: jnp.sum(denoiser_lm.logits(params, TINY, TOKENS, remat=remat) ** 2)  # noqa: E731
    whole, little = (jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params) for remat in (False, True))
    jax.tree.map(close, little, whole)


def test_it_learns_strings_whose_tokens_depend_on_each_other():
    """All of a string's tokens are one: the exact bound falls from that of independent ones, `4 log 4`, to `log 4`."""
    data = jnp.tile(jnp.arange(4), (4, 8)).T
    config = Config(vocabulary=5, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, mlp=64)
    optimizer = optax.adam(1e-2)

    def loss(params, key):
        time_key, mask_key = jax.random.split(key)
        t = (jnp.arange(32) + jax.random.uniform(time_key)) / 32
        x_t = categorical.mask_corrupt(mask_key, data, 1 - t, MASK)
        logits = categorical.subs_logits(denoiser_lm.logits(params, config, x_t), x_t, MASK)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), data[..., None], -1)[..., 0]
        return -jnp.mean(jnp.where(x_t == MASK, logps, 0).sum(-1) / t)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    def bound(params):
        def denoiser(x_t):
            logits = denoiser_lm.logits(params, config, x_t)
            return jax.nn.log_softmax(categorical.subs_logits(logits, x_t, MASK))

        return masked.nelbo(denoiser, data[:4], MASK).mean()

    @jax.jit
    def train(params):
        keys = jax.random.split(jax.random.key(1), 150)
        trained = jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
        return bound(params), bound(trained)

    before, after = train(denoiser_lm.init(jax.random.key(0), config))
    np.testing.assert_allclose(before, 4 * np.log(4), rtol=0.02)
    assert np.log(4) <= after < 1.1 * np.log(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: denoiser_lm.logits(p, TINY, TOKENS[0]), r"tokens must be integers \[B, L\], got int32 of \(6,\)"),
        (lambda p: denoiser_lm.logits(p, TINY, TOKENS, mask=TOKENS[0]), r"mask must have shape \(4, 6\), got \(6,\)"),
        (lambda p: denoiser_lm.logits(p, TINY, TOKENS), r"t must have shape \(4,\) for parameters with time, got None"),
        (
            lambda p: denoiser_lm.logits(p, Config(5, 16, 1, 4, 2, 4, 24, sliding=(True,), window=2), TOKENS),
            "config must have no sliding layers",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(time=True))

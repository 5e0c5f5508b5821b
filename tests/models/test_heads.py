"""Heads against their definitions, on the decoder and on states of our own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from esscher.core import meshes
from esscher.models import decoder, heads

CONFIG = decoder.Config(vocabulary=11, width=8, depth=2, heads=2, kv_heads=1, head_dim=4, mlp=12)
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
HEAD = heads.reward_init(jax.random.key(0), 8, bias=True) | {"bias": jnp.asarray(0.7)}


def test_reward_agrees_with_numpy():
    states, mask = normal(1, 4, 5, 8), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 1, 0, 0]])
    weight, rows = np.asarray(HEAD["weight"], np.float64), np.asarray(states, np.float64)
    expected = [weight @ rows[i, np.flatnonzero(mask[i])[-1]] + 0.7 for i in range(4)]
    for kind in (bool, np.int32, np.float32):
        np.testing.assert_allclose(heads.reward(HEAD, states, jnp.asarray(mask.astype(kind))), expected, atol=1e-5)


def test_reward_is_the_decoders_at_the_last_token_whatever_the_padding():
    params = jax.tree.map(lambda leaf: 10 * leaf, decoder.init(jax.random.key(0), CONFIG))
    plain = jnp.array([[3, 1, 4, 1, 5]])
    padded = jnp.array([[3, 1, 4, 1, 5, 0, 0, 0], [0, 0, 0, 3, 1, 4, 1, 5], [0, 3, 1, 4, 1, 5, 0, 0]])
    mask = (padded > 0).astype(jnp.int32)
    hidden = jax.jit(lambda tokens, segments: decoder.hidden(params, CONFIG, tokens, segments=segments))
    expected = heads.reward(HEAD, hidden(plain, jnp.zeros_like(plain)), jnp.ones_like(plain))
    rewards = heads.reward(HEAD, hidden(padded, mask - 1), mask)
    np.testing.assert_allclose(rewards, jnp.repeat(expected, 3), atol=1e-5)
    # The last place, where right padding is, would say something else.
    assert np.abs(heads.value(HEAD, hidden(padded, mask - 1))[0, -1] - expected[0]) > 0.1


def test_what_stands_under_padding_reaches_neither_reward_nor_gradient():
    states, mask = normal(1, 2, 4, 8), jnp.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    spoilt = jnp.where(mask[..., None] > 0, states, jnp.nan)
    total = lambda params, states: heads.reward(params, states, mask).sum()  # noqa: E731
    clean, nan = (jax.value_and_grad(total, argnums=(0, 1))(HEAD, x) for x in (states, spoilt))
    jax.tree.map(np.testing.assert_array_equal, nan, clean)
    np.testing.assert_array_equal(np.abs(clean[1][1]).sum(-1) > 0, [[0, 1, 0, 0], [0, 0, 0, 1]])
    appended = jnp.concatenate([states, normal(2, 2, 3, 8)], axis=1)
    longer = heads.reward(HEAD, appended, jnp.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(longer, heads.reward(HEAD, states, mask))


def test_a_row_without_tokens_gives_its_first_place():
    states = normal(1, 2, 4, 8)
    np.testing.assert_array_equal(heads.last_token(states, jnp.zeros((2, 4))), states[:, 0])


def test_weights_begin_with_the_stated_variance_and_values_at_zero():
    weight = heads.reward_init(jax.random.key(0), 4095)["weight"]
    # Four standard errors of a standard deviation from 4095 draws: 6e-5 by chance.
    np.testing.assert_allclose(weight.std() * np.sqrt(4096), 1, atol=4 / np.sqrt(2 * 4095))
    many = heads.classifier_init(jax.random.key(0), 15, 300)["weight"]
    np.testing.assert_allclose(many.std() * 4, 1, atol=4 / np.sqrt(2 * 4500))
    coarse = heads.reward_init(jax.random.key(0), 4095, dtype=jnp.bfloat16)["weight"]
    np.testing.assert_array_equal(coarse, weight.astype(jnp.bfloat16))  # and no draw of few values
    assert not np.any(heads.value(heads.value_init(8), normal(1, 2, 3, 8)))
    assert heads.value_init(8, bias=False).keys() == {"weight"}


def test_value_and_classifier_are_linear_at_every_token():
    states = normal(1, 2, 3, 8)
    np.testing.assert_allclose(heads.value(HEAD, states), states @ HEAD["weight"] + 0.7, atol=1e-5)
    params = heads.classifier_init(jax.random.key(1), 8, 5, bias=True) | {"bias": jnp.arange(5.0)}
    logits = heads.classify(params, states)
    assert logits.shape == (2, 3, 5)
    expected = [[h @ np.asarray(params["weight"]) + np.arange(5) for h in row] for row in np.asarray(states)]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_results_are_in_float32():
    states = normal(1, 2, 3, 8).astype(jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), HEAD)
    out = heads.value(params, states)
    assert out.dtype == jnp.float32
    exact = states.astype(jnp.float32) @ params["weight"].astype(jnp.float32) + params["bias"].astype(jnp.float32)
    np.testing.assert_allclose(out, exact, atol=1e-5)


def test_heads_are_split_like_the_network():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    params = jax.eval_shape(functools.partial(heads.classifier_init, width=8, classes=5, bias=True), jax.random.key(0))
    assert heads.axes(params) == {"weight": ("embed", "classes"), "bias": ("classes",)}
    specs = meshes.parameter_specs(heads.axes(HEAD), HEAD, mesh)
    assert specs == {"weight": PartitionSpec("fsdp"), "bias": PartitionSpec()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.reward_init(jax.random.key(0), 0), "width must be at least 1, got 0"),
        (lambda: heads.classifier_init(jax.random.key(0), 8, 0), "classes must be at least 1, got 0"),
        (lambda: heads.reward(HEAD, jnp.ones((2, 8)), jnp.ones(2)), r"hidden must be \[B, T, E\]"),
        (lambda: heads.reward(HEAD, jnp.ones((2, 0, 8)), jnp.ones((2, 0))), "T >= 1"),
        (lambda: heads.reward(HEAD, jnp.ones((2, 3, 8)), jnp.ones((2, 4))), r"mask must have shape \(2, 3\), got"),
        (lambda: heads.value(HEAD, jnp.ones((2, 3, 7))), r"params must hold a weight of \(7,\) for hidden of"),
        (lambda: heads.classify(HEAD, jnp.ones((2, 3, 8))), r"params must hold a weight of \(8, C\) for hidden of"),
    ],
)
def test_bad_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

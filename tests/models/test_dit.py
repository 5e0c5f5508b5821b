"""The diffusion transformer against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.models import dit
from esscher.models.functional import initializer

TINY = {"image_size": 4, "width": 8, "depth": 2, "heads": 2, "classes": 3}
LEVEL, LABEL = jnp.array([-0.8, 0.3]), jnp.array([1, 2])
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731


class Trunk(dit.DiT):
    __call__ = dit.DiT.trunk


DIT, TRUNK = functools.partial(dit.DiT, **TINY), functools.partial(Trunk, **TINY)
COLOURED = functools.partial(DIT, channels=3)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"image_size": 28, "channels": 3, "patch": 4, "width": 64, "depth": 3, "heads": 8, "classes": 5},
        {"width": 1152, "depth": 28, "heads": 16, "patch": 2, "channels": 4, "image_size": 32, "classes": 1000},
    ],
)
def test_number_of_parameters(sizes):
    full = {"channels": 1, "patch": 2, "width": 96, "depth": 4, "classes": 10} | sizes
    w, pixels = full["width"], full["patch"] ** 2 * full["channels"]
    affine = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    block = affine(w, 6 * w) + affine(w, 3 * w) + affine(w, w) + affine(w, 4 * w) + affine(4 * w, w)
    condition = affine(256, w) + affine(w, w) + (full["classes"] + 1) * w
    expected = affine(pixels, w) + condition + full["depth"] * block + affine(w, 2 * w) + affine(w, pixels)
    shapes = jax.eval_shape(initializer(functools.partial(dit.DiT, **sizes)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert sizes or expected == 723_844


def test_at_initialisation_a_block_is_the_identity_and_only_the_final_layer_learns(build):
    network, x = build(DIT), normal(1, 2, 4, 4, 1)
    params = network.init(jax.random.key(0))
    block = build(functools.partial(dit.Block, 8, 2))
    tokens, first = normal(1, 2, 4, 8), jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    np.testing.assert_array_equal(block.apply(first, tokens, normal(2, 2, 8)), tokens)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum((network.apply(params, x, LEVEL, LABEL) - x) ** 2)))(params)
    final = gradient.pop("out")
    assert min(np.abs(leaf).max() for leaf in final.values()) > 0.01
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_tokens_are_permuted_with_their_positions(build, randomize):
    network, tokens, condition = build(TRUNK), normal(1, 2, 4, 8), normal(2, 2, 8)
    params, order = randomize(network), jnp.array([2, 0, 3, 1])
    out = network.apply(params, tokens, condition)
    np.testing.assert_allclose(network.apply(params, tokens[:, order], condition), out[:, order], rtol=1e-4, atol=1e-5)
    assert np.abs(out[:, 0] - out[:, 1]).max() > 0.1


def test_positions_tell_equal_patches_apart(build, randomize):
    out = build(DIT).apply(randomize(build(DIT)), jnp.ones((2, 4, 4, 1)), LEVEL, LABEL)
    tokens = dit.patchify(out, 2)
    assert min(np.abs(tokens[:, i] - tokens[:, j]).max() for i in range(4) for j in range(i)) > 1e-3


def test_patches_are_read_row_by_row_and_put_back():
    x = normal(0, 2, 6, 6, 3)
    tokens = dit.patchify(x, 2)
    assert tokens.shape == (2, 9, 12)
    np.testing.assert_array_equal(tokens[1, 5].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(dit.unpatchify(tokens, 2, 3), x)


def test_positions_encode_the_column_then_the_row():
    width, side = 16, 3
    table = np.asarray(dit.positions(side, width)).reshape(side, side, width)
    line = lambda p: [f(p * 10000 ** (-i / (width / 4))) for f in (np.sin, np.cos) for i in range(width // 4)]  # noqa: E731
    for row in range(side):
        for column in range(side):
            np.testing.assert_allclose(table[row, column], line(column) + line(row), atol=1e-6)


def affine(layer, x, rows):
    return x @ layer["kernel"].reshape(rows, -1) + layer["bias"].reshape(-1)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def attention(layer, x):
    heads = []
    for q, k, v in affine(layer["qkv"], x, 8).reshape(4, 2, 3, 4).transpose(1, 2, 0, 3):
        weights = np.exp(q @ k.T / np.sqrt(4))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return affine(layer["projection"], np.concatenate(heads, -1), 8)


def forward(params, image, level, label):
    """The tiny network in NumPy: one example, head by head, from the equations."""
    angles = 100 * level * 10000.0 ** (-np.arange(128) / 128)
    part = params["conditioning"]
    hidden = silu(affine(part["hidden"], np.concatenate([np.cos(angles), np.sin(angles)]), 256))
    condition = silu(affine(part["out"], hidden, 8) + part["table"][label])
    patches = [image[i : i + 2, j : j + 2].reshape(-1) for i in (0, 2) for j in (0, 2)]
    h = affine(params["patch_embedding"], np.stack(patches), 12) + np.asarray(dit.positions(2, 8))
    for i in range(2):
        block = jax.tree.map(lambda leaf: leaf[i], params["blocks"])
        b1, s1, g1, b2, s2, g2 = affine(block["modulation"], condition, 8).reshape(6, 8)
        h = h + g1 * attention(block["attention"], norm(h) * (1 + s1) + b1)
        u = affine(block["hidden"], norm(h) * (1 + s2) + b2, 8)
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        h = h + g2 * affine(block["out"], gelu, 32)
    shift, scale = affine(params["modulation"], condition, 8).reshape(2, 8)
    patches = affine(params["out"], norm(h) * (1 + scale) + shift, 8).reshape(2, 2, 2, 2, 3)
    return patches.transpose(0, 2, 1, 3, 4).reshape(4, 4, 3)


def test_forward_pass_agrees_with_numpy(build, randomize):
    params, x = randomize(build(COLOURED), size=0.3), normal(7, 2, 4, 4, 3)
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = zip(*(np.asarray(leaf, np.float64) for leaf in (x, LEVEL)), LABEL, strict=True)
    expected = np.stack([forward(double, *row) for row in rows])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(build(COLOURED).apply(params, x, LEVEL, LABEL), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 5}, "image_size must be a multiple of 2, got 5"),
        ({"width": 10}, "width must be a multiple of 4, got 10"),
        ({"heads": 3}, "width must be a multiple of heads=3, got 8"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"depth": -1}, "depth must be an integer of at least 1, got -1"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_divide_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        initializer(functools.partial(dit.DiT, **TINY | sizes))

"""The U-Net: shapes, skips, resampling, normalisation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.models import unet
from esscher.models.functional import initializer

normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 8, "channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 2, "attention": (8,)},
        {"image_size": 12, "channels": 3, "width": 4, "multipliers": (1, 2, 3), "blocks": 1, "attention": (6, 3)},
        {"image_size": 5, "channels": 2, "width": 12, "multipliers": (2,), "blocks": 3, "attention": ()},
    ],
)
def test_shape_is_kept(sizes):
    network = initializer(functools.partial(unet.UNet, **sizes, classes=2))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    x = jnp.zeros((3, sizes["image_size"], sizes["image_size"], sizes["channels"]))
    assert jax.eval_shape(network.apply, shapes, x, jnp.zeros(3), jnp.zeros(3, int)).shape == x.shape


def test_every_parameter_counts(randomize):
    """No block is left out and no skip dropped: the gradient reaches every array."""
    sizes = {"image_size": 4, "channels": 2, "width": 4, "blocks": 1, "attention": (4,), "classes": 2}
    network = initializer(functools.partial(unet.UNet, **sizes))
    x, level, label = normal(3, 2, 4, 4, 2), jnp.array([-0.5, 0.6]), jnp.array([0, 2])
    loss = lambda params: jnp.sum(jnp.sin(network.apply(params, x, level, label)))  # noqa: E731
    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(randomize(network))):
        assert np.abs(leaf).max() > 1e-5, jax.tree_util.keystr(path)


def test_number_of_parameters():
    """From the table of blocks, by hand: 8 x 8, 32 and 64 channels, two blocks a level, attention at 8 x 8."""

    def block(read, write, attention=False, resample=False):
        total = 2 * read + 9 * read * write + write  # norm, first convolution
        total += 128 * 2 * write + 2 * write  # scale and shift
        total += 2 * write + 9 * write**2 + write  # norm, second convolution
        total += (read * write + write) * (resample or read != write)
        return total + attention * (2 * write + 3 * write**2 + 3 * write + write**2 + write)

    down = 2 * block(32, 32, attention=True) + block(32, 32, resample=True) + block(32, 64) + block(64, 64)
    middle = block(64, 64, attention=True) + block(64, 64)
    # Kept, first to last: 32 (input), 32, 32, 32 (down), 64, 64.
    up = 2 * block(64 + 64, 64) + block(64 + 32, 64) + block(64, 64, resample=True)
    up += block(64 + 32, 32) + block(32 + 32, 32) + block(32 + 32, 32, attention=True)
    rest = (256 * 128 + 128) + (128 * 128 + 128) + 11 * 128 + (9 * 32 + 32) + 2 * 32 + (9 * 32 + 1)
    shapes = jax.eval_shape(initializer(unet.UNet).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == down + middle + up + rest


def test_blocks_start_near_a_multiple_of_the_identity(build):
    x, condition = normal(0, 2, 4, 4, 8), normal(1, 2, 16)
    for attention, multiple in ((False, math.sqrt(0.5)), (True, 0.5)):
        network = build(functools.partial(unet.ResidualBlock, 8, 8, 16, attention=attention))
        out = network.apply(network.init(jax.random.key(0)), x, condition)
        np.testing.assert_allclose(out, multiple * x, atol=1e-4)


@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_block_agrees_with_its_equations(resample, build, randomize):
    network = build(functools.partial(unet.ResidualBlock, 4, 8, 6, resample=resample, attention=True))
    params, x, condition = randomize(network, size=0.4), normal(0, 2, 4, 4, 4), normal(1, 2, 6)
    silu = jax.nn.silu

    def norm(layer, x):  # four and eight channels: one and two groups of four
        parts = jnp.stack(jnp.split(x, x.shape[-1] // 4, -1))
        parts = (parts - parts.mean((2, 3, 4), keepdims=True)) / parts.std((2, 3, 4), keepdims=True)
        return jnp.concatenate(list(parts), -1) * layer["scale"] + layer["bias"]

    def conv(layer, x):
        kernel = jnp.asarray(layer["kernel"]).transpose(3, 2, 0, 1)
        return jax.lax.conv(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME").transpose(0, 2, 3, 1) + layer["bias"]

    def resized(x):
        return x.reshape(2, 2, 2, 2, 2, -1).mean((2, 4)) if resample == "down" else x.repeat(2, 1).repeat(2, 2)

    h = conv(params["conv_in"], resized(silu(norm(params["norm_in"], x))))
    modulation = params["modulation"]
    scale, shift = (condition @ modulation["kernel"][:, i] + modulation["bias"][i] for i in range(2))
    h = conv(params["conv_out"], silu(norm(params["norm_out"], h) * (1 + scale[:, None, None]) + shift[:, None, None]))
    h = (h + conv(params["skip"], resized(x))) / jnp.sqrt(2.0)
    attention, tokens = params["attention"], norm(params["norm"], h).reshape(2, -1, 8)
    qkv = jnp.einsum("bne,ehik->ibnhk", tokens, attention["qkv"]["kernel"])
    query, key, value = qkv + attention["qkv"]["bias"].transpose(1, 0, 2)[:, None, None]
    weights = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", query, key) / jnp.sqrt(8.0), -1)
    mixed = jnp.einsum("bhnm,bmhk,hke->bne", weights, value, attention["projection"]["kernel"])
    expected = (h + (mixed + attention["projection"]["bias"]).reshape(h.shape)) / jnp.sqrt(2.0)
    np.testing.assert_allclose(network.apply(params, x, condition), expected, rtol=1e-4, atol=1e-4)


def test_resampling_takes_means_and_copies():
    x = normal(0, 2, 4, 6, 3)
    small, large = unet._resample(x, "down"), unet._resample(x, "up")
    np.testing.assert_allclose(small[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(large[:, 5, 8], x[:, 2, 4])
    np.testing.assert_allclose(unet._resample(large, "down"), x, rtol=1e-6)


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (160, 32), (200, 25), (7, 1)])
def test_group_norm_is_over_space_and_groups_of_channels(channels, groups, build, randomize):
    network = build(lambda rngs: unet.GroupNorm(channels))
    params = randomize(network)
    x = np.random.default_rng(0).normal(1, 2, (2, 3, 3, channels)).astype("float32")
    parts = [p - p.mean((1, 2, 3), keepdims=True) for p in np.split(x, groups, -1)]
    parts = [p / np.sqrt((p**2).mean((1, 2, 3), keepdims=True) + 1e-6) for p in parts]
    expected = np.concatenate(parts, -1) * params["scale"] + params["bias"]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 6, "multipliers": (1, 2, 2)}, "image_size must be a multiple of 4, got 6"),
        ({"width": 2}, "width must be an integer of at least 4, got 2"),
        ({"blocks": -1}, "blocks must be an integer of at least 1, got -1"),
        ({"multipliers": ()}, "multipliers must have one entry per level, got none"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\] must be an integer of at least 1, got 0"),
        ({"multipliers": 2}, "multipliers must be a tuple, got 2"),
        ({"attention": 8}, "attention must be a tuple, got 8"),
        ({"attention": (8, 3)}, r"attention must be at resolutions among \(8, 4\), got \(8, 3\)"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        initializer(functools.partial(unet.UNet, **sizes))

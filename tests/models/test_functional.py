"""Modules as pure functions, and the names of their axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esscher.core import meshes
from esscher.models.dit import DiT
from esscher.models.functional import AXES, functional, initializer, logical_axes, parameter, stack, unstack
from esscher.models.mlp import MLP
from esscher.models.unet import UNet


class Chain(nnx.Module):
    """Eleven layers in a list: more than one digit, so that sorting by name would shuffle them."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(11)])

    def __call__(self, x, power=1):
        for layer in self.layers:
            x = jnp.tanh(layer(x)) ** power
        return x


X = jax.random.normal(jax.random.key(0), (4, 3))
NETWORKS = {
    "dit": functools.partial(DiT, image_size=4, width=8, depth=2, heads=2, classes=3),
    "unet": functools.partial(UNet, image_size=4, width=4, blocks=1, attention=(4,), classes=3),
    "mlp": functools.partial(MLP, width=8, depth=2, classes=3),
    "chain": Chain,
}
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def test_apply_is_the_module_under_every_transformation():
    module = Chain(nnx.Rngs(0))
    apply, params = functional(module)
    expected = module(X, power=3)
    np.testing.assert_array_equal(apply(params, X, power=3), expected)
    np.testing.assert_allclose(jax.jit(apply, static_argnames="power")(params, X, power=3), expected, rtol=1e-5)
    gradient = jax.grad(lambda params: apply(params, X).sum())(params)
    changed = jax.tree.map(lambda p, g: p + 1e-3 * g, params, gradient)
    gain = apply(changed, X).sum() - apply(params, X).sum()
    norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(gain, 1e-3 * norm, rtol=0.02)
    np.testing.assert_array_equal(module(X, power=3), expected)  # untouched


def test_a_jitted_apply_is_traced_once():
    traces = []

    class Counting(Chain):
        def __call__(self, x):
            traces.append(x)
            return super().__call__(x)

    apply, params = functional(Counting(nnx.Rngs(0)))
    run = jax.jit(apply)
    run(params, X), run(jax.tree.map(jnp.zeros_like, params), X + 1)
    assert len(traces) == 1


@each_network
def test_parameters_are_nested_dictionaries_with_string_keys(make):
    def check(tree):
        assert type(tree) is dict
        for key, value in tree.items():
            assert isinstance(key, str)
            assert isinstance(value, jax.ShapeDtypeStruct) or check(value)
        return True

    assert check(jax.eval_shape(initializer(make).init, jax.random.key(0)))


def test_initializer_needs_no_arrays_and_agrees_with_the_module():
    network, key = initializer(NETWORKS["mlp"]), jax.random.key(3)
    shapes, params = jax.eval_shape(network.init, key), network.init(key)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    apply, from_module = functional(NETWORKS["mlp"](rngs=nnx.Rngs(key)))
    jax.tree.map(np.testing.assert_array_equal, params, from_module)
    arguments = X[:, :2], jnp.zeros(4)
    np.testing.assert_array_equal(network.apply(params, *arguments), apply(from_module, *arguments))


def test_initialisation_is_vmapped_over_keys():
    network, keys = initializer(NETWORKS["mlp"]), jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(network.init)(keys)
    jax.tree.map(lambda s, p: np.testing.assert_allclose(s[1], p, rtol=1e-6), stacked, network.init(keys[1]))
    kernels = stacked["hidden"]["0"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@each_network
def test_every_parameter_names_its_axes_once(make):
    network = initializer(make)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    assert jax.tree.structure(network.axes, is_leaf=is_names) == jax.tree.structure(shapes)
    for names, leaf in zip(jax.tree.leaves(network.axes, is_leaf=is_names), jax.tree.leaves(shapes), strict=True):
        named = [name for name in names if name is not None]
        assert len(names) == leaf.ndim
        assert set(named) <= set(AXES)
        assert len(set(named)) == len(named)
    assert network.axes == logical_axes(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def test_axes_of_attention_and_feed_forward_are_the_ones_a_mesh_splits():
    block = initializer(NETWORKS["dit"]).axes["blocks"]
    assert block["attention"]["qkv"]["kernel"] == ("layers", "embed", "heads", None, "kv")
    assert block["attention"]["projection"]["kernel"] == ("layers", "heads", "kv", "embed")
    assert block["hidden"] == {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}
    assert block["out"]["kernel"] == ("layers", "mlp", "embed")


def test_stacked_modules_are_distinct_and_come_back_in_order():
    stacked = stack(functools.partial(MLP, width=4, depth=1), 3, nnx.Rngs(0))
    kernels = stacked.input.kernel[...]
    assert kernels.shape == (3, 2, 4)
    assert np.abs(kernels - kernels[::-1])[:2].max() > 0.1
    for layer, kernel in zip(unstack(stacked), kernels, strict=True):
        np.testing.assert_array_equal(layer.input.kernel[...], kernel)
    assert logical_axes(stacked)["input"]["kernel"] == ("layers", "patch", "embed")
    plain = stack(functools.partial(nnx.Linear, 2, 4), 3, nnx.Rngs(0))
    assert logical_axes(plain) == {"kernel": ("layers", None, None), "bias": ("layers", None)}


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("dit", [("blocks.hidden", (2, 4, 16)), ("blocks.attention.qkv", (2, 4, 1, 3, 4)), ("modulation", (4, 2, 4))]),
        ("unet", [("down.0.conv_in", (3, 3, 2, 2)), ("down.0.modulation", (8, 2, 2)), ("input", (3, 3, 1, 2))]),
    ],
)
def test_a_network_split_over_a_mesh_by_its_names_gives_the_same_numbers(name, shards, build, randomize):
    """And each of the four devices that share the parameters keeps a quarter of most of them."""
    network = build(NETWORKS[name])
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    layout = meshes.shardings(mesh, meshes.parameter_specs(network.axes, shapes, mesh))
    params, level, label = randomize(network), jnp.linspace(-1, 1, 8), jnp.arange(8) % 4
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
    split = jax.device_put(params, layout)
    kept = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, split)
    for path, shape in shards:
        assert functools.reduce(lambda tree, part: tree[part], path.split("."), kept)["kernel"].shape == shape
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    batch = jax.device_put((x, level, label), jax.sharding.NamedSharding(mesh, meshes.BATCH))
    alone = network.apply(params, x, level, label)
    np.testing.assert_allclose(network.apply(split, *batch), alone, rtol=1e-4, atol=1e-5)


def test_named_axes_do_not_ask_for_a_mesh():
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        params = functional(MLP(width=4, depth=1, rngs=nnx.Rngs(0)))[1]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))


def test_a_module_with_other_state_is_rejected_by_name():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match=r"parameters only, got other state at .*dropout"):
        functional(Noisy(nnx.Rngs(0)))


def test_a_name_for_each_dimension_is_required():
    with pytest.raises(ValueError, match=r"each of the 2 dimensions of \(3, 4\), got \('embed',\)"):
        parameter(jnp.zeros((3, 4)), ("embed",))

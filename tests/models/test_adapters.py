"""Adapters against their equations, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from esscher.core import checkpoints, meshes
from esscher.models import adapters, decoder

CONFIG = decoder.Config(vocabulary=11, width=8, depth=2, heads=2, kv_heads=1, head_dim=4, mlp=12)
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
RANK, ALPHA = 3, 6.0
EQUATIONS = dict.fromkeys(("query", "key", "value"), "le,lehd->lhd") | {"output": "lhd,lhde->le"}
EQUATIONS |= dict.fromkeys(("gate", "up", "down"), "li,lio->lo")
hidden = jax.jit(lambda params: decoder.hidden(params, CONFIG, TOKENS))


def tree(example, seed, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32), example)


PARAMS = tree(decoder.shapes(CONFIG), 0)
new = functools.partial(adapters.init, jax.random.key(0), PARAMS, rank=RANK)
compiled = jax.jit(adapters.merge, static_argnames="rank_stabilized")
merge = functools.partial(compiled, alpha=ALPHA)


def trained(dora=False):
    adapter = new(dora=dora)
    return jax.tree.map(jnp.add, adapter, tree(adapter, 1))


def double(*leaves):
    return [np.asarray(leaf, np.float64) for leaf in leaves]


# DoRA's `m / |V|` is 1 to the order in which the compiler sums the norm.
@pytest.mark.parametrize(("dora", "rtol"), [(False, 0), (True, 1e-6)])
def test_a_new_adapter_changes_nothing(dora, rtol):
    merged = merge(PARAMS, new(dora=dora))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), merged, PARAMS)
    np.testing.assert_allclose(hidden(merged), hidden(PARAMS), rtol=10 * rtol, atol=10 * rtol)
    assert not np.allclose(hidden(merge(PARAMS, trained(dora))), hidden(PARAMS), atol=0.01)


def test_first_factors_are_uniform_and_number_of_parameters():
    adapter = new()
    assert list(adapter) == ["layers"]
    for name, inputs in {"query": 8, "output": 8, "gate": 8, "down": 12}.items():
        a = adapter["layers"][name]["a"]
        assert 0.8 * inputs**-0.5 < np.abs(a).max() <= inputs**-0.5
        assert np.abs(a[0] - a[1]).max() > 0.01  # layers differ
    sides = {"query": 8 + 8, "key": 8 + 4, "value": 8 + 4, "output": 8 + 8, "gate": 20, "up": 20, "down": 20}
    assert adapters.count(adapter) == 2 * RANK * sum(sides.values())
    assert adapters.count(new(dora=True)) - adapters.count(adapter) == 2 * (8 + 4 + 4 + 8 + 12 + 12 + 8)
    named = new(targets=("value", "unembedding"))
    assert named.keys() == {"layers", "unembedding"}
    assert named["layers"].keys() == {"value"}
    assert named["unembedding"]["b"].shape == (RANK, 11)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_weights_act_as_weight_plus_scaled_factors(rank_stabilized):
    adapter = trained()
    merged = merge(PARAMS, adapter, rank_stabilized=rank_stabilized)
    scale = ALPHA / np.sqrt(RANK) if rank_stabilized else ALPHA / RANK
    for name, equation in EQUATIONS.items():
        weight, a, b, new = double(PARAMS["layers"][name], *adapter["layers"][name].values(), merged["layers"][name])
        x = np.random.default_rng(2).standard_normal(a.shape[:-1])
        into, out = equation.split("->")[0].split(",")[0], equation.split("->")[1]
        low = np.einsum(f"{into},{into}r->lr", x, a)
        expected = np.einsum(equation, x, weight) + scale * np.einsum(f"lr,lr{out[1:]}->{out}", low, b)
        np.testing.assert_allclose(np.einsum(equation, x, new), expected, atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], PARAMS["embedding"])


def test_unmerging_gives_the_weights_back():
    adapter = trained()
    for form in (False, True):
        merged = merge(PARAMS, adapter, rank_stabilized=form)
        back = jax.jit(functools.partial(adapters.unmerge, rank_stabilized=form))(merged, adapter, alpha=ALPHA)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), back, PARAMS)
    with pytest.raises(ValueError, match="adapter must be LoRA"):
        adapters.unmerge(merged, trained(dora=True), alpha=ALPHA)


def test_layers_merged_one_by_one_are_the_same():
    adapter = trained(dora=True)
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[1], (PARAMS["layers"], adapter["layers"]))
    whole = jax.tree.map(lambda leaf: np.asarray(leaf)[1], merge(PARAMS, adapter)["layers"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), merge(*one), whole)


def test_magnitudes_are_norms_of_the_merged_weights():
    adapter = trained(dora=True)
    layers = merge(PARAMS, adapter)["layers"]
    for name, inputs in (("query", (1,)), ("output", (1, 2)), ("down", (1,))):
        norms = np.sqrt(np.square(layers[name]).sum(inputs))
        np.testing.assert_allclose(norms, np.abs(adapter["layers"][name]["magnitude"]), rtol=1e-5)


def test_only_the_adapter_is_trained_and_at_first_not_through_the_zero_factor():
    loss = lambda adapter: jnp.sum(hidden(merge(PARAMS, adapter))[:, -1] ** 3)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    first, adapter = gradient(new(dora=True)), new(dora=True)
    assert jax.tree.structure(first) == jax.tree.structure(adapter)
    for leaf in first["layers"].values():
        assert not np.any(leaf["a"])
        assert min(np.abs(leaf[part]).max() for part in ("b", "magnitude")) > 1e-3
    later = gradient(trained(dora=True))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(later)) > 1e-3


def test_gradient_of_dora_stops_at_the_norm():
    adapter, names = trained(dora=True), ("query", "output")
    slopes = tree({name: PARAMS["layers"][name] for name in names}, 3)
    inner = lambda adapter: sum(  # noqa: E731
        jnp.vdot(slopes[name], merge(PARAMS, adapter)["layers"][name]) for name in names
    )
    gradient = jax.jit(jax.grad(inner))(adapter)["layers"]
    # Both as matrices [L, in, out]: a query has one axis of inputs, an output has two.
    shapes = {"query": (2, 8, 8), "output": (2, 8, 8)}
    for name, shape in shapes.items():
        leaf = adapter["layers"][name]
        weight, slope = (np.reshape(x, shape) for x in double(PARAMS["layers"][name], slopes[name]))
        a, b, m = double(leaf["a"], leaf["b"], leaf["magnitude"])
        a, b, m = a.reshape(2, 8, RANK), b.reshape(2, RANK, 8), m.reshape(2, 1, 8)
        v = weight + ALPHA / RANK * a @ b
        norm = np.sqrt((v**2).sum(1, keepdims=True))
        by_v = slope * m / norm
        expected = {
            "a": ALPHA / RANK * by_v @ b.swapaxes(1, 2),
            "b": ALPHA / RANK * a.swapaxes(1, 2) @ by_v,
            "magnitude": (slope * v / norm).sum(1),
        }
        full = by_v - v / norm * (by_v * v / norm).sum(1, keepdims=True)  # what no stopped gradient would give
        for part, value in expected.items():
            np.testing.assert_allclose(gradient[name][part].reshape(value.shape), value, rtol=1e-4, atol=1e-5)
        assert np.abs(expected["b"] - ALPHA / RANK * a.swapaxes(1, 2) @ full).max() > 0.1


def test_an_output_whose_weights_are_zero_stays_zero():
    params = {"down": jnp.zeros((4, 2))}
    adapter = adapters.init(jax.random.key(0), params, rank=1, targets=["down"], dora=True)
    value, gradient = jax.value_and_grad(lambda adapter: merge(params, adapter)["down"].sum())(adapter)
    assert value == 0
    assert np.isfinite(ravel_pytree(gradient)[0]).all()


def test_rank_r_fits_a_difference_of_rank_r(x64):
    rng = np.random.default_rng(0)
    base, x = rng.standard_normal((6, 5)), rng.standard_normal((20, 6))
    teacher = base + rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    params = {"down": jnp.asarray(base)}
    a = adapters.init(jax.random.key(1), params, rank=2, targets=["down"], dtype=jnp.float64)["down"]["a"]
    wanted = (teacher - base) / (ALPHA / 2)
    b = jnp.asarray(np.linalg.pinv(a) @ wanted)  # least squares in one factor, then in the other
    a = jnp.asarray(wanted @ np.linalg.pinv(b))
    adapted = x @ merge(params, {"down": {"a": a, "b": b}})["down"]
    np.testing.assert_allclose(adapted, x @ teacher, atol=1e-6)


def test_strength_is_traced():
    adapter, alphas = trained(), jnp.array([0.0, 1.0, 4.0])
    out = jax.jit(jax.vmap(lambda alpha: merge(PARAMS, adapter, alpha=alpha)["layers"]))(alphas)
    np.testing.assert_array_equal(out["up"][0], PARAMS["layers"]["up"])
    np.testing.assert_allclose(out["up"][2] - out["up"][0], 4 * (out["up"][1] - out["up"][0]), atol=1e-5)


def test_types_are_those_of_the_weights():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    coarse, fine = (new(dtype=dtype)["layers"]["up"]["a"] for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_array_equal(coarse, fine.astype(jnp.bfloat16))  # and no draw of few values
    adapter = adapters.init(jax.random.key(0), half, rank=2, dora=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    merged = merge(half, adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, merged, half)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path):
    adapter, strength = trained(dora=True), {"alpha": ALPHA, "rank_stabilized": False}
    with checkpoints.open(tmp_path, config=strength) as store:
        store.save(1, adapter, {"loss": 0.5})
    restored = checkpoints.open(tmp_path).restore_latest(jax.eval_shape(lambda: new(dora=True)))
    jax.tree.map(np.testing.assert_array_equal, restored.state, adapter)
    params = adapters.merge(PARAMS, restored.state, **restored.config)
    np.testing.assert_array_equal(hidden(params), hidden(merge(PARAMS, adapter)))


def test_factors_are_split_like_their_weights():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    adapter = trained(dora=True)
    names = adapters.axes(decoder.axes(CONFIG), adapter)
    assert names["layers"]["output"] == {
        "a": ("layers", "heads", "kv", None),
        "b": ("layers", None, "embed"),
        "magnitude": ("layers", "embed"),
    }
    assert "magnitude" not in adapters.axes(decoder.axes(CONFIG), new())["layers"]["gate"]
    specs = meshes.parameter_specs(names, adapter, mesh)
    assert specs["layers"]["query"] == {
        "a": PartitionSpec(None, "fsdp", None),
        "b": PartitionSpec(None, None, "tensor", None),
        "magnitude": PartitionSpec(None, "tensor", None),
    }
    assert specs["layers"]["down"]["a"] == PartitionSpec(None, "tensor", None)
    assert specs["layers"]["key"]["b"] == PartitionSpec(None, None, None, None)  # one head
    weights = meshes.shardings(mesh, meshes.parameter_specs(decoder.axes(CONFIG), PARAMS, mesh))
    split = jax.device_put((PARAMS, adapter), (weights, meshes.shardings(mesh, specs)))
    merged = jax.jit(merge, out_shardings=weights)(*split)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), merged, merge(PARAMS, adapter))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: new(rank=0), "rank must be at least 1, got 0"),
        (
            lambda: new(targets=("quarry", "up", "embedding")),
            "targets must be among down, gate, key, output, query, unembedding, up, value, got embedding, quarry",
        ),
        (lambda: new(targets="query"), r"targets must be several names, such as \['query'\], got the string 'query'"),
        (
            lambda: adapters.init(jax.random.key(0), decoder.shapes(CONFIG), rank=1, dora=True),
            "params must be arrays for dora, which takes their norms, got shapes",
        ),
        (lambda: new(targets=("up",), splits={"up": (2, 2)}), r"splits gives up 2 \+ 2 axes, but its shape is"),
        (
            lambda: merge({"layers": {}}, new(targets=("up",))),
            "adapter must fit params, which have no layers/up",
        ),
        (
            lambda: merge(decoder.init(jax.random.key(0), CONFIG)["layers"] | {"up": jnp.zeros((2, 8, 7))}, UP),
            r"adapter must fit params, got a\(2, 8, 3\) and b\(2, 3, 12\) for a weight of \(2, 8, 7\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


UP = new(targets=("up",))["layers"]

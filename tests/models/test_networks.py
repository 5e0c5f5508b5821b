"""What holds for every network: zero at initialisation, precision, vmap, labels, shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.models.dit import DiT
from esscher.models.functional import initializer
from esscher.models.mlp import MLP
from esscher.models.unet import UNet

B, CLASSES = 4, 3


def dit(dtype="float32"):
    return functools.partial(DiT, image_size=4, width=16, depth=2, heads=2, classes=CLASSES, dtype=dtype)


def unet(dtype="float32"):
    sizes = {"image_size": 4, "width": 8, "multipliers": (1,), "blocks": 1, "attention": (4,)}
    return functools.partial(UNet, **sizes, classes=CLASSES, dtype=dtype)


def mlp(dtype="float32"):
    return functools.partial(MLP, dimension=5, width=16, depth=2, classes=CLASSES, dtype=dtype)


NETWORKS = {"dit": (dit, (4, 4, 1)), "unet": (unet, (4, 4, 1)), "mlp": (mlp, (5,))}
each_network = pytest.mark.parametrize(("make", "event"), NETWORKS.values(), ids=NETWORKS)

LEVEL, LABEL = jnp.array([-1.2, -0.3, 0.4, 1.0]), jnp.array([2, 0, 3, 1])


def inputs(event):
    return jax.random.normal(jax.random.key(5), (B, *event)), LEVEL, LABEL


def largest(x):
    """Largest absolute value of each example."""
    return np.abs(x).max(tuple(range(1, x.ndim)))


@functools.cache
def build(make, dtype="float32"):
    """The compiled network, and the shapes of its parameters."""
    network = initializer(make(dtype))
    return jax.jit(network.apply), jax.eval_shape(network.init, jax.random.key(0))


@each_network
def test_output_is_exactly_zero_at_initialisation(make, event, randomize):
    apply, shapes = build(make)
    out = apply(initializer(make()).init(jax.random.key(0)), *inputs(event))
    assert out.shape == (B, *event)
    assert not np.any(out)
    assert np.all(largest(apply(randomize(shapes), *inputs(event))) > 0.01)


@each_network
def test_bfloat16_stays_near_float32(make, event, randomize):
    apply, params = build(make)
    coarse, shapes = build(make, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params, arguments = randomize(params), inputs(event)
    fine, out = apply(params, *arguments), coarse(params, *arguments)
    assert out.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((out - fine) ** 2) / jnp.mean(fine**2))
    assert 1e-4 < error < 0.03  # eight bits of mantissa; exactly float32 would mean that dtype is ignored
    assert coarse(params, arguments[0].astype(jnp.bfloat16), *arguments[1:]).dtype == jnp.bfloat16


@each_network
def test_vmap_over_stacked_parameters_is_a_loop(make, event, randomize):
    apply, params = build(make)
    members = [randomize(params, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    out = jax.jit(jax.vmap(apply, in_axes=(0, None, None, None)))(stacked, *inputs(event))
    for member, got in zip(members, out, strict=True):
        np.testing.assert_allclose(got, apply(member, *inputs(event)), rtol=2e-4, atol=2e-4)


@each_network
def test_examples_do_not_see_each_other_and_each_input_counts(make, event, randomize):
    apply, params = build(make)
    params, (x, level, label) = randomize(params), inputs(event)
    out = apply(params, x, level, label)
    np.testing.assert_allclose(apply(params, x[::-1], level[::-1], label[::-1])[::-1], out, rtol=1e-4, atol=1e-5)
    for changed in ((x.at[0].add(0.5), level, label), (x, level.at[0].add(0.5), label), (x, level, label.at[0].set(0))):
        moved = largest(apply(params, *changed) - out)
        assert moved[0] > 1e-3
        np.testing.assert_allclose(moved[1:], 0, atol=1e-5)


@each_network
def test_no_label_is_the_null_class_and_a_wrong_one_gives_nan(make, event, randomize):
    apply, params = build(make)
    params, (x, level, _) = randomize(params), inputs(event)
    null = apply(params, x, level, jnp.full(B, CLASSES))
    np.testing.assert_allclose(apply(params, x, level), null, rtol=1e-5, atol=1e-6)
    out = apply(params, x, level, jnp.array([CLASSES, CLASSES + 1, CLASSES, -1]))
    np.testing.assert_array_equal(np.isnan(largest(out)), [False, True, False, True])


@each_network
def test_wrong_arguments_are_named(make, event):
    apply, params = build(make)
    x, level, label = inputs(event)
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        apply(params, x[0], level, label)
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        apply(params, x[..., :0], level, label)
    with pytest.raises(ValueError, match=r"noise_level must have shape \(4,\) .* got \(3,\)"):
        apply(params, x, level[:3], label)
    with pytest.raises(ValueError, match=r"label must be integers of shape \(4,\), got int32 of \(4, 1\)"):
        apply(params, x, level, label[:, None])
    with pytest.raises(ValueError, match=r"label must be integers .* got float32"):
        apply(params, x, level, label.astype(float))


@each_network
def test_double_precision_is_double_all_the_way(make, event, randomize, x64):
    """Finite differences with a step of 1e-5 would be noise if any layer computed in float32."""
    network = initializer(make("float64"))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), randomize(shapes))
    x, level, label = jax.tree.map(lambda a: jnp.asarray(a, "float64") if a.ndim != 1 else a, inputs(event))
    run = jax.jit(lambda x: network.apply(params, x, level.astype("float64"), label))
    direction, step = jax.random.normal(jax.random.key(9), x.shape), 1e-5
    _, slope = jax.jvp(run, (x,), (direction,))
    np.testing.assert_allclose((run(x + step * direction) - run(x - step * direction)) / (2 * step), slope, rtol=1e-5)

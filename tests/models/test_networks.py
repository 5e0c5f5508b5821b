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
NETWORKS = {
    "dit": (functools.partial(DiT, image_size=4, width=16, depth=2, heads=2, classes=CLASSES), (4, 4, 1)),
    "unet": (
        functools.partial(UNet, image_size=4, width=8, multipliers=(1,), blocks=1, attention=(4,), classes=CLASSES),
        (4, 4, 1),
    ),
    "mlp": (functools.partial(MLP, dimension=5, width=16, depth=2, classes=CLASSES), (5,)),
}
each_network = pytest.mark.parametrize(("make", "event"), NETWORKS.values(), ids=NETWORKS)

LEVEL, LABEL = jnp.array([-1.2, -0.3, 0.4, 1.0]), jnp.array([2, 0, 3, 1])


def inputs(event):
    return jax.random.normal(jax.random.key(5), (B, *event)), LEVEL, LABEL


def largest(x):
    """Largest absolute value of each example."""
    return np.abs(x).max(tuple(range(1, x.ndim)))


@each_network
def test_output_is_exactly_zero_at_initialisation(make, event, build, randomize):
    network = build(make)
    out = network.apply(network.init(jax.random.key(0)), *inputs(event))
    assert out.shape == (B, *event)
    assert not np.any(out)
    assert np.all(largest(network.apply(randomize(network), *inputs(event))) > 0.01)


@each_network
def test_bfloat16_stays_near_float32(make, event, build, randomize):
    fine, coarse = build(make), build(functools.partial(make, dtype="bfloat16"))
    params, (x, level, label) = randomize(fine), inputs(event)
    shapes = jax.eval_shape(coarse.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    exact, out = (network.apply(params, x, level, label) for network in (fine, coarse))
    assert out.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2))
    assert 1e-4 < error < 0.03  # eight bits of mantissa; exactly float32 would mean that dtype is ignored
    assert jax.eval_shape(coarse.apply, params, x.astype("bfloat16"), level, label).dtype == jnp.bfloat16


@each_network
def test_vmap_over_stacked_parameters_is_a_loop(make, event, build, randomize):
    network = build(make)
    members = [randomize(network, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    out = jax.jit(jax.vmap(network.apply, in_axes=(0, None, None, None)))(stacked, *inputs(event))
    for member, got in zip(members, out, strict=True):
        np.testing.assert_allclose(got, network.apply(member, *inputs(event)), rtol=2e-4, atol=2e-4)


@each_network
def test_examples_do_not_see_each_other_and_each_input_counts(make, event, build, randomize):
    network = build(make)
    run, (x, level, label) = functools.partial(network.apply, randomize(network)), inputs(event)
    out = run(x, level, label)
    np.testing.assert_allclose(run(x[::-1], level[::-1], label[::-1])[::-1], out, rtol=1e-4, atol=1e-5)
    for changed in ((x.at[0].add(0.5), level, label), (x, level.at[0].add(0.5), label), (x, level, label.at[0].set(0))):
        moved = largest(run(*changed) - out)
        assert moved[0] > 1e-3
        np.testing.assert_allclose(moved[1:], 0, atol=1e-5)


@each_network
def test_a_label_out_of_range_gives_nan_and_none_is_allowed(make, event, build, randomize):
    network = build(make)
    params, (x, level, _) = randomize(network), inputs(event)
    out = network.apply(params, x, level, jnp.array([CLASSES, CLASSES + 1, CLASSES, -1]))
    np.testing.assert_array_equal(np.isnan(largest(out)), [False, True, False, True])
    assert jax.eval_shape(network.apply, params, x, level).shape == x.shape


@each_network
def test_wrong_arguments_are_named(make, event, build, randomize):
    network = build(make)
    run, (x, level, label) = functools.partial(network.apply, randomize(network)), inputs(event)
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        run(x[0], level, label)
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        run(x[..., :0], level, label)
    with pytest.raises(ValueError, match=r"noise_level must have shape \(4,\) .* got \(3,\)"):
        run(x, level[:3], label)
    with pytest.raises(ValueError, match=r"label must be integers of shape \(4,\), got int32 of \(4, 1\)"):
        run(x, level, label[:, None])
    with pytest.raises(ValueError, match=r"label must be integers .* got float32"):
        run(x, level, label.astype(float))
    with pytest.raises(ValueError, match="x must be of a floating type, got int32"):
        run(x.astype(int), level, label)  # whose result would be cut to integers
    with pytest.raises(ValueError, match=r"noise_level must have shape \(4,\) .* got \(\)"):
        run(x, 0.3, label)
    assert jax.eval_shape(run, x, level, [2, 0, 3, 1]).shape == x.shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 0}, "width must be an integer of at least [14], got 0"),
        ({"width": 8.0}, r"width must be an integer of at least [14], got 8\.0"),
        ({"classes": -1}, "classes must be an integer of at least 0, got -1"),
        ({"dtype": "int32"}, "dtype must be of a floating type, got int32"),
    ],
)
@each_network
def test_impossible_sizes_are_named(make, event, sizes, message):
    with pytest.raises(ValueError, match=message):
        initializer(functools.partial(make, **sizes))


@each_network
def test_double_precision_is_double_all_the_way(make, event, build, randomize, x64):
    """Finite differences with a step of 1e-5 would be noise if any layer computed in float32."""
    network = build(functools.partial(make, dtype="float64"))
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), randomize(network))
    x, level, label = inputs(event)
    x, level = x.astype("float64"), level.astype("float64")
    direction, step = jax.random.normal(jax.random.key(9), x.shape), 1e-5
    both = jax.jit(lambda x: jax.jvp(lambda x: network.apply(params, x, level, label), (x,), (direction,)))
    ahead, behind = (both(x + sign * step * direction)[0] for sign in (1, -1))
    np.testing.assert_allclose((ahead - behind) / (2 * step), both(x)[1], rtol=1e-5, atol=1e-8)

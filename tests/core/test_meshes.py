"""Meshes are what was asked for; parameters are split by the names of their axes; a step is the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from esscher.core import meshes, training
from esscher.core.errors import UsageError


def test_the_open_axis_takes_the_devices_that_are_left():
    assert dict(meshes.make().shape) == {"sweep": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert dict(meshes.make(data=-1, fsdp=2, tensor=2).shape) == {"sweep": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make(data=2, sweep=3).shape) == {"sweep": 3, "data": 2, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 16}, {"data": -1, "tensor": 3}, {"data": -1, "fsdp": -1}])
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes):
    with pytest.raises(UsageError, match=r"^mesh sweep=1,data=.*$"):
        meshes.make(**sizes)


@pytest.mark.parametrize("text", ["date=8", "data", "data=0", "data=x", "data=-2", "data=²"])
def test_a_mistyped_mesh_is_named(text):
    with pytest.raises(UsageError, match=f"--mesh {text}: write axis=size"):
        meshes.parse(text)


def test_an_axis_is_given_once():
    with pytest.raises(UsageError, match=r"--mesh data=4: write axis=size, each axis of .* once"):
        meshes.parse("data=2,data=4")


def test_several_processes_use_all_their_devices(monkeypatch):
    assert meshes.make(data=4).size == 4
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match=r"data=4.* does not fit 8 device"):
        meshes.make(data=4)


def test_an_unknown_slice_is_refused():
    with pytest.raises(UsageError, match="cannot compile for 'v99:1x1'"):
        meshes.topology("v99:1x1")


PARAMETERS = {"in": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "odd": jnp.ones((3, 4))}
AXES = {"in": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}, "odd": ("mlp", "mlp")}


def test_parameters_are_split_by_rule_where_the_dimension_allows():
    specs = meshes.parameter_specs(AXES, PARAMETERS, meshes.make(data=2, fsdp=2, tensor=2))
    assert specs == {"in": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "odd": P(None, "tensor")}
    whole = meshes.parameter_specs(AXES, PARAMETERS, meshes.make(data=8))
    assert whole == {"in": {"kernel": P(None, None), "bias": P(None)}, "odd": P(None, None)}


def test_optimiser_state_and_moving_average_are_laid_out_like_the_parameters():
    specs = meshes.parameter_specs(AXES, PARAMETERS, meshes.make(data=2, fsdp=2, tensor=2))
    state = training.init(PARAMETERS, optax.adamw(1e-3))
    laid_out = meshes.like_parameters(state, PARAMETERS, specs)
    assert laid_out.params == laid_out.ema == laid_out.opt_state[0].mu == laid_out.opt_state[0].nu == specs
    assert laid_out.step == laid_out.opt_state[0].count == P()


def loss(params, key, batch, hyper):
    hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"])
    return jnp.mean((hidden[:, :3] @ params["odd"] - jax.random.normal(key, batch.shape)) ** 2) * hyper["scale"], {}


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]
)
def test_a_sharded_step_is_the_step(sizes):
    mesh, optimizer = meshes.make(**sizes), optax.adam(1e-2)
    state = training.init(jax.tree.map(lambda x: x * 0.3, PARAMETERS), optimizer)
    specs = meshes.like_parameters(state, PARAMETERS, meshes.parameter_specs(AXES, PARAMETERS, mesh))
    placed = jax.device_put(state, meshes.shardings(mesh, specs))
    hyper = {"scale": jnp.asarray(1.3), "ema_decay": jnp.asarray(0.9)}
    batch = jax.random.normal(jax.random.key(1), (16, 4))
    step = jax.jit(training.make_step(loss, lambda hyper: optimizer))
    for _ in range(3):
        state, alone = step(state, jax.random.key(0), batch, hyper)
        placed, together = step(placed, jax.random.key(0), meshes.place(batch, mesh), hyper)
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), placed, state)
    kernel = placed.params["in"]["kernel"]
    assert kernel.sharding.is_equivalent_to(meshes.shardings(mesh, specs).params["in"]["kernel"], kernel.ndim)

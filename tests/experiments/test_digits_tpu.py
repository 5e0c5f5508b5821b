"""The training step and the sampler of the digits run compile for a TPU slice, by the real compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esscher.core import meshes, sweeps
from esscher.experiments import digits, sampling, steered

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'esscher[tpu]' (Linux, x86-64)")


@pytest.fixture(scope="module")
def devices():
    return meshes.topology("v5e:2x4")


def abstract(mesh, spec, shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


CASES = {
    "data=8": ({"data": 8}, digits.Hyper()),
    "data=2,fsdp=2,tensor=2": ({"data": 2, "fsdp": 2, "tensor": 2}, digits.Hyper()),
    "sweep=4,data=2": ({"sweep": 4, "data": 2}, digits.Hyper(lr=(1e-4, 3e-4, 1e-3, 3e-3))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_training_step_compiles_for_a_slice_and_splits_the_batch(devices, case):
    sizes, hyper = CASES[case]
    config, mesh = (
        dataclasses.replace(digits.Config(), dtype="bfloat16", hyper=hyper),
        meshes.make(**sizes, devices=devices),
    )
    sweep = sweeps.grid(hyper, divisor=mesh.shape["sweep"])
    program, _ = digits.build(config, (8, 8, 1), 10, mesh, sweep)
    batch = {
        "image": abstract(mesh, meshes.BATCH, (128, 8, 8, 1)),
        "label": abstract(mesh, meshes.BATCH, (128,), jnp.int32),
    }
    members = PartitionSpec("sweep") if sweep.swept else PartitionSpec()
    values = {name: abstract(mesh, members, value.shape) for name, value in sweep.values.items()}
    key = abstract(mesh, PartitionSpec(), (), jax.random.key(0).dtype)
    compiled = program.step.lower(program.state, key, batch, values).compile()
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state)) / mesh.shape["sweep"]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.9 * state / mesh.shape["fsdp"] / mesh.shape["tensor"]  # the state is donated


def test_the_sampler_compiles_for_a_slice(devices):
    mesh = meshes.make(data=8, devices=devices)
    program, network = digits.build(digits.Config(), (8, 8, 1), 10, mesh, sweeps.grid(digits.Hyper()))

    def denoise(params, x, sigma, label):
        return network(params, x, sigma, label, 0.75)

    sample = sampling.sampler(denoise, (8, 8, 1), 10, sampling.SOLVERS["DPM-Solver++(2M)"][0](sampling.EDM))
    whole = NamedSharding(mesh, PartitionSpec())
    key, w, times = (
        jax.ShapeDtypeStruct(s, d, sharding=whole)
        for s, d in [((), jax.random.key(0).dtype), ((), jnp.float32), ((21,), jnp.float32)]
    )
    label = abstract(mesh, meshes.BATCH, (64,), jnp.int32)
    compiled = jax.jit(sample).lower(program.state.ema, key, label, w, times).compile()
    assert compiled.output_shardings.spec[0] == "data" or compiled.output_shardings.is_equivalent_to(
        NamedSharding(mesh, meshes.BATCH), 4
    )


def test_a_steering_sampler_compiles_for_a_slice_and_splits_its_particles(devices):
    mesh = meshes.make(data=8, devices=devices)
    program, network = digits.build(digits.Config(depth=1), (8, 8, 1), 10, mesh, sweeps.grid(digits.Hyper()))

    def denoise(params, x, sigma, label):
        return network(params, x, sigma, label, 0.75)

    whole = NamedSharding(mesh, PartitionSpec())
    shapes = steered.Goal((), (), (64, 10), (10,), (), (8, 8, 1), (8, 8, 1), (), ())
    goal = steered.Goal(*(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for shape in shapes))
    goal = goal._replace(target=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    times = jax.ShapeDtypeStruct((33,), jnp.float32, sharding=whole)
    sample = steered.sampler(steered.METHODS["TDS"], denoise, (8, 8, 1), 10, mesh, 64)
    text = jax.jit(sample).lower(program.state.ema, key, goal, times).compile().as_text()
    assert "[32,16,96]" in text  # 4 x 64 particles over eight devices, their tokens and the width
    assert "[256,16,96]" not in text

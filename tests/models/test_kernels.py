"""The kernel that docs/kernels.md shows computes attention, and compiles for a TPU inside the decoder."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes
from esscher.models import decoder
from esscher.models.attention import dot_product_attention


@pytest.fixture(scope="module")
def splash_attention():
    page = pathlib.Path(__file__).parents[2] / "docs" / "kernels.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    return names["splash_attention"]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_kernel_is_attention(splash_attention, softcap):
    query, key, value = (
        jax.random.normal(k, (2, 128, heads, 128))
        for k, heads in zip(jax.random.split(jax.random.key(0), 3), (2, 1, 1), strict=True)
    )
    ours = dot_product_attention(query, key, value, mask=None, scale=0.2, softcap=softcap)
    kernel = functools.partial(splash_attention, interpret=True)
    theirs = jax.jit(functools.partial(kernel, mask=None, scale=0.2, softcap=softcap))(query, key, value)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_the_kernel_refuses_masks_that_it_would_ignore(splash_attention):
    x = jnp.zeros((1, 128, 1, 128))
    with pytest.raises(ValueError, match="mask must be None"):
        splash_attention(x, x, x, mask=jnp.ones((1, 128, 128), bool), scale=1.0)


def test_the_kernel_compiles_for_a_tpu_in_the_decoder(splash_attention):
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'esscher[tpu]' (Linux, x86-64)")
    mesh = meshes.make(data=1, devices=meshes.topology("v5e:2x2")[:1])
    config = decoder.Config(512, 256, 2, 2, 1, 128, 512)

    def loss(params, tokens):
        return decoder.hidden(params, config, tokens, attention=splash_attention).astype(jnp.float32).sum()

    shapes = (decoder.shapes(config, jnp.bfloat16), jax.ShapeDtypeStruct((2, 256), jnp.int32))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    assert "tpu_custom_call" in jax.jit(jax.grad(loss)).lower(*placed).compile().as_text()

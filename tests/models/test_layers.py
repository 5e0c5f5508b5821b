"""The shared layers against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esscher.models import layers

RNGS = nnx.Rngs(0)
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731


def test_dense_contracts_the_last_axes():
    dense = layers.Dense((3, 4), (2, 5), (("heads", "kv"), ("embed", None)), rngs=RNGS)
    dense.bias[...] = normal(1, 2, 5)
    x = normal(0, 6, 7, 3, 4)
    expected = np.einsum("abij,ijkl->abkl", x, dense.kernel[...]) + dense.bias[...]
    np.testing.assert_allclose(dense(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_kernels_are_xaviers(gain):
    """Uniform on [-a, a] with a = sqrt(6 / (fan in + fan out)); a 3 x 3 window counts nine times."""
    dense = layers.Dense((40,), (4, 3, 20), (("embed",), ("heads", None, "kv")), gain=gain, rngs=RNGS)
    conv = layers.Conv(32, 64, gain=gain, rngs=RNGS)
    for layer, fans in ((dense, 40 + 240), (conv, 9 * (32 + 64))):
        kernel, bound = np.asarray(layer.kernel[...]), gain * np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        # Fourth moment of the uniform law: the relative error of the variance is sqrt(4/5 / n); 4.5 of them.
        assert abs(kernel.var() * 3 / bound**2 - 1) < 4.5 * np.sqrt(0.8 / kernel.size)
        assert not np.any(layer.bias[...])


@pytest.mark.parametrize("window", [1, 3, 5])
def test_convolution_as_a_product_is_the_native_one_with_its_gradient(window):
    x, kernel, cotangent = normal(0, 2, 4, 6, 3), normal(1, window, window, 3, 5), normal(2, 2, 4, 6, 5)
    native, pull_native = jax.vjp(layers._convolve_natively, x, kernel)
    product, pull_product = jax.vjp(layers._convolve, x, kernel)
    np.testing.assert_allclose(product, native, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(pull_product(cotangent), pull_native(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_convolution_is_a_product_on_cpu_and_native_elsewhere():
    gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(layers._convolve(x, kernel))), (0, 1)))
    traced = gradient.trace(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)))
    on_cpu, on_tpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu"))
    assert "stablehlo.convolution" not in on_cpu
    assert "stablehlo.convolution" in on_tpu
    assert "stablehlo.dot_general" not in on_tpu


def test_standardize_has_mean_zero_and_variance_one_even_far_from_zero():
    x = normal(0, 3, 4, 50) * 2
    out = layers.standardize(x)
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(out.var(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(layers.standardize(x + 1e4), out, atol=5e-3)  # E[x^2] - E[x]^2 would be off by 1
    both = layers.standardize(x, (0, 2))
    np.testing.assert_allclose(both[:, 1], (x - x.mean((0, 2), keepdims=True))[:, 1] / x[:, 1].std(), rtol=1e-4)
    assert layers.standardize(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_sinusoid_is_cosines_then_sines_of_geometric_frequencies():
    values = np.array([-1.5, 0.0, 0.3])
    expected = [[f(7.0 * v * np.exp(-np.log(1e4) * i / 4)) for f in (np.cos, np.sin) for i in range(4)] for v in values]
    np.testing.assert_allclose(layers.sinusoid(jnp.asarray(values), 8, scale=7.0), expected, atol=1e-5)


def test_condition_is_the_sum_of_level_and_class_with_null_last():
    condition = layers.Conditioning(8, 3, rngs=RNGS)
    level = jnp.array([-0.4, 0.1, 0.1, 0.7])
    table = condition.table[...]
    null = condition(level, None, 4)
    np.testing.assert_allclose(null[1], null[2])
    assert np.abs(null[0] - null[1]).max() > 1e-3
    out = condition(level, jnp.array([3, 0, 2, 1]), 4)
    np.testing.assert_allclose(out[0], null[0], rtol=1e-6)
    np.testing.assert_allclose(out[1] - out[2], table[0] - table[2], atol=1e-6)


def test_a_label_out_of_range_makes_its_own_example_nan():
    condition = layers.Conditioning(8, 3, rngs=RNGS)
    out = jax.jit(lambda label: condition(jnp.zeros(5), label, 5))(jnp.array([0, 4, 3, -1, 2]))
    np.testing.assert_array_equal(np.isnan(out).any(-1), [False, True, False, True, False])


def test_neighbouring_noise_levels_are_told_apart_and_blend_smoothly():
    """A step of EDM's 18-step grid moves the embedding; a hundredth of it moves it little."""
    level = jnp.log(jnp.array([1.0, 1.4, 1.004])) / 4
    condition = layers.Conditioning(8, 0, rngs=RNGS)
    embedding = condition(level, None, 3) - condition.table[...]
    distance = np.linalg.norm(embedding[1:] - embedding[0], axis=-1) / np.linalg.norm(embedding[0])
    assert distance[0] > 0.2
    assert distance[1] < 0.1


@pytest.mark.parametrize("window", [0, 2, 4])
def test_a_window_must_be_odd(window):
    with pytest.raises(ValueError, match=f"window must be odd, got {window}"):
        layers.Conv(3, 5, window=window, rngs=RNGS)


@pytest.mark.parametrize("make", [layers.Conv, lambda a, b, **kw: layers.Dense((a,), (b,), ((None,), (None,)), **kw)])
def test_integer_arithmetic_is_rejected(make):
    with pytest.raises(ValueError, match="dtype must be of a floating type, got int8"):
        make(3, 5, dtype="int8", rngs=RNGS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of heads=3, got 8"):
        layers.SelfAttention(8, 3, rngs=RNGS)

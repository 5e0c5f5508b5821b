"""Random numbers in low precision, and a square root whose gradient is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import arrays, autodiff
from esscher.samplers.steppers import coefficients

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_normal_numbers_are_drawn_in_float32_for_probes_and_samplers_alike(dtype):
    out, x = arrays.normal(KEY, (3, 1000), dtype), jnp.zeros((3, 1000), dtype)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, jax.random.normal(KEY, (3, 1000)))
    np.testing.assert_array_equal(coefficients.standard_normal(KEY, x), out)
    probes = autodiff.draw_probes(KEY, x[0], 3, "gaussian")
    assert probes.dtype == dtype
    np.testing.assert_array_equal(probes, out.astype(dtype))


def test_wide_types_keep_their_precision(x64):
    assert arrays.normal(KEY, (2,), jnp.float64).dtype == jnp.float64


def test_safe_square_root_has_a_finite_gradient_and_keeps_nan():
    x = jnp.array([-1.0, 0.0, 4.0, jnp.nan])
    np.testing.assert_array_equal(arrays.safe_sqrt(x), [0, 0, 2, jnp.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(arrays.safe_sqrt))(x), [0, 0, 0.25, jnp.nan])

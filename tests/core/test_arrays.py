"""Random numbers in low precision, and a square root whose gradient is finite."""

import warnings

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


def test_nan_is_warned_of_where_the_call_says_and_only_if_it_is_known():
    with pytest.warns(UserWarning, match="^3 values were lost$") as caught:
        arrays.warn_of_nan(jnp.array([1, 0, 2]), "values were lost", stacklevel=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays.warn_of_nan(jnp.zeros(3, bool), "values were lost", stacklevel=1)
        jax.jit(lambda count: arrays.warn_of_nan(count, "values were lost", stacklevel=1))(jnp.ones(3))


def test_temperature_0_leaves_the_first_of_the_largest():
    logits = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -2.0, -4.0]])
    out = arrays.tempered(logits, jnp.array([[0.0], [0.5]]))
    np.testing.assert_array_equal(out, [[-jnp.inf, 0, -jnp.inf], [-jnp.inf, -4, -8]])
    slope = jax.grad(lambda logits, tau: jax.nn.softmax(arrays.tempered(logits, tau))[..., 1].sum(), (0, 1))
    np.testing.assert_array_equal(slope(logits, 0.0)[0], 0)
    assert slope(logits, 0.0)[1] == 0

"""Soft values against sums in high precision, in both limits, and where nothing counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.tilt import log_mean_exp, soft_value

soft = jax.jit(soft_value, static_argnames="axis")

VALUES = np.array([[0.3, -1.2, 2.0, 0.7], [1.0, 1.0, 1.0, 1.0], [-3.0, 4.0, 0.0, -np.inf]])
BETAS = np.array([1e-3, 0.1, 1.0, 30.0, 1e3, 1e6])


def reference(values, beta):
    """In 80-bit floats, shifted by the maximum."""
    values = np.asarray(values, np.longdouble)
    top = values.max(-1, keepdims=True)
    gaps = np.expm1((values - top) / np.longdouble(beta))
    return (top[..., 0] + beta * np.log1p(gaps.mean(-1))).astype(np.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_it_keeps_its_digits_from_the_maximum_to_the_mean(beta):
    """Float32 throughout: the naive formula is off by `1e-7 beta`, a tenth at the last of these temperatures."""
    found = soft(jnp.asarray(VALUES, jnp.float32), beta)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:2], reference(VALUES[:2], beta), rtol=3e-6)
    np.testing.assert_allclose(found[2], reference(VALUES[2], beta), rtol=3e-6)


def test_limits_equal_values_and_the_logarithm_of_a_mean(x64):
    finite = VALUES[:2]
    np.testing.assert_allclose(soft(finite, 1e-6), finite.max(-1), atol=1e-5)
    np.testing.assert_allclose(soft(finite, 1e12), finite.mean(-1), rtol=1e-11)
    np.testing.assert_allclose(soft(finite, jnp.inf), finite.mean(-1), rtol=1e-15)
    np.testing.assert_allclose(soft(np.full((3, 5), -7.25), BETAS[:3]), -7.25, rtol=1e-15)
    np.testing.assert_allclose(log_mean_exp(VALUES), np.log(np.exp(VALUES).mean(-1)), rtol=1e-14)
    # Many values, one of which matters: `log1p` of nearly -1 would lose all digits.
    lone = np.append(np.zeros(1), np.full(10**5, -60.0))
    np.testing.assert_allclose(soft(jnp.asarray(lone, jnp.float32), 1.0), -np.log(len(lone)), rtol=1e-6)


def test_axes_masks_and_temperatures_broadcast(x64):
    where = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]])
    beta = np.array([0.5, 2.0, 0.1])
    hidden = np.where(where, VALUES, np.nan)
    expected = [reference(row[keep != 0], b) for row, keep, b in zip(VALUES, where, beta, strict=True)]
    np.testing.assert_allclose(soft(hidden, beta, where=where), expected, rtol=1e-13)
    np.testing.assert_allclose(soft(hidden.T, beta, axis=0, where=where.T), expected, rtol=1e-13)
    column, row = where[:, 2:3], where[:1]  # of fewer rows or columns, which stand for all
    for part, axis in ((column, 0), (column, 1), (row, 0), (row, 1), (row[0], 0)):
        whole = np.broadcast_to(part, VALUES.shape)
        np.testing.assert_array_equal(
            soft(VALUES, 0.7, axis=axis, where=part), soft(VALUES, 0.7, axis=axis, where=whole)
        )
    assert np.isnan(soft(hidden, 1.0)[0])


def test_nothing_counts_for_nothing_and_no_gradient_is_nan(x64):
    values = jnp.array([[0.2, -jnp.inf, 1.0], [-jnp.inf] * 3, [0.0, 1.0, 2.0]])
    where = jnp.array([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    out = soft(values, 0.7, where=where)
    np.testing.assert_array_equal(out[1:], -np.inf)
    assert soft(jnp.zeros((2, 0)), 1.0).tolist() == [-jnp.inf] * 2

    pull = jax.jit(lambda v, b: jax.vjp(lambda v, b: soft_value(v, b, where=where), v, b)[1](jnp.ones(3)))
    for beta in (0.7, 1e5, jnp.inf):
        by_value, by_beta = pull(values, beta)
        assert np.isfinite(by_value).all()
        assert np.isfinite(by_beta)
        np.testing.assert_array_equal(by_value[1:], 0.0)
        np.testing.assert_allclose(by_value[0].sum(), 1.0)


def test_the_gradient_is_the_share_in_the_tilt_and_in_beta_minus_its_divergence(x64):
    """`d/dv = softmax(v / beta)`, and `d/dbeta = log mean exp(v / beta) - sum p v / beta = -KL(p || uniform)`."""
    values = jnp.asarray(VALUES[0])
    for beta in (0.05, 0.8, 50.0):
        by_value, by_beta = jax.grad(soft, argnums=(0, 1))(values, beta)
        p = np.asarray(jax.nn.softmax(values / beta))
        np.testing.assert_allclose(by_value, p, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(by_beta, -np.sum(p * np.log(4 * p + 1e-300)), rtol=1e-9, atol=1e-13)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="values must be of a floating type, got int32"):
        soft_value(jnp.arange(3), 1.0)

"""Divergences against dense Jacobians, closed forms and the exact mean over all sign vectors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import autodiff

divergence = jax.jit(autodiff.divergence, static_argnums=0)
quadratic_form = jax.jit(autodiff.value_and_quadratic_form, static_argnums=0)
MATRIX = jax.random.normal(jax.random.key(0), (3, 3))


def field(x):
    """Asymmetric and nonlinear, so that a transpose or a dropped coordinate shows."""
    return jnp.tanh(x @ MATRIX) * x + jnp.roll(x, 1, -1) ** 2


@functools.partial(jax.jit, static_argnums=0)
def dense_divergence(fn, x):
    one = lambda row: fn(row[None])[0]  # noqa: E731
    return jax.vmap(lambda row: jnp.trace(jax.jacrev(one)(row)))(x)


def test_divergence_is_the_trace_of_the_dense_jacobian(x64):
    x = jax.random.normal(jax.random.key(1), (5, 3), jnp.float64)
    np.testing.assert_allclose(divergence(field, x), dense_divergence(field, x), rtol=1e-12)


def test_divergence_of_events_with_several_axes():
    x = jax.random.normal(jax.random.key(2), (4, 2, 3))
    np.testing.assert_allclose(divergence(lambda x: x**3 + x[:, ::-1], x), (3 * x**2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(divergence(jnp.sin, x[:, 0, 0]), jnp.cos(x[:, 0, 0]), rtol=1e-6)


def test_gradients_pass_through_the_divergence(x64):
    x = jax.random.normal(jax.random.key(3), (2, 3), jnp.float64)
    ours = jax.jit(jax.grad(lambda x: divergence(field, x).sum()))(x)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(lambda x: dense_divergence(field, x).sum()))(x), rtol=1e-10)


def test_quadratic_form_is_the_dense_one_and_its_value_the_function(x64):
    x, v = jax.random.normal(jax.random.key(4), (2, 4, 3), jnp.float64)
    value, form = quadratic_form(field, x, v)
    jacobians = jax.vmap(jax.jacrev(lambda row: field(row[None])[0]))(x)
    np.testing.assert_allclose(value, field(x))
    np.testing.assert_allclose(form, jnp.einsum("bi,bij,bj->b", v, jacobians, v), rtol=1e-12)


def test_the_mean_over_all_sign_vectors_is_the_divergence(x64):
    x = jax.random.normal(jax.random.key(5), (4, 3), jnp.float64)
    signs = jnp.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    forms = [quadratic_form(field, x, jnp.broadcast_to(v, x.shape))[1] for v in signs]
    np.testing.assert_allclose(sum(forms) / 8, divergence(field, x), rtol=1e-12)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_variance_is_the_known_one(distribution):
    """For a linear field, Var[v'Av] with S = (A + A')/2 is 2 |S|^2, less its diagonal for signs; |z| < 4: 6e-5."""
    n = 20_000
    x = jnp.zeros((n, 3))
    draws = jax.jit(lambda key: autodiff.hutchinson_divergence(key, lambda x: x @ MATRIX, x, 2, distribution))(
        jax.random.key(6)
    )
    symmetric = 0.5 * (MATRIX + MATRIX.T)
    variance = 2 * jnp.sum(symmetric**2) - (
        2 * jnp.sum(jnp.diag(symmetric) ** 2) if distribution == "rademacher" else 0
    )
    z = (draws.mean() - jnp.trace(MATRIX)) / jnp.sqrt(variance / 2 / n)
    assert abs(z) < 4
    np.testing.assert_allclose(draws.var(), variance / 2, rtol=0.08)  # 4 standard errors of a chi-squared-like law


def test_sign_probes_are_exact_on_a_diagonal_jacobian_with_one_probe():
    x = jax.random.normal(jax.random.key(7), (6, 4))
    out = autodiff.hutchinson_divergence(jax.random.key(8), jnp.sin, x)
    np.testing.assert_allclose(out, jnp.cos(x).sum(-1), rtol=1e-5)


def test_low_precision_fields_are_summed_in_float32():
    x = jnp.ones((2, 2048), jnp.bfloat16)
    out = divergence(lambda x: x, x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 2048)
    out = autodiff.hutchinson_divergence(jax.random.key(0), lambda x: x, x)
    np.testing.assert_array_equal(out, 2048)


def test_wrong_fields_probes_and_shapes_are_named():
    x, key = jnp.ones((2, 3)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"shape of x \(2, 3\), but returned \(2, 2\)"):
        autodiff.divergence(lambda x: x[:, :2], x)
    with pytest.raises(ValueError, match=r"v must have the shape of x \(2, 3\), got \(3,\)"):
        autodiff.value_and_quadratic_form(field, x, jnp.ones(3))
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        autodiff.hutchinson_divergence(key, field, x, 0)
    with pytest.raises(ValueError, match="got 'cauchy'"):
        autodiff.hutchinson_divergence(key, field, x, 1, "cauchy")
    with pytest.raises(ValueError, match=r"x must be floating with a batch axis, \[B, ...\], got int32\[2, 3\]"):
        autodiff.divergence(field, jnp.ones((2, 3), jnp.int32))

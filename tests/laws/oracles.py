"""Expectations by quadrature on the line, and the check that a prediction minimises a squared loss."""

import jax.numpy as jnp
import numpy as np

from esscher.core.exact import GaussianMixture


def one_dimensional(weights, means, variances):
    return GaussianMixture(jnp.log(jnp.array(weights)), jnp.array(means)[:, None], jnp.array(variances)[:, None, None])


def bimodal():
    """Asymmetric, two modes."""
    return one_dimensional([0.3, 0.7], [-1.0, 1.5], [0.2, 0.35])


def nodes(density, low, high, n):
    """Points `[n, 1]` and weights `[n]` of the trapezoid rule, spectrally accurate for smooth densities."""
    x = jnp.linspace(low, high, n)[:, None]
    return x, density(x) * (high - low) / (n - 1)


def pairs(law, n=181):
    """Points `data[N, 1], noise[N, 1]` and weights `[N]` for expectations over independent data and standard noise."""
    data, p = nodes(lambda x: jnp.exp(law.log_prob(x)), -5.0, 6.5, n)
    noise, q = nodes(lambda x: jnp.exp(-(x[:, 0] ** 2) / 2) / jnp.sqrt(2 * jnp.pi), -7.5, 7.5, n)
    return jnp.repeat(data, n, 0), jnp.tile(noise, (n, 1)), jnp.outer(p, q).reshape(-1)


def gauss_hermite(n, dimensions):
    """Points `[n^d, d]` and weights of a standard normal, exact for polynomials of degree `2n - 1` in each variable."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    w = w / w.sum()
    grid = np.stack(np.meshgrid(*[x] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    return jnp.asarray(grid), jnp.asarray(np.stack(np.meshgrid(*[w] * dimensions), -1).reshape(-1, dimensions).prod(-1))


def assert_minimises(loss, prediction, x, weights, *, curvature=1.0, rtol=1e-7):
    """`E loss(prediction + h(x)) - E loss(prediction) = curvature E h(x)^2` for several `h`: nothing is left to gain.

    A prediction off the conditional mean leaves a term linear in `h`, of either sign.
    """
    for h in (jnp.sin(2 * x), 0.3 * x**2 - 0.2, 0.5 * jnp.ones_like(x)):
        excess = weights @ (loss(prediction + h) - loss(prediction))
        np.testing.assert_allclose(excess, curvature * (weights @ jnp.sum(h**2, -1)), rtol=rtol)

"""Rotary positions: what turning must keep, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.models import rope
from esscher.models.rope import Rope

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "yarn"])
def test_rotation_keeps_norms_and_products_depend_on_distance_alone(scaling):
    turning = Rope(100.0, scaling, 4.0, 64, attention_factor=1.25)
    size = 1.25**2 if scaling == "yarn" else 1.0
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8)) * jnp.ones((1, 20, 1, 1))
    cosine, sine = rope.angles(turning, 8, jnp.arange(20)[None])
    q_turned, k_turned = rope.rotate(q, cosine, sine), rope.rotate(k, cosine, sine)
    close(jnp.sum(q_turned**2, -1), size * jnp.sum(q**2, -1))
    products = np.asarray(jnp.einsum("bthd,bshd->ts", q_turned, k_turned))
    for offset in (-7, 0, 3):
        close(np.diagonal(products, offset), np.full(20 - abs(offset), np.diagonal(products, offset)[0]), atol=1e-4)
    assert np.ptp(products) > 1


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match=r"scaling must be .*, got 'dynamic'"):
        rope.frequencies(Rope(scaling="dynamic"), 8)

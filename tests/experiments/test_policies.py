"""How many answers are generated at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes
from esscher.experiments import policies
from esscher.models import decoder
from esscher.samplers import decoding


@pytest.mark.parametrize(
    ("rows", "shards", "size", "turns"), [(256, 1, 2**20, 1), (256, 1, 2**24, 4), (256, 8, 2**26, 2), (24, 8, 2**40, 3)]
)
def test_answers_are_made_in_as_few_turns_as_memory_allows(rows, shards, size, turns):
    assert policies._turns(rows, shards, size) == turns


def test_in_turns_the_answers_are_those_of_all_at_once(monkeypatch):
    policy = policies.new(decoder.Config(vocabulary=12, width=16, depth=1, heads=1, kv_heads=1, head_dim=16, mlp=16))
    params, prompt = policy.initialize(jax.random.key(0)), jax.random.randint(jax.random.key(1), (8, 3), 2, 12)
    mask = jnp.arange(3) >= jnp.arange(8)[:, None] % 3
    generate = policies.generator(policy, 3, (1,), meshes.make(data=2))
    found = []
    for memory in (2**30, 1):
        monkeypatch.setattr(policies, "CACHE_MEMORY", memory)
        found.append(
            jax.jit(functools.partial(generate, n=2, choose=decoding.greedy))(jax.random.key(2), params, prompt, mask)
        )
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].logp, found[1].logp, atol=1e-5)
    assert len(np.unique(np.asarray(found[0].tokens)[:, 0], axis=0)) > 2
    sampled = jax.jit(generate)(jax.random.key(2), params, jnp.broadcast_to(prompt[:1], prompt.shape), mask[:1] | mask)
    assert len(np.unique(np.asarray(sampled.tokens), axis=0)) > 2  # each turn has a key of its own

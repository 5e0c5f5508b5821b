"""What the stages of the arithmetic experiment go on from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import sequences
from esscher.experiments import language, policies
from esscher.models import decoder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small decoder that knows how an answer looks, and at times what it is."""
    folder = tmp_path_factory.mktemp("sft") / "model"
    tokenizer = language.tokenizer_of("+", 10)
    shape = {"vocabulary": tokenizer.get_vocab_size(), "width": 32, "depth": 1, "mlp": 64, "tied": True}
    policy = policies.new(decoder.Config(heads=1, kv_heads=1, head_dim=32, **shape))
    task = language.arithmetic(1, "+", 10, 32, 0).train
    packed = sequences.pack(language.encode(tokenizer, language.END, task), 16)
    params = policy.initialize(jax.random.key(0))

    @jax.jit
    def step(params, rate):
        def loss(params):
            found = policies.completions(policy, params, packed)
            return -jnp.sum(jnp.where(found.mask, found.logps, 0)) / found.mask.sum()

        return jax.tree.map(lambda p, g: p - rate * jnp.sign(g), params, jax.grad(loss)(params))

    for rate in np.linspace(1e-2, 1e-3, 60):
        params = step(params, rate)
    policies.save(folder, policy, params, tokenizer, (language.END,))
    return str(folder)

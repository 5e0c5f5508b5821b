"""What the stages of the arithmetic experiment go on from."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import sequences
from esscher.experiments import language, policies
from esscher.models import decoder

LLAMA = pathlib.Path(__file__).parents[1] / "models" / "fixtures" / "llama"


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


@pytest.fixture
def llama(tmp_path):
    """Folder of a tiny Llama, with a tokenizer of few of its 67 tokens."""
    folder = tmp_path / "llama"
    shutil.copytree(LLAMA, folder)
    language.tokenizer_of("+", 10).save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "config.json").read_text()) | {"eos_token_id": language.END}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def write_lines(tmp_path):
    """Writes objects into a jsonl file of the given name."""

    def write(name, lines):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write

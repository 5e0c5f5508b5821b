"""What `hf.save` writes is a model to transformers, and it computes what ours does; defaults are transformers' own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.models import decoder, hf
from esscher.models.decoder import Config
from esscher.models.rope import Rope

torch = pytest.importorskip("torch", reason="needs the extra `peers`: pip install 'esscher[peers]'")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`: pip install 'esscher[peers]'")

THETA = Rope(1e4, original_length=99)
LLAMA = Config(vocabulary=67, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=56, rope=THETA)
MIXED = {"depth": 3, "sliding": (True, False, True), "window": 5}
GEMMA = {"offset_norms": True, "activation": "gelu", "scale_embedding": True, "head_dim": 16, "tied": True}
GEMMA2 = {**GEMMA, **MIXED, "sandwich": True, "query_scale": 24**-0.5}
MODELS = {
    "llama": ("llama", {"norm_eps": 1e-5}),
    "llama tied": ("llama", {"tied": True, "activation": "gelu"}),
    "llama linear": ("llama", {"rope": Rope(1e4, "linear", 4.0, 99)}),
    "llama llama3": ("llama", {"rope": Rope(1e4, "llama3", 8.0, 128)}),
    "llama yarn": ("llama", {"rope": Rope(1e4, "yarn", 4.0, 64, beta_fast=20.0)}),
    "llama yarn factor": ("llama", {"rope": Rope(1e4, "yarn", 4.0, 64, attention_factor=0.8)}),
    "mistral": ("mistral", {"sliding": (True, True), "window": 5}),
    "mistral odd width": ("mistral", {"width": 34}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    "qwen2 mixed": ("qwen2", {"attention_bias": True, **MIXED}),
    "qwen3": ("qwen3", {"normalize_heads": True, "head_dim": 16, "rope": Rope(1e6, original_length=99)}),
    "qwen3 mixed": ("qwen3", {"normalize_heads": True, **MIXED}),
    "gemma": ("gemma", GEMMA),
    "gemma untied": ("gemma", GEMMA | {"tied": False}),
    "gemma2": ("gemma2", GEMMA2 | {"attention_softcap": 5.0, "final_softcap": 6.0}),
    "gemma3": (
        "gemma3_text",
        GEMMA2 | {"normalize_heads": True, "rope": Rope(1e6, "linear", 8.0, 99), "sliding_rope": THETA},
    ),
}


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_transformers_loads_what_is_saved_and_agrees(family, changes, tmp_path):
    config = dataclasses.replace(LLAMA, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) < 3), jnp.float32),
        decoder.shapes(config),
    )
    hf.save(tmp_path, config, params, max_shard_bytes=60_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert model.config.model_type == family
    assert not any(report.values()), report
    tokens = rng.integers(0, 67, (2, 13))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    ours = decoder.logits(params, config, decoder.hidden(params, config, jnp.asarray(tokens)))
    error, size = np.abs(ours - expected).max(), np.abs(expected).max()
    print(f"largest logit {size:.1f}, largest difference {error:.1e}")
    assert error < 5e-5 * max(1, size / 8)  # the bound of tests/models is for logits up to 8
    model.save_pretrained(tmp_path / "theirs")
    again, read = hf.load(tmp_path / "theirs", dtype="float32")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, read, params)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_means_what_it_means_to_transformers(family):
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    assert hf.config_from_json({"model_type": family}) == hf.config_from_json(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_keys_mean_what_they_mean_to_transformers(family):
    old = {
        "num_hidden_layers": 4,
        "rope_theta": 3e4,
        # of Gemma 3, whose files never had it, transformers overlooks the older key
        "rope_scaling": {"rope_type" if family == "gemma3_text" else "type": "linear", "factor": 2.0},
        "sliding_window": 7,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "sliding_window_pattern": 3 if family == "gemma3_text" else 2,
        "rope_local_base_freq": 2e4,
    }
    theirs = transformers.AutoConfig.for_model(family, **old).to_dict()
    assert hf.config_from_json({"model_type": family} | old) == hf.config_from_json(theirs)

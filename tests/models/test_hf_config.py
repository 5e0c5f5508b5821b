"""`config.json` of all releases and families: read, refused where the decoder differs, and written again."""

import dataclasses

import pytest

from esscher.core.errors import UsageError
from esscher.models import hf
from esscher.models.rope import Rope

OLD_GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 3, "sliding_window": 512}
LINEAR = {"type": "linear", "factor": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CONFIGS = [
    ({"model_type": "llama", "num_key_value_heads": None, "rope_scaling": None}, {"kv_heads": 32, "head_dim": 128}),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None}, {"head_dim": 16}),
    ({"model_type": "llama", "rope_theta": 5e5}, {"rope": Rope(5e5, original_length=2048)}),
    (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope": Rope(1e4, "linear", 2.0, 2048)},
    ),
    ({"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": None}, {"tied": False}),
    ({"model_type": "mistral"}, {"kv_heads": 8, "window": 4096, "sliding": (True,) * 32}),
    ({"model_type": "mistral", "sliding_window": None}, {"window": None, "sliding": ()}),
    ({"model_type": "qwen2"}, {"attention_bias": True, "window": None, "sliding": (), "head_dim": 128}),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 3, "max_window_layers": 2},
        {"window": 4096, "sliding": (False, False, True)},
    ),
    ({"model_type": "qwen3", "rope_scaling": YARN}, {"rope": Rope(1e4, "yarn", 4.0, 32768), "normalize_heads": True}),
    (
        {"model_type": "qwen3", "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope": Rope(1e4, "yarn", 4.0, 32768, attention_factor=1.0)},
    ),
    ({"model_type": "gemma", "hidden_act": "gelu"}, {"activation": "gelu", "tied": True, "scale_embedding": True}),
    (
        {"model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 144},
        {"query_scale": 144**-0.5, "sliding": (True, False, True), "attention_softcap": 50.0, "final_softcap": 30.0},
    ),
    ({"model_type": "gemma2", "attn_logit_softcapping": None}, {"attention_softcap": None, "query_scale": None}),
    (
        OLD_GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        {"rope": Rope(1e6, "linear", 8.0, 131072), "sliding_rope": Rope(2e4, original_length=131072), "window": 512},
    ),
    (OLD_GEMMA3, {"sliding": (True, True, False, True), "sliding_rope": Rope(1e4, original_length=131072)}),
    (
        OLD_GEMMA3 | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}},
        {"rope": Rope(7.0, original_length=131072), "sliding_rope": Rope(1e4, original_length=131072)},
    ),
]


@pytest.mark.parametrize(("content", "expected"), CONFIGS)
def test_old_and_new_keys_nulls_and_defaults_are_read(content, expected):
    config = hf.config_from_json(content)
    assert {name: getattr(config, name) for name in expected} == expected
    assert hf.config_from_json(hf.config_to_json(config)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model_type": "mixtral"},
            r"model_type 'mixtral' is not supported; it must be one of llama, mistral, .*gemma3",
        ),
        ({}, "model_type None is not supported"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rotary scaling 'longrope' is not supported; it must be",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "makes no sense: 'factor'"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate=false is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ({"attention_bias": True}, "attention_bias is set: the decoder does not have biases of attention"),
        ({"quantization_config": {"bits": 4}}, "quantised weights; take the checkpoint they were made from"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_key_value_heads": 3}, "heads must be a multiple of kv_heads=3"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; it must be one of silu"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number, got 0"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor must be a positive number, got '8'"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor must be above low_freq_factor, 1.0, got 1",
        ),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, "beta_fast must be a positive number, got 'x'"),
        ({"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor must be a positive number, got -1"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": -1}},
            "original_max_position_embeddings must be a positive integer, got -1",
        ),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": 0},
            "query_pre_attn_scalar must be a positive number, got 0",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": "30"},
            "final_logit_softcapping must be .* number, got '30'",
        ),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 0},
            "attn_logit_softcapping must be a positive number, got 0",
        ),
        (OLD_GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer, got 0"),
        (OLD_GEMMA3 | {"rope_local_base_freq": -1}, "rope_local_base_freq must be a positive number, got -1"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"]}, "layer_types has 'linear_attention'; known are"),
    ],
)
def test_what_the_decoder_does_not_have_is_refused(content, message):
    with pytest.raises(UsageError, match=message):
        hf.config_from_json({"model_type": "llama"} | content if content else content)


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN])
def test_the_context_is_what_the_file_says_and_is_written_again(scaling):
    """Llama 3.2's is half of what its scaling would make it."""
    content = {"model_type": "llama", "max_position_embeddings": 131_072, "rope_scaling": scaling}
    config = hf.config_from_json(content)
    assert config.context == 131_072
    assert hf.config_to_json(config)["max_position_embeddings"] == 131_072
    longer = dataclasses.replace(config, context=200_000)
    assert hf.config_to_json(longer)["max_position_embeddings"] == 200_000
    unknown = dataclasses.replace(config, context=None)
    stretched = {"llama3": 8192 * 32, "yarn": 32_768 * 4}.get(config.rope.scaling, 131_072)
    assert hf.config_to_json(unknown)["max_position_embeddings"] == stretched


def test_the_simplest_family_is_chosen_and_none_is_said():
    config = hf.config_from_json({"model_type": "llama"})
    family = lambda **changes: hf.config_to_json(dataclasses.replace(config, **changes))["model_type"]  # noqa: E731
    assert family() == "llama"
    assert family(width=4100) == "mistral"  # transformers' Llama wants a multiple of the heads
    assert family(sliding=(True,) * 32, window=7) == "mistral"
    assert family(attention_bias=True) == "qwen2"
    assert family(normalize_heads=True, sliding=(False, True) * 16, window=7) == "qwen3"
    assert family(sliding=(False,) * 32, window=7, sliding_rope=Rope(3.0)) == "llama"  # as no layer slides
    for changes in ({"sandwich": True}, {"attention_softcap": 5.0}, {"sliding": (False, True) * 16, "window": 7}):
        with pytest.raises(UsageError, match=r"none of llama, mistral, .* computes what this decoder does"):
            family(**changes)

r"""`config.json` of Hugging Face checkpoints to a decoder's `Config`, and back.

Reads the files of all releases of transformers: keys were renamed over time, null may stand for "no" or for "whatever
the default is", and what is missing has a default that depends on the family.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from esscher.core.errors import UsageError
from esscher.models import decoder
from esscher.models.decoder import Config
from esscher.models.rope import Rope

__all__ = ["config_from_json", "config_to_json"]

_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = _LLAMA | {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_MISTRAL = {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
# What transformers takes for a missing key; from the simplest family to the richest.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}
_CLASSES = dict(
    zip(_DEFAULTS, ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3"), strict=True)
)  # of transformers, without the ending `ForCausalLM`
_MAY_BE_NULL = {  # and then null is not the default
    "num_key_value_heads", "head_dim", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_REFUSED = {
    "attention_bias": "biases of attention (of its output, too)",
    "mlp_bias": "biases of the feed-forward layers",
    "use_bidirectional_attention": "attention to later tokens",
    "quantization_config": "quantised weights; take the checkpoint they were made from",
}


# --- reading ----------------------------------------------------------------------------------------------------------


def config_from_json(content: Mapping[str, Any]) -> Config:
    """The decoder that a `config.json` describes: `llama`, `mistral`, `qwen2`, `qwen3`, `gemma`, `gemma2`, `gemma3`.

    Of a multimodal Gemma 3 it is the part that writes text. `max_position_embeddings` becomes the `context`, and the
    `original_length` of the rotary positions unless they say themselves.

    Args:
      content: the file, parsed.

    Returns:
      The configuration; fields that make no difference have their default values.

    Raises:
      UsageError: another architecture or rotary scaling, a feature that the decoder does not have, or a value that
        makes no sense.
    """
    family = content.get("model_type")
    if family == "gemma3":
        text = content.get("text_config")
        if not isinstance(text, Mapping):
            raise UsageError(f"text_config must be an object, got {text!r}")
        tied = {"tie_word_embeddings": content.get("tie_word_embeddings", True)}
        return config_from_json({**text, "model_type": "gemma3_text", **tied})
    if family not in _DEFAULTS:
        raise UsageError(f"model_type {family!r} is not supported; it must be one of {', '.join(_DEFAULTS)}, gemma3")
    given = {key: value for key, value in content.items() if value is not None or key in _MAY_BE_NULL}
    if family == "qwen2":
        given.pop("attention_bias", None)  # its layers have the biases, and none on the output, whatever this says
    for key, feature in _REFUSED.items():
        if given.get(key):
            raise UsageError(f"{key} is set: the decoder does not have {feature}")
    try:
        return _read(family, _DEFAULTS[family] | given)
    except UsageError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"the configuration makes no sense: {error}") from error


def _read(family: str, values: dict[str, Any]) -> Config:
    gemma, sandwich = family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    integer, number = (functools.partial(kind, values) for kind in (_integer, _number))
    heads, width, depth = integer("num_attention_heads"), integer("hidden_size"), integer("num_hidden_layers")
    head_dim = width // heads if values["head_dim"] is None else integer("head_dim")
    rope, sliding_rope = _ropes(family, values)
    config = Config(
        vocabulary=integer("vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads if values["num_key_value_heads"] is None else integer("num_key_value_heads"),
        head_dim=head_dim,
        mlp=integer("intermediate_size"),
        rope=rope,
        sliding_rope=sliding_rope,
        sliding=tuple(_sliding(family, values, depth)),
        window=None if values["sliding_window"] is None else integer("sliding_window"),
        norm_eps=number("rms_norm_eps"),
        offset_norms=gemma,
        normalize_heads=family in ("qwen3", "gemma3_text"),
        attention_bias=family == "qwen2",
        activation=_activation(family, values),
        sandwich=sandwich,
        scale_embedding=gemma,
        query_scale=number("query_pre_attn_scalar") ** -0.5 if sandwich else None,
        # Gemma 3's attention has no cap in transformers, whatever its configuration says.
        attention_softcap=_cap(values, "attn_logit_softcapping") if family == "gemma2" else None,
        final_softcap=_cap(values, "final_logit_softcapping") if sandwich else None,
        tied=bool(values["tie_word_embeddings"]),
        context=integer("max_position_embeddings"),
    )
    return _canonical(config)


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{key} must be a positive integer, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _cap(values: Mapping[str, Any], key: str) -> float | None:
    return None if values[key] is None else _number(values, key)


def _activation(family: str, values: Mapping[str, Any]) -> str:
    name = values["hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"]
    if family == "gemma" and name == "gelu":
        return "gelu"  # how the first release wrote its tanh approximation
    if name not in _ACTIVATIONS:
        raise UsageError(f"activation {name!r} is not supported; it must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _sliding(family: str, values: Mapping[str, Any], depth: int) -> list[bool]:
    """Whether each layer sees a window only."""
    if family in ("llama", "gemma"):
        return [False] * depth
    if family == "mistral":
        return [values["sliding_window"] is not None] * depth
    names = values.get("layer_types")
    if names is not None:
        unknown = set(names) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UsageError(f"layer_types has {sorted(unknown)[0]!r}; known are full_attention and sliding_attention")
        return [name == "sliding_attention" for name in names]
    if family.startswith("qwen"):
        windowed = values["use_sliding_window"] and values["sliding_window"] is not None
        return [windowed and i >= values["max_window_layers"] for i in range(depth)]
    pattern = _integer(values, "sliding_window_pattern")
    return [(i + 1) % pattern != 0 for i in range(depth)]


def _ropes(family: str, values: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
    """Rotary positions of the full and of the sliding layers; `None` if those are the same."""
    scaling, parameters = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    if family != "gemma3_text":
        return _rope(scaling or parameters, values, "rope_theta"), None
    full, near = (parameters.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    return _rope({**full, **scaling}, values, "rope_theta"), _rope(near, values, "rope_local_base_freq")


def _rope(parameters: Mapping[str, Any], values: Mapping[str, Any], theta_key: str) -> Rope:
    given = {key: value for key, value in parameters.items() if value is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UsageError(f"rotary scaling {kind!r} is not supported; it must be default, linear, llama3 or yarn")
    if given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) != 1:
        raise UsageError("partial_rotary_factor is set: the decoder turns whole heads only")
    number, longest = functools.partial(_number, given), _integer(values, "max_position_embeddings")
    theta = number("rope_theta") if "rope_theta" in given else _number(values, theta_key)
    if kind == "default":
        return Rope(theta, original_length=longest)
    if kind == "linear":
        return Rope(theta, "linear", number("factor"), longest)
    original = "original_max_position_embeddings"
    length = _integer({original: values.get(original) or given.get(original, longest)}, original)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise UsageError(f"high_freq_factor must be above low_freq_factor, {low}, got {high}")
        return Rope(theta, "llama3", number("factor"), length, low_frequency=low, high_frequency=high)
    if not given.get("truncate", True):
        raise UsageError("rotary scaling yarn with truncate=false is not supported")
    factor = number("factor") if "factor" in given else longest / length
    attention = number("attention_factor") if "attention_factor" in given else None
    if attention is None and given.get("mscale") and given.get("mscale_all_dim"):
        above, below = (0.1 * given[key] * math.log(max(factor, 1)) + 1 for key in ("mscale", "mscale_all_dim"))
        attention = above / below
    betas = (("beta_fast", 32.0), ("beta_slow", 1.0))
    fast, slow = (_number({key: given.get(key) or default}, key) for key, default in betas)
    return Rope(theta, "yarn", factor, length, beta_fast=fast, beta_slow=slow, attention_factor=attention)


# --- writing ----------------------------------------------------------------------------------------------------------


def config_to_json(config: Config) -> dict[str, Any]:
    """The `config.json` of the simplest family that computes what the decoder does, for old and new transformers.

    Token numbers for begin and end are not the decoder's, and are null. `max_position_embeddings` is the `context`; if
    that is not known, the rotary positions' `original_length`, times `factor` in "llama3" and "yarn".

    Args:
      config: which decoder.

    Returns:
      What `config_from_json` turns into the same configuration again, but for fields that make no difference.

    Raises:
      UsageError: no family has this combination of features.
    """
    wanted = _canonical(config)
    for family in _DEFAULTS:
        content = _write(wanted, family)
        # transformers asks this of some, though the size of a head is a number of its own
        even = family not in ("llama", "gemma2", "gemma3_text") or config.width % config.heads == 0
        if even and config_from_json(content) == wanted:
            return content
    raise UsageError(f"none of {', '.join(_DEFAULTS)} computes what this decoder does, so it has no config.json")


def _canonical(config: Config) -> Config:
    """Fields that make no difference at their defaults, as they come out of `config_from_json`."""
    slides, rope = any(config.sliding), config.rope
    stretched = rope.factor if rope.scaling in ("llama3", "yarn") else 1
    context = config.context or math.ceil(rope.original_length * stretched)
    rope, near = (each and _canonical_rope(each, context) for each in (rope, config.sliding_rope))
    return dataclasses.replace(
        config,
        rope=rope,
        sliding_rope=near if slides and near != rope else None,
        sliding=config.sliding if slides else (),
        window=config.window if slides else None,
        query_scale=None if decoder.query_scale(config) == config.head_dim**-0.5 else config.query_scale,
        context=context,
    )


def _canonical_rope(rope: Rope, context: int) -> Rope:
    kept = {
        "none": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_frequency", "high_frequency"),
        "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
    }[rope.scaling]
    length = rope.original_length if rope.scaling in ("llama3", "yarn") else context  # others do not depend on it
    return Rope(rope.theta, rope.scaling, original_length=length, **{k: getattr(rope, k) for k in kept})


def _write(config: Config, family: str) -> dict[str, Any]:
    """What the family's `config.json` can say of it, which may be less than all."""
    slides, rope = any(config.sliding), config.rope
    near = config.sliding_rope or rope
    act = "gelu_pytorch_tanh" if config.activation == "gelu" else "silu"
    content = {
        "architectures": [f"{_CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": rope.theta,
        "rope_scaling": _rope_json(rope) if rope.scaling != "none" else None,
        "rope_parameters": _rope_json(rope),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    content["hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"] = act
    if family not in ("llama", "gemma"):
        content["sliding_window"] = config.window
    if family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        kinds = config.sliding or (False,) * config.depth
        content["layer_types"] = ["sliding_attention" if kind else "full_attention" for kind in kinds]
    if family.startswith("qwen"):
        first = config.sliding.index(True) if slides else config.depth
        content |= {"use_sliding_window": slides, "max_window_layers": first}
    if family in ("gemma2", "gemma3_text"):
        content["query_pre_attn_scalar"] = round(decoder.query_scale(config) ** -2)
        content["attn_logit_softcapping"] = config.attention_softcap
        content["final_logit_softcapping"] = config.final_softcap
    if family == "gemma3_text":
        content["rope_local_base_freq"] = near.theta
        content["rope_parameters"] = {"full_attention": _rope_json(rope), "sliding_attention": _rope_json(near)}
    return content


def _rope_json(rope: Rope) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "none":
        out["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        out |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    return out

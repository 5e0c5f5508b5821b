"""Writes tests/models/fixtures: tiny checkpoints by transformers, and what it computes with them.

Each folder is what `save_pretrained` wrote (weights in bfloat16), and `expected.npz` with `tokens[2, 13]`, the
`logits[2, 13, V]` of a forward pass, and `greedy[2, 64]`, generated after the tokens that `mask[2, 13]` shows. The
logits are computed in float64 but for transformers' own norms and softmax. All parameters are random, norms and biases
too.

Needs the extra `peers`; run from the repository's root:

    python tools/fixtures.py [name ...]
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "models" / "fixtures"
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE_HEADS = {"head_dim": 16}  # times the number of heads it is not the width
GEMMA2 = SIZES | WIDE_HEADS | {"query_pre_attn_scalar": 24, "sliding_window": 5, "final_logit_softcapping": 6.0}
SCALINGS = {
    "llama_linear": {"rope_type": "linear", "factor": 4.0},
    # wavelengths that stay, that are blended and that are stretched; likewise for yarn
    "llama_llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "llama_yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
MODELS = {
    "llama": ("Llama", SIZES | {"rms_norm_eps": 1e-5}),
    "llama_tied": ("Llama", SIZES | {"tie_word_embeddings": True, "rope_theta": 500_000.0}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        SIZES | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SIZES | WIDE_HEADS | {"rope_theta": 1_000_000.0}),
    "gemma": ("Gemma", SIZES | WIDE_HEADS),
    "gemma2": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3Text",
        GEMMA2
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    **{
        name: ("Llama", SIZES | {"rope_parameters": {"rope_theta": 10_000.0, **scaling}})
        for name, scaling in SCALINGS.items()
    },
}
MARGIN = 2e-3  # of the chosen token's logit over the next, or other roundings would choose another


def model(name: str) -> transformers.PreTrainedModel:
    """A model of random parameters, float32, rounded to what bfloat16 can hold."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._attn_implementation = "eager"
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if "layernorm" in path and "post" in path and kind in ("Gemma2", "Gemma3Text"):
                parameter.add_(3.0)  # else the layers add too little for it to do more than repeat its last token
            parameter.copy_(parameter.to(torch.bfloat16))
    return made


def expected(made: transformers.PreTrainedModel) -> tuple[dict[str, np.ndarray], float]:
    """Inputs, logits and greedy continuation; and the least margin by which a token of it was chosen."""
    tokens = np.random.default_rng(0).integers(0, made.config.vocab_size, (24, 13))
    mask = np.ones_like(tokens)
    mask[12:, :4] = 0
    with torch.no_grad():
        out = made.generate(  # in float32: in float64 transformers' mask overflows and padding makes NaN
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(out.logits).topk(2).values
    margins = (best[..., 0] - best[..., 1]).amin(0).numpy()
    distinct = np.array([len(set(row)) for row in out.sequences[:, tokens.shape[1] :].tolist()])
    score = np.where(margins > MARGIN, distinct, 0)  # a row that repeats itself would say little
    rows = [score[:12].argmax(), 12 + score[12:].argmax()]
    tokens, mask, greedy = tokens[rows], mask[rows], out.sequences[rows, tokens.shape[1] :]
    with torch.no_grad():
        logits = made.double()(torch.tensor(tokens)).logits
    arrays = {"tokens": tokens, "logits": logits, "mask": mask, "greedy": greedy}
    cast = {name: np.asarray(x, np.float32 if name == "logits" else np.int32) for name, x in arrays.items()}
    return cast, margins[rows].min()


def write(name: str) -> None:
    """One folder."""
    made = model(name)
    arrays, margin = expected(made)
    assert arrays["greedy"].shape == (2, 64), "an end token was generated"
    assert margin > MARGIN, f"{name}: a token was chosen by a margin of {margin:.1e}"
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    shards = {"max_shard_size": "20KB"} if name == "llama" else {}  # one that comes in several files
    made.to(torch.bfloat16).save_pretrained(folder, **shards)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1024
    varied = [len(set(row)) for row in arrays["greedy"].tolist()]
    largest = np.abs(arrays["logits"]).max()
    print(f"{name}: {varied} different tokens, logits up to {largest:.1f}, margin {margin:.1e}, {size:.0f} KB")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        write(chosen)

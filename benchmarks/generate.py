"""Tokens per second of `generate` against `transformers.generate`: the same small Llama, greedy, 128 new tokens.

Each side runs in a process of its own, in turns, so that both see the same machine; torch gets its best number of
threads. Figures are medians, ratios those of the medians. Our compilation is printed and not counted.

    python benchmarks/generate.py [--rounds 7] [--batches 1 8 64] [--prompt 32] [--new 128]
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from _sides import measure

VOCABULARY, WIDTH, DEPTH, HEADS, KV_HEADS, MLP = 4096, 256, 4, 8, 4, 704


def save_model(folder: str) -> None:
    """Writes a Llama with random weights."""
    import jax

    from esscher.models import decoder, hf

    config = decoder.Config(VOCABULARY, WIDTH, DEPTH, HEADS, KV_HEADS, WIDTH // HEADS, MLP)
    params = decoder.init(jax.random.key(0), config)
    # Logits far enough apart that rounding does not choose the token.
    hf.save(folder, config, params | {"unembedding": 20 * params["unembedding"]})


def prompts(batch: int, length: int) -> np.ndarray:
    """The same on both sides."""
    return np.random.default_rng(batch).integers(0, VOCABULARY, (batch, length), dtype=np.int32)


def ours(folder: str, batches: list[int], prompt: int, new: int) -> dict[int, Callable[[], np.ndarray]]:
    """One program for each size of batch."""
    import jax

    from esscher.models import hf
    from esscher.models.language_model import language_model
    from esscher.samplers import decoding

    config, params = hf.load(folder)

    @jax.jit
    def generate(params, tokens, mask):
        model = language_model(params, config, prompt + new)
        return decoding.generate(jax.random.key(0), model, tokens, mask, new, choose=decoding.greedy).tokens

    functions = {}
    for batch in batches:
        tokens = prompts(batch, prompt)
        began = time.perf_counter()
        compiled = generate.lower(params, tokens, np.ones_like(tokens)).compile()
        print(f"esscher: compiled for batch {batch} in {time.perf_counter() - began:.1f} s (not counted below)")
        functions[batch] = functools.partial(_run, compiled, params, tokens)
    return functions


def _run(compiled: Callable, params: dict, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(compiled(params, tokens, np.ones_like(tokens)))


def theirs(folder: str, batches: list[int], prompt: int, new: int, threads: int) -> dict[int, Callable[[], np.ndarray]]:
    """The same by transformers, with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(batch):
        tokens = torch.tensor(prompts(batch, prompt), dtype=torch.long)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return out[:, prompt:].numpy().astype(np.int32)

    return {batch: functools.partial(generate, batch) for batch in batches}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each measurement")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        common = (folder, options.batches, options.prompt, options.new)
        sides = {"esscher": (ours, *common)}
        sides |= {f"transformers, {n} threads": (theirs, *common, n) for n in sorted({1, os.cpu_count() or 1})}
        jobs = [(side, batch) for batch in options.batches for side in sides]
        times, results = measure(sides, jobs, options.rounds)
    rate = {(side, batch): batch * options.new / statistics.median(t) for (side, batch), t in times.items()}
    for batch in options.batches:
        for side in sides:
            print(f"batch {batch:3}  {side:26} {rate[side, batch]:8.0f} tokens/s")
        best = max(rate[side, batch] for side in sides if side != "esscher")
        same = all((results[side, batch] == results["esscher", batch]).all() for side in sides)
        agreement = "the same tokens" if same else "DIFFERENT TOKENS"
        print(f"batch {batch:3}  ratio to transformers at its best: {rate['esscher', batch] / best:.2f} ({agreement})")


if __name__ == "__main__":
    main()

"""Peak memory and time of one DPO step, value and gradient, against TRL's own code in torch on the same cores.

From hidden states `[2B, T + 1, D]` and an unembedding, both of which receive a gradient, and a reference's given
log-probabilities, in float32. The sides, each in a process of its own, in turns:

- Esscher: `linear_token_logps`, `sequence_logp`, `dpo`;
- TRL unchunked: all logits, TRL's `selective_log_softmax`, then the loss of its `DPOTrainer`;
- TRL chunked: the same loss after TRL's fused head (`add_fused_lm_head`), which `DPOTrainer` of TRL 1.16 always uses,
  with or without Liger, and which runs on CPUs in torch's own operations: in TRL's tiles (4096 tokens by 32768 entries
  of the vocabulary, which is everything at this benchmark's size), and in tiles as wide as Esscher's chunks.

TRL computes no metrics here (entropies and the like), and torch gets its best number of threads. Memory is the highest
resident set during a step above the one before it, the new gradients included (Linux only). Times and memory are
medians, ratios those of the medians, TRL's chunked time that of the faster tile. Results of all sides are compared.

    python benchmarks/preference.py [--rounds 3] [--pairs 4] [--tokens 256] [--width 512] [--vocabulary 32768]
        [--chunk 2048]
"""

import argparse
import os
import statistics
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import _trl
import numpy as np
from _sides import measure, peak_memory

BETA, OURS, UNCHUNKED, TILE = 0.1, "Esscher", "TRL unchunked", 32768  # TILE: TRL's own, entries of the vocabulary


def batch(options: argparse.Namespace) -> types.SimpleNamespace:
    """The same on all sides: chosen responses, then rejected ones, each after a prompt, padded on the right."""
    rng = np.random.default_rng(0)
    rows, length = 2 * options.pairs, options.tokens + 1
    starts = np.tile(rng.integers(1, length // 4 + 1, options.pairs), 2)[:, None]
    ends = rng.integers(length // 2, length + 1, rows)[:, None]
    ends[0] = length
    mask = (np.arange(length) >= starts) & (np.arange(length) < ends)
    # Logits are of unit variance: this is what a token has on average, so that the loss is not saturated.
    ref = -(np.log(options.vocabulary) + 0.5) * mask.sum(1)
    return types.SimpleNamespace(
        hidden=rng.standard_normal((rows, length, options.width), np.float32),
        unembedding=rng.standard_normal((options.width, options.vocabulary), np.float32) / options.width**0.5,
        ids=rng.integers(0, options.vocabulary, (rows, length)),
        mask=mask.astype(np.int64),
        ref=ref.astype(np.float32),
    )


def ours(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """A step, what it takes at its peak, and what XLA plans for temporary arrays."""
    import jax
    import jax.numpy as jnp

    from esscher.core import tokens
    from esscher.objectives import preference

    x = batch(options)
    ids, mask = jnp.asarray(x.ids[:, 1:]), jnp.asarray(x.mask[:, 1:])
    ref_chosen, ref_rejected = jnp.split(jnp.asarray(x.ref), 2)

    def loss(hidden, unembedding):
        logp = tokens.linear_token_logps(hidden[:, :-1], unembedding, ids, chunk=options.chunk)
        chosen, rejected = jnp.split(tokens.sequence_logp(logp, mask), 2)
        return preference.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=BETA).mean()

    arrays = jnp.asarray(x.hidden), jnp.asarray(x.unembedding)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()

    def step():
        value, gradients = jax.block_until_ready(compiled(*arrays))
        return [np.asarray(array) for array in (value, *gradients)]

    planned = compiled.memory_analysis().temp_size_in_bytes
    return {"step": step, "peaks": peaks(step), "planned": lambda: planned}


def theirs(options: argparse.Namespace, chunk: int | None, threads: int) -> dict[str, Callable[[], Any]]:
    """The same by TRL, with a tile of `chunk` entries of the vocabulary, or unchunked."""
    import torch
    from trl.trainer import dpo_trainer

    torch.set_num_threads(threads)
    x = batch(options)

    model = _trl.model(x.hidden, x.unembedding, chunk)

    def without_metrics(**inputs):
        outputs = model(**inputs)
        outputs.entropy = outputs.mean_logits = torch.zeros_like(outputs.log_probs)
        outputs.is_top1 = outputs.entropy.bool()
        return outputs

    names = ("ref_chosen_logps", "ref_rejected_logps")
    inputs = dict(zip(names, torch.tensor(x.ref).chunk(2), strict=True))
    inputs |= {"input_ids": torch.tensor(x.ids), "completion_mask": torch.tensor(x.mask)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    trainer = bare_trainer(dpo_trainer.DPOTrainer)

    def step():
        loss = trainer.compute_loss(without_metrics, inputs)
        hidden, weight = torch.autograd.grad(loss, (model.states, model.head.weight))
        return [loss.detach().numpy(), hidden.numpy(), weight.numpy().T]

    return {"step": step, "peaks": peaks(step)}


def bare_trainer(kind: type) -> Any:
    """A trainer without its `__init__`, on one CPU, with the attributes that the loss reads."""
    same = lambda x: x  # noqa: E731
    trainer = object.__new__(kind)
    vars(trainer).update(
        accelerator=types.SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        model=types.SimpleNamespace(training=True), loss_types=["sigmoid"], loss_weights=[1.0], beta=BETA,
        f_divergence_type="reverse_kl", precompute_ref_logps=True, use_weighting=False, ld_alpha=None,
        aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    return trainer


def peaks(step: Callable[[], Any]) -> Callable[[], list[int]]:
    """Bytes at the peak of every call until now."""
    seen = []
    return lambda: seen.append(peak_memory(step)) or seen


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rounds": 3, "pairs": 4, "tokens": 256, "width": 512, "vocabulary": 32768, "chunk": 2048}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    forms = {UNCHUNKED: None} | {f"TRL chunked, {n} entries": n for n in (TILE, options.chunk)}
    counts = sorted({1, os.cpu_count() or 1})
    sides = {(OURS, 0): (ours, options)}
    sides |= {(form, n): (theirs, options, chunk, n) for form, chunk in forms.items() for n in counts}
    # Not one after the other on the same side: what a step returns is freed a little later.
    jobs = [(side, name) for name in ("step", "peaks") for side in sides]
    times, results = measure(sides, jobs, options.rounds, once=[((OURS, 0), "planned")])

    best, memory = {}, {}  # of each form, at its better number of threads
    for form, threads in sides:
        seconds = statistics.median(times[(form, threads), "step"])
        peak = statistics.median(results[(form, threads), "peaks"][-options.rounds :]) / 2**20
        best[form], memory[form] = min(seconds, best.get(form, seconds)), min(peak, memory.get(form, peak))
        label = f"{form}, {threads} threads" if threads else form
        print(f"{label:40} {seconds:7.2f} s   {peak:8.1f} MiB at the peak")
    logits = 2 * options.pairs * options.tokens * options.vocabulary * 4 / 2**20
    planned = results[(OURS, 0), "planned"] / 2**20
    print(f"all logits are {logits:.1f} MiB; XLA plans {planned:.1f} MiB of temporary arrays for Esscher")
    mine = results[(OURS, 0), "step"]
    largest = np.max([differences(mine, results[side, "step"]) for side in sides], axis=0)
    print(f"largest relative difference: value {largest[0]:.0e}, gradients {largest[1]:.0e} and {largest[2]:.0e}")
    chunked = min(best[form] for form, chunk in forms.items() if chunk)
    print(f"memory  TRL unchunked / Esscher: {memory[UNCHUNKED] / memory[OURS]:.1f}")
    print(f"time    Esscher / TRL chunked: {best[OURS] / chunked:.2f}")


def differences(mine: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """Of each array, relative to its largest entry."""
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(mine, other, strict=True)]


if __name__ == "__main__":
    main()

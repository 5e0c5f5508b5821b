"""Memory and time of `linear_token_logps`, value and gradient, against the same with all logits at once.

On whatever device JAX has; beside TRL's chunked head in torch, if that is installed, on a GPU if torch sees one. Every
side runs in a process of its own, in turns; times are medians, the ratio that of the medians.

    python benchmarks/token_logps.py [--rounds 7] [--tokens 4096] [--width 512] [--vocabulary 32768] [--chunk 2048]
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import _trl
import numpy as np
from _sides import measure

TILE = 32768  # entries of the vocabulary that TRL takes at a time


def arrays(options: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """The same on all sides: hidden states, unembedding, targets, and what each log-probability is multiplied by."""
    rng, rows = np.random.default_rng(0), (8, options.tokens // 8)
    unembedding = rng.standard_normal((options.width, options.vocabulary), np.float32) * options.width**-0.5
    hidden = rng.standard_normal((*rows, options.width), np.float32)
    return hidden, unembedding, rng.integers(0, options.vocabulary, rows), rng.standard_normal(rows, np.float32)


def ours(options: argparse.Namespace, chunk: int | None) -> dict[str, Callable[[], Any]]:
    """A step, chunked or with logits `[B, T, V]`, and what XLA plans for temporary arrays."""
    import jax
    import jax.numpy as jnp

    from esscher.core import tokens

    def loss(hidden, unembedding, targets, weights):
        if chunk is None:
            logp = tokens.token_logps(hidden @ unembedding, targets)
        else:
            logp = tokens.linear_token_logps(hidden, unembedding, targets, chunk=chunk)
        return jnp.vdot(weights, logp)

    inputs = [jnp.asarray(array) for array in arrays(options)]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    results: list[Any] = []

    def step() -> None:
        results[:] = [jax.block_until_ready(compiled(*inputs))]

    return {
        "step": step,
        "temporary": lambda: compiled.memory_analysis().temp_size_in_bytes,
        "results": lambda: jax.tree.map(np.asarray, jax.tree.leaves(results)),
        "device": lambda: jax.devices()[0].device_kind,
    }


def theirs(options: argparse.Namespace, threads: int) -> dict[str, Callable[[], Any]]:
    """The same by TRL's chunked head."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, unembedding, targets, weights = arrays(options)
    model = _trl.model(np.pad(hidden, ((0, 0), (0, 1), (0, 0))), unembedding, TILE, device)
    labels = torch.tensor(np.pad(targets, ((0, 0), (1, 0))), device=device)
    weights = torch.tensor(weights, device=device)
    results: list[Any] = []

    def step() -> None:
        loss = (weights * model(labels=labels, fused_lm_head=True).log_probs).sum()
        results[:] = [loss, *torch.autograd.grad(loss, (model.states, model.head.weight))]
        if device == "cuda":
            torch.cuda.synchronize()

    def found() -> list[np.ndarray]:
        loss, of_hidden, of_weight = (x.detach().cpu().numpy() for x in results)
        return [loss, of_hidden[:, :-1], of_weight.T]

    return {"step": step, "results": found}


def main() -> None:
    """Prints all sides and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 7), ("tokens", 4096), ("width", 512), ("vocabulary", 32768), ("chunk", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "")  # whatever there is
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # all sides share one GPU
    sides: dict[str, tuple] = {"chunked": (ours, options, options.chunk), "naive": (ours, options, None)}
    device = ("chunked", "device")
    if importlib.util.find_spec("trl"):
        sides |= {f"TRL chunked, {n} threads": (theirs, options, n) for n in sorted({1, os.cpu_count() or 1})}
    jobs = [(side, "step") for side in sides]
    facts = [("chunked", "temporary"), ("naive", "temporary"), device, *((side, "results") for side in sides)]
    times, results = measure(sides, jobs, options.rounds, once=facts)
    seconds = {side: statistics.median(times[side, "step"]) for side in sides}
    memory = {side: results[side, "temporary"] for side in ("chunked", "naive")}
    print(f"{options.tokens} tokens, width {options.width}, vocabulary {options.vocabulary}, {results[device]}")
    for side in sides:
        used = f"{memory[side] / 2**20:8.1f} MiB of temporary memory" if side in memory else ""
        print(f"{side:24} {seconds[side]:7.3f} s   {used}")
    mine = results["chunked", "results"]
    others = [results[side, "results"] for side in sides if side != "chunked"]
    difference = max(
        np.abs(a - b).max() / np.abs(b).max() for other in others for a, b in zip(mine, other, strict=True)
    )
    print(f"largest difference of value and gradients, relative to the largest entry: {difference:.1e}")
    print(f"memory  naive / chunked: {memory['naive'] / memory['chunked']:.1f}")
    print(f"time    chunked / naive: {seconds['chunked'] / seconds['naive']:.2f}")
    peers = [seconds[side] for side in sides if side.startswith("TRL")]
    if peers:
        print(f"time    chunked / TRL chunked: {seconds['chunked'] / min(peers):.2f}")


if __name__ == "__main__":
    main()

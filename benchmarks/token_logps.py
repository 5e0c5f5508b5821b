"""Memory and time of `linear_token_logps`, value and gradient, against the same with all logits at once.

Runs on whatever device JAX has. Both sides run in turns; times are medians, the ratio that of the medians.

    python benchmarks/token_logps.py [--rounds 7] [--tokens 4096] [--width 512] [--vocabulary 32768] [--chunk 2048]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens


def naive(hidden: Array, unembedding: Array, targets: Array) -> Array:
    """With logits `[B, T, V]`."""
    return tokens.token_logps(hidden @ unembedding, targets)


def main() -> None:
    """Prints both sides and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 7), ("tokens", 4096), ("width", 512), ("vocabulary", 32768), ("chunk", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (8, args.tokens // 8, args.width))
    unembedding = jax.random.normal(keys[1], (args.width, args.vocabulary)) * args.width**-0.5
    targets = jax.random.randint(keys[2], hidden.shape[:2], 0, args.vocabulary)
    weights = jax.random.normal(keys[3], targets.shape)
    sides = {"chunked": lambda h, w, y: tokens.linear_token_logps(h, w, y, chunk=args.chunk), "naive": naive}
    compiled, results, times = {}, {}, {name: [] for name in sides}
    for name, function in sides.items():
        loss = lambda h, w, y, g, function=function: jnp.vdot(g, function(h, w, y))  # noqa: E731
        differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled[name] = differentiate.lower(hidden, unembedding, targets, weights).compile()
    for _ in range(args.rounds + 1):
        for name, function in compiled.items():
            began = time.perf_counter()
            results[name] = jax.block_until_ready(function(hidden, unembedding, targets, weights))
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    memory = {name: function.memory_analysis().temp_size_in_bytes for name, function in compiled.items()}
    for name in sides:
        print(f"{name:8} {seconds[name]:7.3f} s   {memory[name] / 2**20:8.1f} MiB of temporary memory")
    pairs = zip(jax.tree.leaves(results["chunked"]), jax.tree.leaves(results["naive"]), strict=True)
    difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    print(f"largest difference of value and gradients, relative to the largest entry: {difference:.1e}")
    print(f"memory  naive / chunked: {memory['naive'] / memory['chunked']:.1f}")
    print(f"time    chunked / naive: {seconds['chunked'] / seconds['naive']:.2f}")


if __name__ == "__main__":
    main()

"""Images per second of 20-step DPM-Solver++(2M) against diffusers' scheduler driving the same network in torch.

Each side runs in a process of its own (two thread pools in one would fight for the cores), in turns, so that both see
the same machine; torch gets its best number of threads. The figures are medians, the ratio that of the medians.

    python benchmarks/samplers.py [--rounds 15] [--batch 64]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from _sides import measure

STEPS, SIGMA_DATA, WIDTH, DEPTH, HEADS, CLASSES = 20, 0.5, 96, 4, 4, 10
SHAPE = (8, 8, 1)


def parameters() -> dict:
    """The network's parameters, random everywhere (zero-initialised layers too), the same on both sides."""
    import jax

    from esscher.models import dit, functional

    init, _, _ = functional.initializer(lambda rngs: dit.DiT(rngs=rngs))
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [rng.normal(0, 0.08, leaf.shape).astype(np.float32) for leaf in leaves])


def ours(batch: int) -> dict[str, Callable[[], np.ndarray]]:
    """Sampling, and the network alone as often as sampling evaluates it."""
    import jax
    import jax.numpy as jnp

    from esscher.core import schedules
    from esscher.models import dit, functional, preconditioning
    from esscher.samplers import integrate, steppers

    _, apply, _ = functional.initializer(lambda rngs: dit.DiT(rngs=rngs))
    denoise, schedule = preconditioning.edm_denoiser(apply, SIGMA_DATA), schedules.edm()
    params, times = jax.tree.map(jnp.asarray, parameters()), schedules.edm_times(STEPS)
    label, stepper = jnp.arange(batch) % CLASSES, steppers.dpm_solver_pp_2m(schedule)

    def sample(params, x):
        predictor = preconditioning.denoiser_predictor(lambda x, t: denoise(params, x, t, label), schedule)
        return integrate(jax.random.key(0), stepper, predictor, x, times)

    def network(params, x):
        def body(x, t):
            return denoise(params, x, jnp.broadcast_to(t, x.shape[:1]), label), None

        return jax.lax.scan(body, x, times[:-1])[0]

    x = jnp.asarray(start(batch))
    began = time.perf_counter()
    compiled = [jax.jit(function).lower(params, x).compile() for function in (sample, network)]
    print(f"esscher: compiled sampler and network in {time.perf_counter() - began:.1f} s (not counted below)")
    return {
        name: lambda function=function: np.asarray(function(params, x))
        for name, function in zip(("sample", "network"), compiled, strict=True)
    }


def theirs(batch: int, threads: int) -> dict[str, Callable[[], np.ndarray]]:
    """The same in torch, with diffusers' scheduler."""
    import torch
    from diffusers import EDMDPMSolverMultistepScheduler

    torch.set_num_threads(threads)
    network = torch_network(parameters())
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA, rho=7.0)
    label, x_start = torch.arange(batch) % CLASSES, torch.tensor(start(batch))

    @torch.inference_mode()
    def sample() -> np.ndarray:
        scheduler.set_timesteps(STEPS)
        x = x_start
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t.expand(batch), label)
            x = scheduler.step(out, t, x).prev_sample
        return x.numpy()

    return {"sample": sample}


def torch_network(params: dict) -> Callable:
    """`models.dit.DiT` in plain torch, with fused attention and layer norm."""
    import jax
    import torch
    import torch.nn.functional as F

    def dense(layer):  # kernel [*inputs, *outputs] and bias [*outputs], as a matrix and a vector
        bias = np.asarray(layer["bias"]).reshape(-1)
        return torch.tensor(np.asarray(layer["kernel"]).reshape(-1, bias.size)).T.contiguous(), torch.tensor(bias)

    conditioning = {name: dense(params["conditioning"][name]) for name in ("hidden", "out")}
    table = torch.tensor(np.asarray(params["conditioning"]["table"]))
    patch, modulation, out = (dense(params[name]) for name in ("patch_embedding", "modulation", "out"))
    blocks = []
    for i in range(DEPTH):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        layers = {name: block[name] for name in ("modulation", "hidden", "out")} | block["attention"]
        blocks.append({name: dense(layer) for name, layer in layers.items()})
    from esscher.models.dit import positions

    position = torch.tensor(np.asarray(positions(4, WIDTH)))
    frequencies = 100.0 * 1e4 ** (-2 * torch.arange(128) / 256)

    def norm(x, scale, shift):
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    def forward(x, noise_level, label):
        b = x.shape[0]
        angles = noise_level[:, None] * frequencies
        level = F.silu(F.linear(torch.cat([angles.cos(), angles.sin()], -1), *conditioning["hidden"]))
        condition = F.silu(F.linear(level, *conditioning["out"]) + table[label])
        tokens = x.reshape(b, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(b, 16, 4)
        h = F.linear(tokens, *patch) + position
        for block in blocks:
            b1, s1, g1, b2, s2, g2 = F.linear(condition, *block["modulation"])[:, None].chunk(6, -1)
            qkv = F.linear(norm(h, s1, b1), *block["qkv"]).reshape(b, 16, HEADS, 3, WIDTH // HEADS)
            q, k, v = qkv.permute(3, 0, 2, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 16, WIDTH)
            h = h + g1 * F.linear(mixed, *block["projection"])
            hidden = F.gelu(F.linear(norm(h, s2, b2), *block["hidden"]), approximate="tanh")
            h = h + g2 * F.linear(hidden, *block["out"])
        shift, scale = F.linear(condition, *modulation)[:, None].chunk(2, -1)
        pixels = F.linear(norm(h, scale, shift), *out)
        return pixels.reshape(b, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(b, *SHAPE)

    return forward


def start(batch: int) -> np.ndarray:
    """Noise at the largest level."""
    return 80.0 * np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each measurement")
    parser.add_argument("--batch", type=int, default=64, help="images per call")
    options = parser.parse_args()
    sides = {"esscher": (ours, options.batch)}
    sides |= {f"diffusers, {n} threads": (theirs, options.batch, n) for n in sorted({1, os.cpu_count() or 1})}
    jobs = [(side, "sample") for side in sides] + [("esscher", "network")]
    times, results = measure(sides, jobs, options.rounds)
    medians = {job: statistics.median(values) for job, values in times.items()}
    rate = {side: options.batch / medians[side, "sample"] for side in sides}
    for side, value in rate.items():
        print(f"{side:24} {value:8.0f} images/s")
    difference = max(np.abs(results[side, "sample"] - results["esscher", "sample"]).max() for side in sides)
    best = max(value for side, value in rate.items() if side != "esscher")
    overhead = statistics.median(
        a / b - 1 for a, b in zip(times["esscher", "sample"], times["esscher", "network"], strict=True)
    )
    print(f"largest difference of a pixel between the two: {difference:.1e}")
    print(f"ratio to diffusers at its best: {rate['esscher'] / best:.2f}")
    print(f"cost of the solver beyond its network evaluations: {overhead:.1%}")


if __name__ == "__main__":
    main()

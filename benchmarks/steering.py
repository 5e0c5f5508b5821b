"""What a steered step costs beside the calls of the model that it makes: at most 1.05 times as much is wanted.

The digits experiment's network steered by every particle method, by SVDD and by DPS, against that network alone in a
`lax.scan`, as often and on as many states as the method asks it, differentiated where the method does. Programs run in
turns in one process; figures are medians over rounds, the ratios medians of each round's.

    python benchmarks/steering.py [--rounds 15] [--particles 256]
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
from _sides import measure

from samplers import SHAPE, SIGMA_DATA, parameters

STEPS, CANDIDATES, CLASSES = 32, 4, 10
ALONE = {"fk": "calls", "tds": "gradients", "fkc": "calls", "svdd": "svdd calls", "dps": "gradients"}


def ours(particles: int) -> dict[str, Callable[[], float]]:
    """Every method, and the network alone as often, by name."""
    import jax
    import jax.numpy as jnp

    from esscher.core import schedules
    from esscher.models import dit, functional, preconditioning
    from esscher.samplers import integrate, smc, steppers
    from esscher.samplers.diffusion import correctors, energy, kernels, steering, svdd

    _, apply, _ = functional.initializer(lambda rngs: dit.DiT(rngs=rngs))
    denoise, schedule = preconditioning.edm_denoiser(apply, SIGMA_DATA), schedules.edm()
    params, times = jax.tree.map(jnp.asarray, parameters()), schedules.edm_times(STEPS, 20.0, 0.02)
    x = 20.0 * jax.random.normal(jax.random.key(0), (particles, *SHAPE))

    def log_reward(x):
        return 0.1 * x.sum((1, 2, 3))

    def model(params):
        def ask(x, t):
            return denoise(params, x, t, jnp.full(len(x), CLASSES))

        return preconditioning.denoiser_predictor(ask, schedule)

    def carried(start, propose, first):
        last, _ = smc.run(jax.random.key(1), propose, first(start), steering.steps(times))
        return last.state.x

    def fk(params, x):
        return carried(*steering.fk_steering(model(params), log_reward, schedule), lambda start: start(x, times[0]))

    def tds(params, x):
        return carried(*steering.tds(model(params), log_reward, schedule), lambda start: start(x, times[0]))

    def fkc(params, x):
        options = {"reward": log_reward, "strength": lambda t: 1 / (1 + t**2)}
        start, propose = correctors.corrector((model(params),), (1.0,), schedule, **options)
        return carried(start, propose, lambda start: start(jax.random.key(2), len(x), SHAPE, times[0]))

    def by_candidates(params, x):
        build = lambda model: kernels.ddim_kernel(model, schedule)  # noqa: E731
        look, kernel = kernels.remembering_kernel(build, model(params), lambda s: schedule.sigma(s) == 0)
        value = kernels.remembered_value(lambda model: svdd.posterior_mean_value(model, log_reward, schedule))
        first = look(x[: particles // CANDIDATES], times[0])
        return svdd.svdd(jax.random.key(3), kernel, value, first, times, 1.0, candidates=CANDIDATES).x.x

    def dps(params, x):
        stepper = energy.dps(steppers.ancestral(schedule), lambda x: x[:, 0, :, 0], jnp.ones((len(x), SHAPE[1])), 0.5)
        return integrate(jax.random.key(4), stepper, model(params), x, times)

    def calls(gradient, count):
        def network(params, x):
            def body(x, t):
                ask = lambda x: model(params)(x, jnp.broadcast_to(t, x.shape[:1])).data  # noqa: E731
                return jax.grad(lambda x: log_reward(ask(x)).sum())(x) if gradient else ask(x), None

            return jax.lax.scan(body, x, times[:count])[0]

        return network

    # SVDD looks at all candidates of every step but the last, and at the start at a quarter as many, left out here.
    functions = {"fk": fk, "tds": tds, "fkc": fkc, "svdd": by_candidates, "dps": dps}
    functions |= {"calls": calls(False, STEPS), "gradients": calls(True, STEPS), "svdd calls": calls(False, STEPS - 1)}
    compiled = {name: jax.jit(function).lower(params, x).compile() for name, function in functions.items()}
    return {name: lambda run=run: float(np.asarray(run(params, x)).std()) for name, run in compiled.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="repetitions, of which the median is taken")
    parser.add_argument("--particles", type=int, default=256, help="states that the model is asked about at once")
    arguments = parser.parse_args()
    jobs = [("esscher", name) for name in (*ALONE, *dict.fromkeys(ALONE.values()))]
    times, _ = measure({"esscher": (ours, arguments.particles)}, jobs, arguments.rounds)
    print(f"{arguments.particles} states, {STEPS} steps")
    for method, calls in ALONE.items():
        taken, least = times["esscher", method], times["esscher", calls]
        ratio = statistics.median(a / b for a, b in zip(taken, least, strict=True))
        seconds = statistics.median(taken), statistics.median(least)
        print(f"{method:5} {seconds[0]:6.3f} s, its calls of the model alone {seconds[1]:6.3f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()

"""A bootstrap filter with 100,000 particles and 100 steps, against `particles` (NumPy and numba) and BlackJAX.

The model is a linear-Gaussian one, so that a Kalman filter knows the answer. All resample systematically: `particles`
when the effective sample size falls below a half, BlackJAX, in one `lax.scan`, at every step, and ours once as the one
and once as the other, so that each ratio is between filters that do the same. Each side runs in a process of its own,
in turns; figures are medians, the ratios those of the medians.

    python benchmarks/smc.py [--rounds 9]
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
from _sides import measure

PARTICLES, STEPS = 100_000, 100
PERSISTENCE, NOISE, SENSOR = 0.9, 0.5, 0.4


def observations() -> np.ndarray:
    """Of a path of the model."""
    rng, x, seen = np.random.default_rng(0), 0.0, []
    for _ in range(STEPS):
        x = PERSISTENCE * x + NOISE * rng.normal()
        seen.append(x + SENSOR * rng.normal())
    return np.array(seen, np.float32)


def likelihood() -> float:
    """The exact log-likelihood, by the Kalman filter."""
    mean, variance, total = 0.0, 1.0, 0.0
    for y in observations():
        mean, variance = PERSISTENCE * mean, PERSISTENCE**2 * variance + NOISE**2
        spread = variance + SENSOR**2
        total -= 0.5 * (np.log(2 * np.pi * spread) + (y - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return total


def ours() -> dict[str, Callable[[], float]]:
    """`smc.run`, which resamples where weights have drifted, or at every step."""
    import jax
    import jax.numpy as jnp

    from esscher.samplers import smc

    def propose(key, x, y):
        x = PERSISTENCE * x + NOISE * jax.random.normal(key, x.shape)
        return x, -0.5 * jnp.log(2 * jnp.pi * SENSOR**2) - 0.5 * jnp.square((y - x) / SENSOR)

    @jax.jit
    def run(key, y, ess_threshold):
        start_key, key = jax.random.split(key)
        start = smc.begin(jax.random.normal(start_key, (PARTICLES,)))
        return smc.run(key, propose, start, y, ess_threshold=ess_threshold)[0].log_z

    keys, y = iter(range(10**6)), jnp.asarray(observations())
    thresholds = {"adaptive": 0.5, "every step": jnp.inf}
    return {how: lambda at=at: float(run(jax.random.key(next(keys)), y, at)) for how, at in thresholds.items()}


def numba() -> dict[str, Callable[[], float]]:
    """`particles.SMC`, its own bootstrap filter."""
    import particles
    from particles import distributions, state_space_models

    class Linear(state_space_models.StateSpaceModel):
        def PX0(self):
            return distributions.Normal()

        def PX(self, t, xp):
            return distributions.Normal(PERSISTENCE * xp, NOISE)

        def PY(self, t, xp, x):
            return distributions.Normal(x, SENSOR)

    data = observations()

    class Shifted(Linear):  # the first observation is of the first step, not of the start
        def PX0(self):
            return distributions.Normal(0.0, (PERSISTENCE**2 + NOISE**2) ** 0.5)

    def run():
        filtering = state_space_models.Bootstrap(ssm=Shifted(), data=data)
        sampler = particles.SMC(fk=filtering, N=PARTICLES, resampling="systematic", ESSrmin=0.5)
        sampler.run()
        return float(sampler.logLt)

    return {"adaptive": run}


def blackjax() -> dict[str, Callable[[], float]]:
    """BlackJAX's generic step in a `lax.scan`."""
    import jax
    import jax.numpy as jnp
    from blackjax.smc import base, resampling

    def step(state, inputs):
        key, y = inputs

        def update(keys, x, _):
            return PERSISTENCE * x + NOISE * jax.vmap(jax.random.normal)(keys), None

        def weigh(x):
            return -0.5 * jnp.log(2 * jnp.pi * SENSOR**2) - 0.5 * jnp.square((y - x) / SENSOR)

        state, info = base.step(key, state, update, jax.vmap(weigh), resampling.systematic)
        return state, info.log_likelihood_increment

    @jax.jit
    def run(key, y):
        start_key, key = jax.random.split(key)
        start = base.init(jax.random.normal(start_key, (PARTICLES,)), ())
        return jax.lax.scan(step, start, (jax.random.split(key, STEPS), y))[1].sum()

    keys, y = iter(range(10**6)), jnp.asarray(observations())
    return {"every step": lambda: float(run(jax.random.key(next(keys)), y))}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="repetitions, of which the median is taken")
    arguments = parser.parse_args()
    sides = {"esscher": (ours,), "particles": (numba,), "blackjax": (blackjax,)}
    jobs = [("esscher", "adaptive"), ("particles", "adaptive"), ("esscher", "every step"), ("blackjax", "every step")]
    times, found = measure(sides, jobs, arguments.rounds)
    print(f"{PARTICLES:,} particles, {STEPS} steps; exact log-likelihood {likelihood():.3f}")
    for side, how in jobs:
        seconds = statistics.median(times[side, how])
        ratio = seconds / statistics.median(times["esscher", how])
        print(f"resampled {how:10} {side:9} {seconds:7.3f} s   {ratio:5.2f}x   log-likelihood {found[side, how]:.3f}")


if __name__ == "__main__":
    main()

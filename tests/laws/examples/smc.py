"""Resampling, the particle engine, and steering by weights, on the exact predictor of a Gaussian mixture."""

import jax
import jax.numpy as jnp
from laws.examples.samplers import COSINE, KEY, UNCOND
from laws.harness import Example

from esscher.core import schedules
from esscher.samplers import resampling, smc
from esscher.samplers.diffusion import correctors, kernels, steering, svdd

LOG_W = jax.random.normal(jax.random.key(2), (16,))
X = jax.random.normal(jax.random.key(3), (16, 2))
TIMES = schedules.uniform_times(3).at[0].set(0.95)
INSIDE = jnp.array([0.95, 0.6, 0.3])
KERNEL = kernels.ddim_kernel(UNCOND, COSINE)
BAD_TIMES = {"a single time": ("times", jnp.ones(1)), "whole times": ("times", jnp.arange(4))}


def log_reward(x):
    return -jnp.square(x[:, 0] - 1)


def walk(key, x, size):
    x = x + size * jax.random.normal(key, x.shape)
    return x, log_reward(x)


def scheme(function):
    return Example(
        name=function.__name__,
        function=function,
        arguments={"key": KEY, "log_w": LOG_W},
        covers=(function,),
        bad={"a matrix": ("log_w", jnp.zeros((2, 3))), "whole weights": ("log_w", jnp.arange(3))},
    )


def steered(make):
    """A whole run of a pair of start and `propose`, as a function of the states and the grid."""

    def sample(key, x, times, **hyper):
        start, propose = make(**hyper)
        last, trace = smc.run(key, propose, start(x, times[0]), steering.steps(times))
        return jax.tree.leaves(last.state)[0], jnp.exp(last.log_w), last.log_z, trace.ess

    return sample


def corrected(key, rho, power, strength):
    start, propose = correctors.corrector(
        (UNCOND,), (power,), COSINE, rho=rho, reward=log_reward, strength=lambda t: strength * (1 - t)
    )
    start_key, key = jax.random.split(key)
    last, _ = smc.run(key, propose, start(start_key, 16, (2,), TIMES[0]), steering.steps(TIMES))
    return last.state.x, jnp.exp(last.log_w), last.log_z


def one_path(key, x):
    last, trace = smc.run(key, walk, smc.begin(x), jnp.ones(3), history=True)
    return smc.sample_path(key, last, trace.history)


def remembering(key, x, eta):
    """A step of a remembering kernel, and the value of where it ends."""
    look, kernel = kernels.remembering_kernel(lambda model: kernels.ddim_kernel(model, COSINE, eta), UNCOND)
    new = kernel.sample(key, look(x, jnp.asarray(0.8)), jnp.asarray(0.8), jnp.asarray(0.5))
    value = kernels.remembered_value(lambda model: svdd.posterior_mean_value(model, log_reward, COSINE))
    return new.x, value(new, jnp.asarray(0.5))


EXAMPLES = [
    *map(scheme, (resampling.multinomial, resampling.residual, resampling.stratified, resampling.systematic)),
    Example(
        name="effective_sample_size",
        function=smc.effective_sample_size,
        arguments={"log_w": jax.random.normal(KEY, (8, 5))},
        covers=(smc.effective_sample_size,),
        differentiable=("log_w",),
        batch=("log_w",),
    ),
    Example(
        name="smc.run",
        function=lambda key, x, log_w, sizes, ess_threshold: smc.run(
            key, walk, smc.begin(x, log_w), sizes, ess_threshold=ess_threshold
        )[0],
        arguments={"key": KEY, "x": X, "log_w": LOG_W, "sizes": jnp.ones(3), "ess_threshold": jnp.asarray(0.7)},
        covers=(smc.run, smc.begin),
        hyperparameters=("ess_threshold",),
        bad={"too few weights": ("log_w", jnp.zeros(3))},
    ),
    Example(
        name="conditional",
        function=lambda key, x, states: smc.paths(
            smc.conditional(key, walk, smc.begin(x), jnp.ones(3), smc.Path(states, jnp.zeros(4)))[1].history
        ),
        arguments={"key": KEY, "x": X, "states": jnp.zeros((4, 2))},
        covers=(smc.conditional, smc.paths),
        bad={"a path too short": ("states", jnp.zeros((3, 2)))},
    ),
    Example(
        name="sample_path",
        function=one_path,
        arguments={"key": KEY, "x": X},
        covers=(smc.sample_path,),
    ),
    Example(
        name="waste_free",
        function=lambda key, x, sizes: smc.waste_free(
            key, lambda *a: walk(*a)[0], lambda x, _: log_reward(x), smc.begin(x), sizes, chains=4
        )[0],
        arguments={"key": KEY, "x": X, "sizes": jnp.ones(3)},
        covers=(smc.waste_free,),
    ),
    Example(
        name="ddim_kernel",
        function=lambda key, x, x_s, eta: (
            kernels.ddim_kernel(UNCOND, COSINE, eta).sample(key, x, 0.8, 0.5),
            kernels.ddim_kernel(UNCOND, COSINE, eta).log_prob(x_s, x, 0.8, 0.5),
        ),
        arguments={"key": KEY, "x": X, "x_s": X[::-1], "eta": jnp.asarray(0.8)},
        covers=(kernels.ddim_kernel, kernels.ddim_moments, kernels.normal_log_prob, kernels.check_noise),
        hyperparameters=("eta",),
        differentiable=("x", "x_s", "eta"),
        batch=("x", "x_s"),
        bf16_tolerance=0.05,
        exempt={"errors": "the predictor is the first to see a wrong x; a test shows one that is not that of x_s"},
    ),
    Example(
        name="remembering_kernel",
        function=remembering,
        arguments={"key": KEY, "x": X, "eta": jnp.asarray(0.8)},
        covers=(kernels.remembering_kernel, kernels.remembered_value),
        hyperparameters=("eta",),
        differentiable=("x", "eta"),
        batch=("x",),
        bf16_tolerance=0.05,
        exempt={"errors": "the model is the first to see a wrong x, and states may be tokens"},
    ),
    Example(
        name="twisted",
        function=steered(lambda: steering.twisted(KERNEL, lambda x, t: log_reward(x), KERNEL)),
        arguments={"key": KEY, "x": X, "times": INSIDE},
        covers=(steering.twisted, steering.steps, steering.check_ends, kernels.check_kernel),
        bad=BAD_TIMES,
    ),
    Example(
        name="tds",
        function=steered(lambda eta: steering.tds(UNCOND, log_reward, COSINE, eta=eta)),
        arguments={"key": KEY, "x": X, "times": TIMES, "eta": jnp.asarray(0.9)},
        covers=(steering.tds,),
        hyperparameters=("eta",),
        bad=BAD_TIMES,
    ),
    Example(
        name="fk_steering",
        function=steered(lambda eta: steering.fk_steering(UNCOND, log_reward, COSINE, potential="max", eta=eta)),
        arguments={"key": KEY, "x": X, "times": TIMES, "eta": jnp.asarray(0.9)},
        covers=(steering.fk_steering,),
        hyperparameters=("eta",),
        bad=BAD_TIMES,
    ),
    Example(
        name="svdd",
        function=lambda key, x, times, beta: svdd.svdd(
            key, KERNEL, svdd.posterior_mean_value(UNCOND, log_reward, COSINE), x, times, beta, candidates=3
        ),
        arguments={"key": KEY, "x": X, "times": TIMES, "beta": jnp.asarray(0.5)},
        covers=(svdd.svdd, svdd.posterior_mean_value),
        hyperparameters=("beta",),
        bad={**BAD_TIMES, "temperatures of another batch": ("beta", jnp.ones(5))},
    ),
    Example(
        name="svdd_select",
        function=lambda values, beta: svdd.svdd_select(KEY, values, beta, greedy=True),
        arguments={"values": jax.random.normal(KEY, (8, 5)), "beta": jnp.asarray(0.5)},
        covers=(svdd.svdd_select,),
        hyperparameters=("beta",),
        batch=("values",),
        bad={"values of one sample": ("values", jnp.ones(4)), "temperatures of another batch": ("beta", jnp.ones(5))},
    ),
    Example(
        name="corrector",
        function=corrected,
        arguments={"key": KEY, "rho": jnp.asarray(1.5), "power": jnp.asarray(1.3), "strength": jnp.asarray(0.5)},
        covers=(correctors.corrector,),
        hyperparameters=("rho", "power", "strength"),
    ),
]

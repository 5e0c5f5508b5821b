"""Solvers and guidance, on the exact predictors of a Gaussian mixture and of its two classes."""

import functools

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.samplers import guidance, integration, inversion, steppers
from esscher.samplers.steppers import coefficients

LOG_WEIGHTS = jnp.log(jnp.array([0.3, 0.7]))
MEANS = jnp.array([[-1.0, 0.5], [1.5, 0.0]])
VARIANCES = jnp.array([0.2, 0.5])
COSINE = schedules.cosine()
X = jax.random.normal(jax.random.key(0), (8, 2))
KEY = jax.random.key(1)
TIMES = schedules.uniform_times(3)  # from no signal at all to no noise at all
SIGNAL = TIMES.at[0].set(0.95)


def components(schedule, x, t):
    """For each component of the noisy mixture: `(m_k - x) / C_k`, with the sign of the noise, and `log p(k | x)`."""
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    variances = alpha**2 * VARIANCES[:, None] + sigma**2
    errors = (x[:, None] - alpha * MEANS) / variances
    return errors, jax.nn.log_softmax(LOG_WEIGHTS - 0.5 * jnp.sum(variances * errors**2 + jnp.log(variances), -1))


def predictor(schedule, only=None):
    """The exact predictor of the mixture, or of one class; it compiles ten times faster than `GaussianMixture`'s."""

    def predict(x, t):
        errors, log_shares = components(schedule, x, t)
        shares = jnp.exp(log_shares) if only is None else jnp.zeros(2).at[only].set(1.0)[None]
        posterior_means = MEANS + schedule.alpha(t)[:, None, None] * VARIANCES[:, None] * errors
        mean = lambda values: jnp.sum(shares[..., None] * values, 1)  # noqa: E731
        return Prediction(mean(posterior_means), schedule.sigma(t)[:, None] * mean(errors))

    return predict


UNCOND, CLASS_0, CLASS_1 = predictor(COSINE), predictor(COSINE, 0), predictor(COSINE, 1)


def log_prob(x, t):
    return components(COSINE, x, t)[1][:, 1]


DRIVERS = integration.integrate, integration.carried, integration.check_times, integration.check_prediction


def sampling(make, *, schedule=COSINE, times=TIMES, keyed=False, covers=(), **hyper):
    """The sampler of one stepper; a deterministic one gets a fixed key, so that the laws of batches see it."""

    def sample(x, times, key=KEY, **hyper):
        return integration.integrate(key, make(schedule, **hyper), predictor(schedule), x, times)

    public = make.func if isinstance(make, functools.partial) else make
    return Example(
        name=public.__name__,
        function=sample,
        arguments={"x": X, "times": times, **({"key": KEY} if keyed else {}), **hyper},
        covers=(public, *DRIVERS, *covers),
        hyperparameters=tuple(hyper),
        differentiable=("x", *hyper),
        batch=("x",),
        bf16_tolerance=0.05,  # the state is rounded after each step
        bad={
            "a single time": ("times", jnp.ones(1)),
            "a matrix of times": ("times", jnp.ones((3, 3))),
            "whole times": ("times", jnp.arange(4)),
        },
    )


def guided(function, make, **weights):
    """A sampler with a guided predictor, as a function of the state and scalar weights."""
    return Example(
        name=function.__name__,
        function=lambda x, **weights: integration.integrate(KEY, steppers.euler(COSINE), make(**weights), x, TIMES),
        arguments={"x": X, **{name: jnp.asarray(value) for name, value in weights.items()}},
        covers=(function,),
        hyperparameters=tuple(weights),
        differentiable=("x", *weights),
        batch=("x",),
        bf16_tolerance=0.05,
        bad={f"{name} of another batch": (name, jnp.ones(5)) for name in weights},
    )


def shifted(data, noise, change, alpha, sigma):
    return coefficients.shift_score(Prediction(data, noise), change, alpha, sigma)


EXAMPLES = [
    Example(
        name="shift_score",
        function=shifted,
        arguments={
            "data": X,
            "noise": X[::-1],
            "change": 0.3 * X,
            "alpha": jnp.asarray(0.8),
            "sigma": jnp.asarray(0.6),
        },
        covers=(coefficients.shift_score, coefficients.tweedie_ratio),
        hyperparameters=("alpha", "sigma"),
        differentiable=("data", "noise", "change", "alpha", "sigma"),
        batch=("data", "noise", "change"),
        exempt={"errors": "it is handed what the solvers have checked"},
    ),
    sampling(steppers.euler),
    sampling(steppers.heun),
    sampling(
        steppers.ddim,
        keyed=True,
        eta=jnp.asarray(0.6),
        covers=(coefficients.first_order, coefficients.noise_levels, coefficients.step_coefficients),
    ),
    sampling(steppers.ancestral, times=SIGNAL, keyed=True),
    sampling(
        functools.partial(steppers.edm_stochastic, n=3),
        schedule=schedules.edm(),
        times=jnp.array([3.0, 1.0, 0.3, 0.0]),
        keyed=True,
        covers=(coefficients.standard_normal,),
        churn=jnp.asarray(0.6),
        noise_scale=jnp.asarray(1.01),
    ),
    sampling(steppers.dpm_solver_1, times=SIGNAL),
    sampling(steppers.dpm_solver_2, times=SIGNAL),
    sampling(steppers.dpm_solver_3, times=SIGNAL),
    sampling(steppers.dpm_solver_pp_2m, covers=(coefficients.implied_data,)),
    sampling(steppers.sde_dpm_solver_pp_2m, times=SIGNAL, keyed=True),
    sampling(functools.partial(steppers.unipc, order=3), covers=(coefficients.phis,)),
    Example(
        name="invert",
        function=lambda x, times: inversion.invert(UNCOND, x, times, COSINE),
        arguments={"x": X, "times": SIGNAL},
        covers=(inversion.invert, integration.check_inputs),
        differentiable=("x",),
        batch=("x",),
        bf16_tolerance=0.05,
        bad={"a single time": ("times", jnp.ones(1)), "whole times": ("times", jnp.arange(4))},
    ),
    guided(guidance.cfg, lambda w: guidance.cfg(CLASS_1, UNCOND, w), w=2.5),
    guided(guidance.autoguidance, lambda w: guidance.autoguidance(CLASS_1, UNCOND, w), w=1.8),
    guided(guidance.cfg_plus_plus, lambda w: guidance.cfg_plus_plus(CLASS_1, UNCOND, w), w=0.6),
    guided(guidance.rescale, lambda phi: guidance.rescale(CLASS_1, UNCOND, phi, COSINE), phi=0.7),
    guided(guidance.classifier, lambda w: guidance.classifier(UNCOND, log_prob, w, COSINE), w=1.5),
    Example(
        name="mix",
        function=lambda x, w, v: tuple(guidance.mix((UNCOND, CLASS_1, CLASS_0), (w, v))(x, jnp.full(x.shape[:1], 0.4))),
        arguments={"x": X, "w": jnp.linspace(0.0, 3.0, 8), "v": jnp.asarray(-0.5)},
        covers=(guidance.mix,),
        hyperparameters=("v",),
        differentiable=("x", "v"),
        batch=("x", "w"),
        exempt={"errors": "a longer x is a shorter w; cfg, which is a mix, is shown weights of a wrong shape"},
    ),
    Example(
        name="interval",
        function=lambda t, w, low, high: guidance.interval(w, low, high)(t),
        arguments={
            "t": jnp.linspace(0.0, 1.0, 8),
            "w": jnp.asarray(3.0),
            "low": jnp.asarray(0.3),
            "high": jnp.asarray(0.8),
        },
        covers=(guidance.interval,),
        hyperparameters=("w", "low", "high"),
        differentiable=("w",),
        batch=("t",),
        bad={"a weight of another batch": ("w", jnp.ones(5)), "an end of another batch": ("low", jnp.zeros(5))},
    ),
]

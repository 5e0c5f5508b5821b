r"""Feynman-Kac correctors: annealed, multiplied, guided and tilted diffusions, with the weights that make them exact.

The targets on the way are `prod_i q_(i,t)(x)^(c_i) exp(b(t) r(x))`, with `q_(i,t)` the marginals of models that share a
schedule. One formula has them all, by its exponents: annealing `c = (a,)`, a product of experts `(1, 1)`,
classifier-free guidance `(1 - w, w)` of (unconditional, conditional), a reward's tilt `(1,)` with `b`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import at_least_float32, check_known, expand_like, normal, one_per_example, squared_norm
from esscher.core.contracts import Prediction, Predictor
from esscher.core.schedules import Schedule
from esscher.samplers import smc
from esscher.samplers.diffusion.steering import check_ends
from esscher.samplers.steppers.coefficients import StepCoefficients, implied_data, step_coefficients, tweedie_ratio

__all__ = ["Corrected", "corrector"]


class Corrected(NamedTuple):
    """A particle, and what the last evaluation found, for the second order of the steps."""

    x: Array  # [N, ...]
    data: tuple[Array, ...]  # [N, ...] the data term of the mixed scores, and with a reward that pulled by it
    rate: Array  # [N] of the log-weight in lam
    lam: Array  # [N] where that was; inf if nowhere


def corrector(
    predictors: Sequence[Predictor],
    exponents: Sequence[float | Array],
    schedule: Schedule,
    *,
    rho: float | Array = 1.0,
    reward: Callable[[Array], Array] | None = None,
    strength: Callable[[Array], Array] | None = None,
) -> tuple[Callable[[Array, int, tuple[int, ...], Array], smc.Particles], smc.Propose]:
    r"""SMC along `prod_i q_(i,t)^(c_i) exp(b(t) r)`: a start and a `propose` over `steering.steps(times)`.

    With the scores mixed, `S = sum_i c_i s_i`, and noise `rho`, particles follow, in reverse time,

        dx = (-f x + (1 + rho)/2 g^2 S + rho/2 g^2 b grad r) dtau + sqrt(rho g^2) dW,
        dlog w = g^2/2 (|S|^2 - sum_i c_i |s_i|^2) dtau + (C - 1) D f dtau + b' r dtau + b grad r . v dtau,

    `C = sum_i c_i`, `v = -f x + g^2/2 S`, for `D` coordinates: the weights do not depend on `rho`. Steps are those of
    an exponential integrator in `lam = log(alpha / sigma)`, exact while the data term of `S` does not change, where
    `g^2/2 dtau = sigma^2 dlam`; the first line of the weights is `(|sum c eps|^2 - sum c |eps|^2) h`. So the law is
    that of the target up to the steps' error, which vanishes with their size. A step to `sigma = 0` or from
    `alpha = 0` is of infinite `h`: it moves particles as DDIM would and adds no such weight, so begin and end the grid
    beside them, and let at most a last step remove the remaining noise.

    Args:
      predictors: the models, one evaluation of each a step.
      exponents: `c_i`, of a sum above 0; may be traced.
      schedule: the noise schedule.
      rho: noise, at least 0, 1 that of the reverse SDE. More lets particles forget each other, so that modes keep their
        shares, and needs smaller steps; at 0 nothing tells copies of a particle apart again, so that resampling
        collapses: leave it out then, by an `ess_threshold` of 0.
      reward: `r`, `[N, ...] -> [N]`, of noisy states; differentiated.
      strength: `b(t)`, `1 / beta` at the end and 0 at the start of the grid; with the reward.

    Returns:
      `start(key, n, shape, t)`, which draws from `N(0, sigma(t)^2 / C)` and knows its normaliser (right where the
      signal is lost in noise at `t`), and `propose`.

    Raises:
      ValueError: not one exponent for each predictor, known exponents whose sum is not above 0, a known `rho` below 0,
        a reward without a strength, or one that is not `[N]`.

    Reference: Feynman-Kac Correctors in Diffusion, arXiv:2503.02819.
    """
    if len(predictors) != len(exponents) or not predictors:
        raise ValueError(f"exponents must be one for each predictor, got {len(exponents)} for {len(predictors)}")
    total, worth = sum(exponents), lambda x: at_least_float32(one_per_example(x, reward=reward(x)))
    if not isinstance(total, jax.core.Tracer) and not np.all(np.asarray(total) > 0):
        raise ValueError(f"exponents must have a sum above 0, else the target has no mass that is finite, got {total}")
    check_known(lambda rho: rho >= 0, "at least 0", rho=rho)
    if (reward is None) != (strength is None):
        raise ValueError("reward and strength belong together: give both or neither")

    def start(key: Array, n: int, shape: tuple[int, ...], t: Array) -> smc.Particles:
        sigma, size = schedule.sigma(jnp.asarray(t)), int(np.prod(shape))
        x = sigma / jnp.sqrt(total) * jax.random.normal(key, (n, *shape))
        log_z = 0.5 * size * ((1 - total) * jnp.log(2 * jnp.pi * sigma**2) - jnp.log(total))
        particles = smc.begin(
            Corrected(x, (x,) * (1 if reward is None else 2), jnp.zeros(n), jnp.full(n, jnp.inf)),
            None if reward is None else strength(t) * worth(x),
        )
        return particles._replace(log_z=particles.log_z + log_z)

    def propose(key: Array, state: Corrected, ends: tuple[Array, Array]) -> tuple[Corrected, Array]:
        x, (t, s) = state.x, check_ends(ends)
        c = step_coefficients(schedule, t, s)
        noises = [predictor(x, jnp.broadcast_to(t, x.shape[:1])).noise for predictor in predictors]
        mixed = sum(e * noise for e, noise in zip(exponents, noises, strict=True))
        rate = squared_norm(mixed) - sum(e * squared_norm(noise) for e, noise in zip(exponents, noises, strict=True))
        data = (implied_data(x, Prediction(jnp.zeros_like(x), mixed), c),)
        if reward is not None:
            found, pullback = jax.vjp(worth, x)
            pull = rho / (1 + rho) * strength(t) * pullback(jnp.ones_like(found))[0]
            data += (data[0] + tweedie_ratio(c.alpha_t, c.sigma_t) * pull,)
        usable = jnp.isfinite(state.lam) & c.regular
        slope = jnp.where(usable, 0.5 * c.finite_h / jnp.where(usable, c.lam - state.lam, 1.0), 0.0)
        ahead = [new + expand_like(slope, x) * (new - old) for new, old in zip(data, state.data, strict=True)]
        log_scale = jnp.log(jnp.where(c.regular, c.alpha_t, 1.0) / jnp.where(c.regular, c.alpha_s, 1.0))
        mean_rate = rate + slope * (rate - state.rate)
        delta = jnp.where(c.regular, c.finite_h * mean_rate + (total - 1) * x[0].size * log_scale, 0.0)
        if reward is not None:
            delta += strength(s) * worth(_step(key, x, ahead[0], c, 0.0)) - strength(t) * found
        lam = jnp.where(c.alpha_t > 0, c.lam, jnp.inf)
        return Corrected(_step(key, x, ahead[-1], c, rho), data, rate, jnp.broadcast_to(lam, rate.shape)), delta

    return start, propose


def _step(key: Array, x: Array, data: Array, c: StepCoefficients, rho: float | Array) -> Array:
    """`alpha_s D + (sigma_s / sigma_t) e^(-rho h) (x - alpha_t D) + sigma_s sqrt(1 - e^(-2 rho h)) z`."""
    kept = jnp.where(c.regular, jnp.exp(-rho * c.finite_h), rho == 0.0)
    fresh = jnp.sqrt(jnp.where(c.regular, -jnp.expm1(-2 * rho * c.finite_h), rho > 0.0))
    noise = kept / c.sigma_t * (x - c.alpha_t * data) + fresh * normal(key, x.shape, x.dtype)
    return (c.alpha_s * data + c.sigma_s * noise).astype(x.dtype)

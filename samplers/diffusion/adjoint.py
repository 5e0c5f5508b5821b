r"""Gradients through the probability flow, in memory that grows with its steps or does not.

In the coordinates `y = x / alpha`, `rho = sigma / alpha` the flow is `dy/drho = eps(alpha y, t(rho))`, with no linear
part, and it can be solved backwards as well as forwards. With `v = dL/dy` the adjoint ODE is
`dv/drho = -(d eps/dy)' v`, and `dL/dparams = -int v' (d eps/dparams) drho` from the clean end to the noisy one.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating
from esscher.core.contracts import Prediction
from esscher.core.schedules import Schedule
from esscher.samplers.integration import check_inputs

__all__ = ["Gradient", "Method", "pf_ode_solve"]

Gradient = Literal["autodiff", "checkpoint", "adjoint"]
Method = Literal["euler", "midpoint"]
Field = Callable[[Any, Array], Any]
"""`(state, rho) -> d state / d rho`, of one structure."""


def pf_ode_solve(
    predictor: Callable[[Any, Array, Array], Prediction],
    params: Any,
    x: Array,
    times: Array,
    schedule: Schedule,
    *,
    method: Method = "euler",
    grad: Gradient = "autodiff",
) -> Array:
    r"""Solves the probability flow from `times[0]` to `times[-1]`; `grad` says what differentiating it costs.

        y_s = y_t + (rho_s - rho_t) eps(y_t, rho_t)                          "euler", which is DDIM
        y_s = y_t + (rho_s - rho_t) eps(y_m, (rho_t + rho_s) / 2)            "midpoint", y_m by half a step of Euler's

    The value is the same for every `grad`. "autodiff" keeps all that the model computed in each step; "checkpoint"
    keeps the states and computes each step again, for the same gradient. "adjoint" keeps the result alone and solves
    state, adjoint and parameters' gradient backwards by the same method: its gradient is that of the exact flow up to
    the steps' error, of the order of the method, and not that of the discrete solution. Prefer "checkpoint" while it
    fits.

    Args:
      predictor: `(params, x_t[B, ...], t[B]) -> Prediction`, of which the noise term is used. All that is to get a
        gradient, conditions too, must be in `params`, not closed over; with "adjoint" JAX refuses the latter.
      params: a pytree of floating arrays.
      x: the state at `times[0]`, `[B, ...]`; the result has its type.
      times: `[N + 1]`, strictly decreasing, with `alpha > 0`; they get no gradient. With "adjoint" the last one needs a
        prediction too, even at `sigma = 0`.
      schedule: the noise schedule.
      method: see above; one and two evaluations a step.
      grad: see above; "adjoint" cannot be differentiated forwards or twice.

    Returns:
      The state at `times[-1]`, `[B, ...]`.

    Raises:
      ValueError: as `integrate`; an unknown method or gradient, parameters that are not floating.

    Reference: AdjointDPM, arXiv:2307.10711.
    """
    x, times = check_inputs(x, times)
    check_floating(**{f"params{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(params)})
    if method not in ("euler", "midpoint"):
        raise ValueError(f'method must be "euler" or "midpoint", got {method!r}')
    if grad not in ("autodiff", "checkpoint", "adjoint"):
        raise ValueError(f'grad must be "autodiff", "checkpoint" or "adjoint", got {grad!r}')
    times = jax.lax.stop_gradient(at_least_float32(times))

    def noise(params: Any, y: Array, rho: Array) -> Array:
        t = schedule.inverse_log_snr_half(-jnp.log(rho))
        state = (schedule.alpha(t) * y).astype(x.dtype)
        return predictor(params, state, jnp.broadcast_to(t, x.shape[:1])).noise.astype(y.dtype)

    rhos = schedule.sigma(times) / schedule.alpha(times)
    y = at_least_float32(x) / schedule.alpha(times[0])
    if grad == "adjoint":
        y = _with_adjoint(noise, method, params, y, rhos)
    else:
        y = _solve(lambda y, rho: noise(params, y, rho), y, rhos, method, remat=grad == "checkpoint")
    return (schedule.alpha(times[-1]) * y).astype(x.dtype)


def _solve(field: Field, state: Any, rhos: Array, method: Method, *, remat: bool = False) -> Any:
    """The state at `rhos[-1]`, in either direction."""

    def ahead(state: Any, slope: Any, size: Array) -> Any:
        return jax.tree.map(lambda value, slope: (value + size * slope).astype(value.dtype), state, slope)

    def step(state: Any, ends: tuple[Array, Array]) -> tuple[Any, None]:
        start, end = ends
        slope = field(state, start)
        if method == "midpoint":
            middle = 0.5 * (start + end)
            slope = field(ahead(state, slope, middle - start), middle)
        return ahead(state, slope, end - start), None

    return jax.lax.scan(jax.checkpoint(step) if remat else step, state, (rhos[:-1], rhos[1:]))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_adjoint(noise: Callable, method: Method, params: Any, y: Array, rhos: Array) -> Array:
    return _solve(lambda y, rho: noise(params, y, rho), y, rhos, method)


def _forward(noise: Callable, method: Method, params: Any, y: Array, rhos: Array) -> tuple[Array, tuple]:
    y = _with_adjoint(noise, method, params, y, rhos)
    return y, (params, y, rhos)


def _backward(noise: Callable, method: Method, kept: tuple, v: Array) -> tuple[Any, Array, Array]:
    params, y, rhos = kept

    def field(state: tuple[Array, Array, Any], rho: Array) -> tuple[Array, Array, Any]:
        y, v, _ = state
        slope, pull = jax.vjp(lambda params, y: noise(params, y, rho), params, y)
        by_params, by_y = pull(v)
        return slope, -by_y, jax.tree.map(jnp.negative, by_params)

    wide = jax.tree.map(lambda leaf: jnp.zeros_like(at_least_float32(leaf)), params)  # a sum over many steps
    _, v, total = _solve(field, (y, v, wide), rhos[::-1], method)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), total, params), v, jnp.zeros_like(rhos)


_with_adjoint.defvjp(_forward, _backward)

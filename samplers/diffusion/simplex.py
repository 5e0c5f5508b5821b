r"""Flow matching on the simplex by a falling temperature, and guidance of it by straight-through gradients.

Time runs as elsewhere, from noise at `t = 1` to data at `t = 0`, with `tau(t) = tau_max exp(-decay (1 - t))`: a paper's
`t` is `1 - t` here. A token `k` is carried along `x_t = softmax(e_k / tau(t) + s g)`, with `g` Gumbel noise that stays
what it is, so that `dx_i/dt = -(decay / tau) x_i (1[i = k] - x_k)`, whatever the noise; its mean over what the model
says of the token is the velocity. If the noise is cooled too, as in `softmax((e_k + g / b) / tau)`, that is no longer
the velocity of the path, and `x_t` says no more of the token at the end than at the start.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    check_floating,
    check_per_example,
    check_same_shape,
    expand_like,
    one_per_example,
)
from esscher.core.autodiff import straight_through
from esscher.samplers.integration import check_inputs

__all__ = [
    "gumbel_interpolant",
    "simplex_euler",
    "simplex_temperature",
    "simplex_velocity",
    "stg_guidance",
]

Denoiser = Callable[[Array, Array], Array]
"""`(x_t[B, L, V], t[B]) -> [B, L, V]`: logits of the clean tokens, as `objectives.simplex.gsfm_loss` trains them."""


def simplex_temperature(t: Array, *, tau_max: float | Array = 10.0, decay: float | Array = 3.0) -> Array:
    """`tau(t) = tau_max exp(-decay (1 - t))`, highest at noise.

    Reference: Gumbel-Softmax Flow Matching with Straight-Through Guidance, arXiv:2503.17361.
    """
    return tau_max * jnp.exp(-decay * (1 - jnp.asarray(t)))


def gumbel_interpolant(
    key: Array,
    data: Array,
    t: Array,
    *,
    tau_max: float | Array = 10.0,
    decay: float | Array = 3.0,
    noise_scale: float | Array = 0.5,
) -> Array:
    """A point of the path to train on, `x_t = softmax(x_0 / tau(t) + noise_scale g)` with `g` Gumbel noise.

    Noise of one scale at all times makes `simplex_velocity` with the exact law of the tokens that of the path's law.
    Then `x_t` is mostly noise at `t = 1` if `1 / tau_max` is small beside it, and near a vertex at `t = 0` if
    `1 / tau(0)` is large beside it. The published form, `softmax((x_0 + g / b) / tau)`, is `noise_scale = 1 / (b tau)`.

    Args:
      key: typed random key.
      data: one-hot tokens, `[B, L, V]`, or other points of the simplex; floating.
      t: times in `[0, 1]`, `[B]` or scalar.
      tau_max: temperature at `t = 1`.
      decay: of the logarithm of the temperature.
      noise_scale: of the Gumbel noise, a scalar or `[B]`; 0 is the path of the vertex itself.

    Returns:
      `x_t[B, L, V]`, of the type of the data.

    Raises:
      ValueError: data not floating and `[B, L, V]`, or another argument neither scalar nor `[B]`.

    Reference: Gumbel-Softmax Flow Matching with Straight-Through Guidance, arXiv:2503.17361.
    """
    _check(data, t, "data")
    check_per_example(data, noise_scale=noise_scale)
    noise = jax.random.gumbel(key, data.shape, at_least_float32(data).dtype)
    tau = expand_like(simplex_temperature(t, tau_max=tau_max, decay=decay), data)
    return jax.nn.softmax(data / tau + expand_like(noise_scale, data) * noise).astype(data.dtype)


def simplex_velocity(
    probabilities: Array, x: Array, t: Array, *, tau_max: float | Array = 10.0, decay: float | Array = 3.0
) -> Array:
    r"""Velocity towards a token of law `p`, `dx/dt = -(decay / tau(t)) (p * x - x <p, x>)`; its rows sum to 0.

    It is `d/dt softmax(e_k / tau(t) + c)` for any `c`, at its point `x`, averaged over `k ~ p`; it points away from
    data, as time does.

    Args:
      probabilities: `p[B, L, V]` of the clean tokens given `x_t`.
      x: `x_t[B, L, V]`.
      t: times, `[B]` or scalar.
      tau_max: as in `gumbel_interpolant`.
      decay: likewise.

    Returns:
      `[B, L, V]`.

    Raises:
      ValueError: arrays that are not floating, of one shape, `[B, L, V]`, or `t` neither scalar nor `[B]`.

    Reference: Gumbel-Softmax Flow Matching with Straight-Through Guidance, arXiv:2503.17361.
    """
    check_floating(probabilities=probabilities)
    check_same_shape(probabilities=probabilities, x=x)
    _check(x, t)
    mixed = probabilities * x
    rate = decay / expand_like(simplex_temperature(t, tau_max=tau_max, decay=decay), x)
    return -rate * (mixed - x * mixed.sum(-1, keepdims=True))


def simplex_euler(
    key: Array,
    denoiser: Denoiser,
    x: Array,
    times: Array,
    *,
    tau_max: float | Array = 10.0,
    decay: float | Array = 3.0,
    guide: Callable[[Array, Array, Array], Array] | None = None,
) -> Array:
    r"""Follows `simplex_velocity` from `times[0]` to `times[-1]` by Euler's method in the logits.

        x_s = softmax(log x_t + p (1 / tau(s) - 1 / tau(t)))

    It never leaves the simplex and is exact while `p` does not change; its error is of first order. If `x` has the law
    of the path at `times[0]` and the denoiser is exact, it has that of the path at `times[-1]` as steps become fine,
    for all positions together: each moves by its own law given all. A token drawn there from the denoiser's law is then
    data; several, drawn each by itself, are as far as the state leaves no doubt of them; the largest entries are only
    if noise is small there. A start of noise alone, `softmax(s g)`, lacks the `1 / tau_max` of signal that the path has
    at `t = 1`. With a guide there is no law that is known.

    Args:
      key: typed random key, for the guide.
      denoiser: of clean tokens; one evaluation a step.
      x: the state at `times[0]`, `[B, L, V]`.
      times: `[N + 1]`, strictly decreasing, in `[0, 1]`.
      tau_max: as in `gumbel_interpolant`.
      decay: likewise.
      guide: `(key, x_t, t[B]) -> [B, L, V]`, added to the velocity towards data, such as a multiple of `stg_guidance`;
        what it takes below 0 is cut, and rows are divided by their sums.

    Returns:
      The state at `times[-1]`, `[B, L, V]`, of the type of `x`.

    Raises:
      ValueError: as `integrate`; `x` is not `[B, L, V]`, or the denoiser returns another shape.

    Reference: Gumbel-Softmax Flow Matching with Straight-Through Guidance, arXiv:2503.17361.
    """
    x, times = check_inputs(x, times)
    _check(x, times[0])
    tau = simplex_temperature(times, tau_max=tau_max, decay=decay)

    def step(x: Array, given: tuple[Array, ...]) -> tuple[Array, None]:
        key, t, s, gain = given
        time = jnp.broadcast_to(t, x.shape[:1])
        logits = denoiser(x, time)
        check_same_shape(denoiser=logits, x=x)
        wide = at_least_float32(x)
        least = jnp.finfo(wide.dtype).tiny  # has a logarithm
        new = jax.nn.softmax(jnp.log(jnp.maximum(wide, least)) + gain * jax.nn.softmax(logits))
        if guide is not None:
            new = jnp.maximum(new + (t - s) * guide(key, x, time), least)
            new = new / new.sum(-1, keepdims=True)
        return new.astype(x.dtype), None

    keys = jax.random.split(key, len(times) - 1)
    return jax.lax.scan(step, x, (keys, times[:-1], times[1:], 1 / tau[1:] - 1 / tau[:-1]))[0]


def stg_guidance(
    key: Array, denoiser: Denoiser, score: Callable[[Array], Array], x: Array, t: Array, *, samples: int = 1
) -> Array:
    r"""Straight-through gradient of a score of the clean tokens, in the noisy state, along the simplex.

        G = mean_m grad_x score(softmax(logits(x)) + sg[y_m - softmax(logits(x))]),   y_m ~ softmax(logits(x)),

    less its mean over the vocabulary. For a score that is linear in each position's one-hot, as any function of tokens
    can be written, it is an unbiased estimate of the gradient of `E[score(y)]` under the denoiser's law; otherwise the
    score's gradient at the corners stands for its differences. It is an ascent direction, not the tilt's velocity.

    Args:
      key: typed random key.
      denoiser: differentiated once, whatever the number of samples.
      score: `one-hot tokens [B, L, V] -> [B]`, differentiable.
      x: `x_t[B, L, V]`.
      t: times, `[B]` or scalar.
      samples: draws of the tokens.

    Returns:
      `[B, L, V]`; rows sum to 0.

    Raises:
      ValueError: no samples, `x` not floating and `[B, L, V]`, `t` neither scalar nor `[B]`, or a score of another
        shape than `[B]`.

    Reference: Gumbel-Softmax Flow Matching with Straight-Through Guidance, arXiv:2503.17361.
    """
    _check(x, t)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    logits, pull = jax.vjp(lambda x: denoiser(x, jnp.broadcast_to(t, x.shape[:1])), x)

    def total(logits: Array, key: Array) -> Array:
        tokens = jax.random.categorical(key, logits)
        hard = jax.nn.one_hot(tokens, x.shape[-1], dtype=logits.dtype)
        return one_per_example(x, score=score(straight_through(hard, jax.nn.softmax(logits)))).sum()

    by_logits = jax.vmap(jax.grad(total), in_axes=(None, 0))(logits, jax.random.split(key, samples)).mean(0)
    (gradient,) = pull(by_logits)
    return gradient - gradient.mean(-1, keepdims=True)


def _check(x: Array, t: Array, name: str = "x") -> None:
    check_floating(**{name: x})
    if x.ndim != 3:
        raise ValueError(f"{name} must have shape [B, L, V], got {x.shape}")
    check_per_example(x, t=t)

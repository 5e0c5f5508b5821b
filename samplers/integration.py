"""The one loop that drives every stepper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.arrays import cast_like, check_floating, is_known
from esscher.core.contracts import Prediction, Predictor, Stepper

__all__ = ["carried", "check_inputs", "check_prediction", "check_times", "integrate"]


def integrate(
    key: Array, stepper: Stepper, predictor: Predictor, x: Array, times: Array, *, unroll: int | bool = 1
) -> Array:
    """Carries `x` from `times[0]` to `times[-1]` by one `lax.scan` over the steps.

    The scalars of a step are computed in the precision of `times`, the state and the history are kept in that of `x`.

    Args:
      key: typed random key; each step gets its own. A deterministic stepper ignores it.
      stepper: the solver, see `samplers.steppers`.
      predictor: `(x_t[B, ...], t[B]) -> Prediction`, evaluated once a step, plus what the stepper asks for.
      x: the state at `times[0]`, `[B, ...]`, of a floating type; the result has its type.
      times: `[N + 1]`, strictly decreasing, of a floating type, see `core.schedules` for grids.
      unroll: passed to `lax.scan`; `True` removes the loop, which on CPU convolutional predictors need.

    Returns:
      The state at `times[-1]`, `[B, ...]`.

    Raises:
      ValueError: `times` is not a vector of at least two, or (where its values are known) not strictly decreasing;
        `x` or `times` is not of a floating type; `predictor` does not return a `Prediction`.
    """
    return carried(key, stepper, predictor, x, times, unroll=unroll)[0]


def carried(
    key: Array, stepper: Stepper, predictor: Predictor, x: Array, times: Array, *, unroll: int | bool = 1
) -> tuple[Array, Any]:
    """`integrate`, which also returns what the stepper carries out of the last step; arguments and errors are its."""
    x, times = check_inputs(x, times)

    def body(carry, inputs):
        x, history = carry
        key, t, s = inputs
        prediction = check_prediction(predictor(x, jnp.broadcast_to(t, x.shape[:1])))
        new = stepper.step(key, x, prediction, t, s, history, predictor)
        return cast_like(new, carry), None

    keys = jax.random.split(key, times.shape[0] - 1)
    return jax.lax.scan(body, (x, stepper.init(x)), (keys, times[:-1], times[1:]), unroll=unroll)[0]


def check_inputs(x: Array, times: Array) -> tuple[Array, Array]:
    """The state and the grid as arrays; raises the errors of `integrate` about them."""
    x = jnp.asarray(x)
    check_floating(x=x)
    return x, check_times(times)


def check_prediction(prediction: Prediction) -> Prediction:
    """What a predictor returned; raises the error of `integrate` about it."""
    if not isinstance(prediction, Prediction):
        raise ValueError(f"predictor must return a Prediction(data, noise), got {type(prediction).__name__}")
    return prediction


def check_times(times: Array) -> Array:
    """The grid as an array; raises the errors of `integrate` about it."""
    times = jnp.asarray(times)
    check_floating(times=times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be a vector of at least two, got shape {times.shape}")
    if is_known(times) and not np.all(np.diff(np.asarray(times)) < 0):
        raise ValueError(f"times must be strictly decreasing, from noise to data, got {np.asarray(times)}")
    return times

"""The records and function types that the rooms exchange."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

__all__ = ["Prediction", "Predictor", "ReverseKernel", "Stepper"]


class Prediction(NamedTuple):
    """What a model says of a noisy `x_t = alpha x_0 + sigma eps`.

    A plain model's two fields satisfy that equation. Guidance may break the tie on purpose: CFG++ takes the data term
    from the guided model and the noise term from the unconditional one, so both are carried.
    """

    data: Array  # E[x_0 | x_t]  [B, ...]
    noise: Array  # E[eps | x_t]  [B, ...]


Predictor = Callable[[Array, Array], Prediction]
"""`(x_t[B, ...], t[B]) -> Prediction`."""


class Stepper(NamedTuple):
    """A solver of the reverse process, as a pair of pure functions."""

    init: Callable[[Array], Any]
    """`x[B, ...] -> carry`: the history of a multistep solver, `()` if it has none."""
    step: Callable[..., tuple[Array, Any]]
    """`(key, x, prediction, t, s, carry, predictor) -> (x_s, carry)`.

    `prediction` is the model's at `(x, t)`; the times `t > s` are scalars.
    """


class ReverseKernel(NamedTuple):
    """A stochastic reverse step that has a density: what particle methods, tree search and policy gradients need."""

    sample: Callable[..., Array]
    """`(key, x[B, ...], t, s) -> x_s[B, ...]`."""
    log_prob: Callable[..., Array]
    """`(x_s[B, ...], x[B, ...], t, s) -> [B]`, in nats."""

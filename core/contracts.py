"""The records and function types that the rooms exchange."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

__all__ = ["LanguageModel", "Prediction", "Predictor", "ReverseKernel", "Stepper", "Transform"]


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
    """`(key, x[B, ...], t, s) -> x_s[B, ...]`; the times `t > s` are scalars."""
    log_prob: Callable[..., Array]
    """`(x_s[B, ...], x[B, ...], t, s) -> [B]`, in nats."""


class LanguageModel(NamedTuple):
    """Next-token logits with a cache of what has been read, as closures over the parameters.

    Every leaf of a cache has the batch axis in front, so that rows can be repeated, gathered or resampled. Logits are
    those of the token that follows. Prompts are ragged on the left: `mask` is 0 before a row's first token.
    """

    init: Callable[[Array, Array], tuple[Array, Any]]
    """`(prompt[B, T0], mask[B, T0]) -> (logits[B, V], cache)`."""
    step: Callable[[Any, Array], tuple[Array, Any]]
    """`(cache, token[B]) -> (logits[B, V], cache)`."""
    extend: Callable[[Any, Array], tuple[Array, Any]] | None = None
    """`(cache, tokens[B, G]) -> (logits[B, G, V], cache)`: as `G` steps, in one pass; speculative sampling needs it."""
    rewind: Callable[[Any, Array], Any] | None = None
    """`(cache, n[B]) -> cache` without each row's last `n` tokens; speculative sampling needs it."""


class Transform(NamedTuple):
    """What turns a model's next-token logits into those that are sampled from; its carry follows the tokens chosen.

    A temperature has no carry; a repetition penalty carries what it has seen, a grammar its state, a contrast or a
    value function the cache of another model. Every leaf of a carry has the batch axis in front.
    """

    init: Callable[[Array, Array, int], Any]
    """`(prompt[B, T0], mask[B, T0], vocabulary) -> carry`."""
    apply: Callable[[Array, Any], Array]
    """`(logits[B, V], carry) -> logits[B, V]`; a forbidden token's is `-inf`, and at least one is left."""
    update: Callable[[Any, Array], Any]
    """`(carry, token[B]) -> carry`."""

r"""Anchored posterior sampling: masked diffusion whose logits climb a reward's gradient before tokens are drawn.

A reward of embeddings has a gradient where one of tokens has none. Each step takes the denoiser's logits at masked
positions a few steps uphill, draws tokens from them, and keeps those of which the changed logits are most certain, the
anchors. Nothing corrects for the change, so its law is not the tilt `p exp(r)`: it is that of the denoiser with
changed logits, which for a linear reward and plain gradient steps is known in closed form. For the tilt see
`steering.twisted` and `svdd`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import (
    at_least_float32,
    check_floating,
    check_known,
    check_per_example,
    expand_like,
    one_per_example,
    tempered,
)
from esscher.core.autodiff import straight_through
from esscher.samplers.diffusion.discrete import Confidence, Denoiser, Level, confidence_unmask

__all__ = ["Optimizer", "Quantize", "anchored", "inner_logit_guidance", "st_embed"]

Quantize = Literal["sample", "argmax", "nearest"]


class Optimizer(NamedTuple):
    """A pair of pure functions, those of any transformation of Optax, such as `optax.adam(1.0)`."""

    init: Callable[[Array], Any]
    """`params -> state`."""
    update: Callable[..., tuple[Array, Any]]
    """`(gradient, state, params) -> (what to add, state)`, downhill."""


def st_embed(
    key: Array, logits: Array, table: Array, temperature: float | Array = 1.0, *, mode: Quantize = "sample"
) -> Array:
    r"""Embeddings of tokens with the gradient of their expectation: `e + sg(e_hard - e)`, `e = softmax(logits/tau) E`.

    The value is that of single tokens, which is what a reward model knows, and the gradient goes to the logits by the
    soft branch only: for a linear reward `<c, e>` it is `(diag(p) - p p^T) E c / tau`, whatever token was taken.

    Args:
      key: typed random key, for "sample".
      logits: `[B, L, V]`; may be `-inf`.
      table: embeddings, `[V, D]`.
      temperature: `tau`, a scalar or `[B]`; at 0, the limit, the most likely token alone, without a gradient.
      mode: the hard one is that of a token drawn from `p`, of the most likely one, or the row nearest to `e`.

    Returns:
      `[B, L, D]`, float32 at least.

    Raises:
      ValueError: a table of other tokens, arrays that are not floating, an unknown mode, a temperature of the wrong
        shape or known to be below 0.

    Reference: Test-Time Anchoring for Discrete Diffusion Posterior Sampling, arXiv:2510.02291.
    """
    check_floating(logits=logits, table=table)
    if logits.ndim != 3 or table.ndim != 2 or len(table) != logits.shape[-1]:
        raise ValueError(f"logits must be [B, L, V] and table [V, D], got {logits.shape}, {table.shape}")
    if mode not in ("sample", "argmax", "nearest"):
        raise ValueError(f'mode must be "sample", "argmax" or "nearest", got {mode!r}')
    check_per_example(logits, temperature=temperature)
    check_known(lambda tau: tau >= 0, "at least 0", temperature=temperature)
    scaled = tempered(at_least_float32(logits), expand_like(temperature, logits))
    table = at_least_float32(table)
    soft = jax.nn.softmax(scaled) @ table
    if mode == "nearest":
        # Without |e|^2, which is the same for all rows.
        scaled = 2 * soft @ table.T - jnp.square(table).sum(-1)
    token = jax.random.categorical(key, scaled) if mode == "sample" else jnp.argmax(scaled, -1)
    return straight_through(table[token], soft)


def inner_logit_guidance(
    key: Array,
    logits: Array,
    is_mask: Array,
    objective: Callable[[Array, Array], Array],
    optimizer: Optimizer,
    n_steps: int,
) -> Array:
    r"""Takes the logits of masked positions `n_steps` up the objective's gradient: `phi <- optimizer(phi, -grad R)`.

    The optimiser starts anew at each call. Logits of `-inf` stay so under any optimiser that leaves alone what has no
    gradient.

    Args:
      key: typed random key.
      logits: `[B, L, V]`, the start.
      is_mask: which positions may change, booleans `[B, L]`.
      objective: `(key, logits[B, L, V]) -> [B]`, to be made large; by `st_embed` a reward of embeddings is one, and
        less a squared error of measurements another.
      optimizer: `optax.adam(1.0)` is the published choice.
      n_steps: 3 in the published code; 0 gives the logits back.

    Returns:
      `[B, L, V]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, an objective that is not `[B]`.

    Reference: Test-Time Anchoring for Discrete Diffusion Posterior Sampling, arXiv:2510.02291.
    """
    check_floating(logits=logits)
    if logits.ndim != 3 or is_mask.shape != logits.shape[:2]:
        raise ValueError(f"is_mask must have the leading axes of logits [B, L, V], got {is_mask.shape}, {logits.shape}")
    logits, free = at_least_float32(logits), is_mask[..., None]

    def loss(phi: Array, key: Array) -> Array:
        return -one_per_example(phi, objective=objective(key, phi)).sum()

    def step(carry: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], None]:
        phi, state = carry
        gradient = jnp.where(free, jax.grad(loss)(phi, key), 0)
        change, state = optimizer.update(gradient, state, phi)
        return (jnp.where(free, phi + change, phi).astype(phi.dtype), state), None

    return jax.lax.scan(step, (logits, optimizer.init(logits)), jax.random.split(key, n_steps))[0][0]


def anchored(
    key: Array,
    denoiser: Denoiser,
    reward: Callable[[Array], Array],
    table: Array,
    x: Array,
    times: Array,
    alpha: Level,
    mask_id: int | Array,
    optimizer: Optimizer,
    *,
    n_steps: int = 3,
    temperature: float | Array = 1.0,
    mode: Quantize = "sample",
    confidence: Confidence = "entropy",
) -> Array:
    r"""Anchored posterior sampling: `discrete.confidence_unmask`, guided by the gradient of a reward of embeddings.

    With no inner steps it is that sampler, and with ever smaller ones it tends to it.

    Args:
      key: typed random key.
      denoiser: of the model; one evaluation a step.
      reward: of embeddings, `[B, L, D] -> [B]`; divide it by `beta` before. Evaluated `n_steps` times a step.
      table: the embeddings that it knows, `[V, D]`, one for each logit.
      x: tokens, `[B, L]`, with masks where there is something to decide on; those of others are constants.
      times: decreasing, `[T + 1]`.
      alpha: the schedule.
      mask_id: the mask's token.
      optimizer: of the inner steps, `optax.adam(1.0)` in the paper.
      n_steps: inner steps, each with tokens of its own.
      temperature: of the tokens, inside and outside; a scalar or `[B]`. At 0 nothing guides, for want of a gradient.
      mode: see `st_embed`.
      confidence: see `confidence_unmask`; of the changed logits.

    Returns:
      `[B, L]`, without masks.

    Raises:
      ValueError: as `st_embed`, `inner_logit_guidance` and `confidence_unmask`.

    Reference: Test-Time Anchoring for Discrete Diffusion Posterior Sampling, arXiv:2510.02291.
    """

    def guide(key: Array, logits: Array, x: Array) -> Array:
        is_mask = x == mask_id
        held = at_least_float32(table)[jnp.where(is_mask, 0, x)]

        def objective(key: Array, phi: Array) -> Array:
            soft = st_embed(key, phi, table, temperature, mode=mode)
            return reward(jnp.where(is_mask[..., None], soft, held))

        return inner_logit_guidance(key, logits, is_mask, objective, optimizer, n_steps)

    options = {"confidence": confidence, "temperature": temperature, "guide": guide}
    return confidence_unmask(key, denoiser, x, times, alpha, mask_id, **options)

"""UniPC: predictor and corrector of any order from one evaluation a step."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from esscher.core.contracts import Stepper
from esscher.core.schedules import Schedule
from esscher.samplers.steppers.coefficients import History, first_order, implied_data, phis, step_coefficients

__all__ = ["unipc"]

Variant = Literal["bh1", "bh2"]


class _Carry(NamedTuple):
    history: History
    base: Array  # [B, ...] the first-order part of the step that led here, which the corrector completes anew


def unipc(schedule: Schedule, order: int = 2, *, variant: Variant = "bh2", corrector: bool = True) -> Stepper:
    r"""UniPC of order 1, 2 or 3, in data form; the corrector adds an order and costs no evaluation.

    With the latest data terms `m_0` (at `t`), `m_1`, `m_2` at the nodes `r_k = (lam_k - lam(t)) / h` the predictor is

        x_s = alpha_s D + sigma_s eps - alpha_s B sum_{0<k<order} rho_k (m_k - m_0) / r_k,

    where `B = -h` ("bh1") or `e^(-h) - 1` ("bh2"), and `rho` solves
    `sum_k r_k^(j-1) rho_k = j! (-h) phi_(j+1)(-h) / B`, `j = 1, 2, ...` (a single `rho` is 1/2). The evaluation at the
    predicted `x_s`, made anyway to begin the next step, then adds the node `r = 1` to the sum and so corrects `x_s`
    before that step is taken; the last state is not corrected. The first steps use the orders they have the history
    for; a step from `alpha = 0` or to `sigma = 0` is first order. Order 2 without the corrector and with "bh2" is
    `dpm_solver_pp_2m`. One evaluation a step; it may start at `alpha = 0`.

    Args:
      schedule: the noise schedule.
      order: of the predictor, 1 to 3; the corrector raises it by one. As steps get small the first ones, of lower
        order, leave 2 of the predictor's 3, and may leave 3 of the corrector's 4.
      variant: the function `B`; "bh1" is made for few unguided steps.
      corrector: False for the predictor alone, UniP.

    Raises:
      ValueError: `order` or `variant` is not one of those.

    Reference: UniPC, arXiv:2302.04867.
    """
    if not isinstance(order, (int, np.integer)) or order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")

    def correct(x, data, c, carry):
        """The state at `t` with the evaluation there taken into account: the previous step's sum with a node at 1."""
        (points, lams, count), base = carry
        valid = count > 0
        h = jnp.where(valid, c.lam - lams[0], 1.0)
        nodes = [jnp.ones_like(h), *((lam - lams[0]) / h for lam in lams[1:order])]
        changes = [point - points[0] for point in (data, *points[1:order])]
        corrected = base + c.alpha_t * _increment(nodes, changes, jnp.minimum(count, order), h, variant)
        return jnp.where(valid, corrected, x)

    def step(key, x, prediction, t, s, carry, predictor):
        c = step_coefficients(schedule, t, s)
        data = implied_data(x, prediction, c)
        base, (points, lams, count) = first_order(prediction, c), carry.history
        if corrector:  # in the predictor formula x enters as (sigma_s / sigma_t) x
            base += c.sigma_s / c.sigma_t * (correct(x, data, c, carry) - x)
        nodes = [(lam - c.lam) / c.finite_h for lam in lams[: order - 1]]
        changes = [point - prediction.data for point in points[: order - 1]]
        usable = jnp.where(c.regular, jnp.minimum(count, order - 1), 0)
        x_s = base + c.alpha_s * _increment(nodes, changes, usable, c.finite_h, variant)
        return x_s, _Carry(carry.history.push(data, c), base)

    size = order if corrector else order - 1
    return Stepper(lambda x: _Carry(History.empty(x, size), x), step)


def _increment(nodes: Sequence[Array], changes: Sequence[Array], count: Array, h: Array, variant: Variant) -> Array:
    """`-B sum_k rho_k changes_k / nodes_k` over the first `count` nodes, which may be none of them."""
    n = len(nodes)
    if n == 0:
        return jnp.zeros(())
    scale = h if variant == "bh1" else -jnp.expm1(-h)  # -B
    moments = [math.factorial(j) * value * h / scale for j, value in enumerate(phis(n + 1, -h)) if j > 0]
    # Nodes that do not count are moved to 2, 3, ..., apart from each other and from the others, which are at most 1.
    nodes = [jnp.where(k < count, node, k + 2.0) for k, node in enumerate(nodes)]
    by_count = [[0.5], *(_solve(nodes[:size], moments) for size in range(2, n + 1))]
    total = 0.0
    for k, (node, change) in enumerate(zip(nodes, changes, strict=True)):
        rho = sum(jnp.where(count == size, by_count[size - 1][k], 0.0) for size in range(k + 1, n + 1))
        total += scale * rho / node * change
    return total


def _solve(nodes: Sequence[Array], moments: Sequence[Array]) -> list[Array]:
    """`rho` with `sum_k nodes_k^(j-1) rho_k = moments_j`: what the moments make of Lagrange's polynomials."""
    rho = []
    for k, node in enumerate(nodes):
        polynomial = [1.0]  # coefficients, the constant one first
        for other in (*nodes[:k], *nodes[k + 1 :]):
            shifted = zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)
            polynomial = [(low - other * high) / (node - other) for low, high in shifted]
        rho.append(sum(c * moment for c, moment in zip(polynomial, moments, strict=False)))
    return rho

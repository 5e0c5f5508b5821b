r"""Diffusion tree sampling: roll-outs of a model remembered in a tree, which learns the soft value of its states.

A node is a state `x_t`, its children are draws from the model's kernel `p(x_s | x_t)`, the leaves are clean and worth
their reward. A node's value is the soft mean of its children's, `v = beta log mean_c exp(v_c / beta)`: a plain mean,
as they are draws from the kernel. So the value of the root tends to `beta log E[exp(r(x_0) / beta) | x_T]`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_known, check_per_example, one_per_example, warn_of_nan
from esscher.core.contracts import ReverseKernel
from esscher.core.tilt import soft_value
from esscher.samplers.diffusion.kernels import check_kernel
from esscher.samplers.integration import check_times

__all__ = ["Mode", "Tree", "grow_tree", "sample_tree"]

Mode = Literal["sample", "search"]


class Tree(NamedTuple):
    """A tree for each of `B` examples, in arrays of fixed size; node 0 is the root, slots from `size` on are empty."""

    x: Array  # [B, N, ...] states
    parent: Array  # [B, N] -1 for the root, -2 in empty slots
    value: Array  # [B, N] soft values, -inf where nothing is known
    visits: Array  # [B, N] roll-outs that went through
    size: Array  # [B] nodes in use
    nan: Array  # [B] roll-outs whose reward was NaN, which counts as -inf


def grow_tree(
    key: Array,
    kernel: ReverseKernel,
    reward: Callable[[Array], Array],
    x: Array,
    times: Array,
    beta: float | Array,
    *,
    rollouts: int,
    mode: Mode = "sample",
    c_uct: float | Array = 1.0,
    widening: float | Array = 1.0,
    exponent: float | Array = 0.5,
) -> Tree:
    r"""Grows a tree from each state by roll-outs of the kernel, each of which starts where the tree so far says.

    A roll-out goes down from the root. At a node with `n` visits (this one too) and fewer than `widening n^exponent`
    children, or none, it draws a new child; else it goes on to one there is, drawn by `exp(v_c / beta)` ("sample"), or
    the one of the largest `v_c + c_uct sqrt(log n / n_c)` ("search"). What is below a new child is new. At the end the
    values on its way are renewed, from the leaf up.

    As roll-outs grow (`exponent` in `(0, 1)`), every node's children become many and are visited again and again: in
    "sample" mode the root's value tends to `beta log E[exp(r / beta) | x_T]` and the law of `sample_tree` to the tilt
    `p(x_0 | x_T) exp(r / beta)`, with `p` the law that the kernel's own steps reach. Slowly so: a child whose first
    leaves were poor is seldom looked at again, so values are too low, the more the nearer `exponent` is to 1, as each
    child then has some `R^(1 - exponent)` visits. At `exponent = 1, widening = 1` all roll-outs are independent, the
    law is that of importance resampling, and `exp(v / beta)` of the root is unbiased; with `widening` near 0 there is
    one roll-out, and the law is the model's. In "search" mode values are the same soft means, but of a tree that grows
    where it is best: it has no law, it looks for the maximum.

    Args:
      key: typed random key.
      kernel: of the model; one call for all trees in each step in which any of them needs a new state.
      reward: of clean data, `[B, ...] -> [B]`; NaN counts as `-inf`, a leaf that is never chosen beside others.
        `Tree.nan` counts them, and outside of `jit` they are warned of.
      x: states at the first time, `[B, ...]`, of any type.
      times: decreasing, `[T + 1]`.
      beta: temperature, above 0, a scalar or `[B]`; `inf` leaves the model's law.
      rollouts: how many; a tree takes `1 + T rollouts` slots.
      mode: see above.
      c_uct: how much "search" explores, in the unit of the reward.
      widening: children per power of visits, above 0.
      exponent: of the visits, in `(0, 1]`.

    Returns:
      The trees; nothing in them is meant to be differentiated.

    Raises:
      ValueError: a kernel that is no `ReverseKernel`: a deterministic solver has no branches; no roll-outs, no states,
        an unknown mode, a grid or a temperature of the wrong shape, rewards that are not `[B]`; `beta`, `widening` or
        `exponent` that are known to be out of their range.

    Reference: Diffusion Tree Sampling, arXiv:2506.20701.
    """
    check_kernel(kernel=kernel)
    times = check_times(times)
    check_per_example(x, beta=beta)
    check_known(lambda value: value > 0, "above 0", beta=beta, widening=widening)
    check_known(lambda value: (value > 0) & (value <= 1), "in (0, 1]", exponent=exponent)
    _check_mode(mode)
    if rollouts < 1:
        raise ValueError(f"rollouts must be at least 1, got {rollouts}")
    if not len(x):
        raise ValueError(f"x must have at least one example, got shape {x.shape}")
    steps, beta = len(times) - 1, jnp.broadcast_to(at_least_float32(beta), x.shape[:1])

    def advance(carry: tuple[Tree, Array], given: tuple[Array, ...]) -> tuple[tuple[Tree, Array], Array]:
        (tree, node), (key, t, s) = carry, given
        draw_key, pick_key = jax.random.split(key)
        children = tree.parent == node[:, None]
        count, visits = children.sum(-1), 1 + _at(tree.visits, node)
        new = (count < widening * visits.astype(beta.dtype) ** exponent) | (count == 0)
        state = _at(tree.x, node)
        state = jax.lax.cond(new.any(), lambda: kernel.sample(draw_key, state, t, s).astype(x.dtype), lambda: state)
        bonus = c_uct * jnp.sqrt(jnp.log(visits)[:, None] / jnp.maximum(tree.visits, 1)) if mode == "search" else 0.0
        old = _choose(pick_key, tree.value + bonus, children, beta, mode)
        child = jnp.where(new, tree.size, old)
        keep = lambda now, then: jnp.where(new.reshape(-1, *[1] * (then.ndim - 1)), now, then)  # noqa: E731
        tree = tree._replace(
            x=_put(tree.x, child, keep(state, _at(tree.x, child))),
            parent=_put(tree.parent, child, keep(node, _at(tree.parent, child))),
            size=tree.size + new,
        )
        return (tree, child), node

    def roll_out(tree: Tree, key: Array) -> tuple[Tree, None]:
        keys, root = jax.random.split(key, steps), jnp.zeros(len(x), jnp.int32)
        (tree, leaf), path = jax.lax.scan(advance, (tree, root), (keys, times[:-1], times[1:]))
        value = at_least_float32(one_per_example(x, reward=reward(_at(tree.x, leaf))))
        nan = jnp.isnan(value)
        tree = tree._replace(nan=tree.nan + nan)
        return _backed_up(tree, leaf, jnp.where(nan, -jnp.inf, value), path, beta), None

    tree, _ = jax.lax.scan(roll_out, _seed(x, 1 + steps * rollouts), jax.random.split(key, rollouts))
    warn_of_nan(tree.nan, "rewards were NaN; such leaves are never chosen beside others", stacklevel=2)
    return tree


def sample_tree(key: Array, tree: Tree, beta: float | Array, *, mode: Mode = "sample") -> Array:
    """A leaf of each tree, reached from the root by `exp(v_c / beta)` at every node, or by the largest `v_c`.

    Several draws from one tree are not independent; their law is that of `grow_tree`.

    Args:
      key: typed random key.
      tree: of `grow_tree`.
      beta: temperature with which it was grown, a scalar or `[B]`.
      mode: "sample", or "search" for the largest value.

    Returns:
      Clean states, `[B, ...]`.

    Raises:
      ValueError: an unknown mode, or `beta` neither a scalar nor `[B]`, or known not to be above 0.

    Reference: Diffusion Tree Sampling, arXiv:2506.20701.
    """
    check_per_example(tree.x, beta=beta)
    check_known(lambda value: value > 0, "above 0", beta=beta)
    _check_mode(mode)
    batch = len(tree.x)
    beta = jnp.broadcast_to(at_least_float32(beta), (batch,))

    def below(carry: tuple[Array, Array]) -> Array:
        return jnp.any(tree.parent == carry[1][:, None])

    def down(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key, pick_key = jax.random.split(carry[0])
        children = tree.parent == carry[1][:, None]
        child = _choose(pick_key, tree.value, children, beta, mode)
        return key, jnp.where(children.any(-1), child, carry[1])

    return _at(tree.x, jax.lax.while_loop(below, down, (key, jnp.zeros(batch, jnp.int32)))[1])


def _seed(x: Array, capacity: int) -> Tree:
    batch, root = len(x), jnp.arange(capacity) == 0
    slots = jnp.zeros((batch, capacity, *x.shape[1:]), x.dtype).at[:, 0].set(x)
    parent = jnp.where(root, -1, -2) + jnp.zeros((batch, 1), jnp.int32)
    value, visits = jnp.full((batch, capacity), -jnp.inf), jnp.zeros((batch, capacity), jnp.int32)
    return Tree(slots, parent, value, visits, jnp.ones(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def _backed_up(tree: Tree, leaf: Array, value: Array, path: Array, beta: Array) -> Tree:
    """The trees with the values of new leaves, `[B]`, and of what is above them, `path[T, B]` from the root down."""

    def put(tree: Tree, node: Array, value: Array) -> Tree:
        visits = _put(tree.visits, node, _at(tree.visits, node) + 1)
        return tree._replace(value=_put(tree.value, node, value), visits=visits)

    def renew(tree: Tree, node: Array) -> tuple[Tree, None]:
        return put(tree, node, soft_value(tree.value, beta, where=tree.parent == node[:, None])), None

    tree = put(tree, leaf, value)
    return jax.lax.scan(renew, tree, path, reverse=True)[0]


def _choose(key: Array, values: Array, children: Array, beta: Array, mode: Mode) -> Array:
    """One child of each tree's node, `[B]`; where all are worth `-inf`, any of them."""
    lost = ~jnp.any(children & (values > -jnp.inf), -1)
    logits = values if mode == "search" else values / beta[:, None]
    logits = jnp.where(children, jnp.where(lost[:, None], 0.0, logits), -jnp.inf)
    pick = jnp.argmax(logits, -1) if mode == "search" else jax.random.categorical(key, logits)
    return pick.astype(jnp.int32)


def _at(leaf: Array, index: Array) -> Array:
    """`leaf[b, index[b]]`, `[B, N, ...] -> [B, ...]`."""
    return jax.vmap(lambda row, i: row[i])(leaf, index)


def _put(leaf: Array, index: Array, values: Array) -> Array:
    return jax.vmap(lambda row, i, value: row.at[i].set(value.astype(row.dtype)))(leaf, index, values)


def _check_mode(mode: Mode) -> None:
    if mode not in ("sample", "search"):
        raise ValueError(f'mode must be "sample" or "search", got {mode!r}')

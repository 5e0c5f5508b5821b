r"""Low-rank adapters, LoRA and DoRA, as pure functions of parameter trees.

    LoRA    W' = W + s A B                       s = alpha / r, or alpha / sqrt(r) with `rank_stabilized`
    DoRA    W' = m V / |V|,  V = W + s A B       |V| the norm of each output's weights

An adapter is a tree of its own: at the path of each weight that it changes it has `{"a", "b"}`, in DoRA `"magnitude"`
too. Train, checkpoint and shard that tree; the network's parameters are frozen because nobody differentiates by them:

    loss = lambda adapter: objective(decoder.hidden(adapters.merge(params, adapter, alpha=16), config, tokens))
    gradient = jax.grad(loss)(adapter)

`alpha` and `rank_stabilized` are not in the adapter: keep them in its checkpoint's `config`.

A weight may have several axes of inputs and of outputs, and any before them, such as layers, for each of which it has
factors of its own: `W[..., in, out]`, `a[..., in, r]`, `b[..., r, out]`, `magnitude[..., out]`, where `in` and `out`
stand for as many axes as `SPLITS` says. Only `init` needs that table; the factors' shapes say the same to the others.

What merging in the loss costs: a copy of each weight it changes (DoRA: two) and, on the way back, its gradient, all
as large as the weight, and half again the arithmetic of a network whose weights get no gradient. Saved is the
optimiser's state. `merge` takes one layer's slices as well; in the body of a scan, recomputed for the gradient, it
needs room for one layer. The low-rank path has no input of its own, so no dropout either.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from esscher.core.arrays import at_least_float32
from esscher.models.functional import Params

__all__ = ["SPLITS", "TARGETS", "axes", "count", "init", "merge", "unmerge"]

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
"""The matrices of the decoder's layers."""

SPLITS = dict.fromkeys(("query", "key", "value"), (1, 2)) | {"output": (2, 1)}
SPLITS |= dict.fromkeys(("gate", "up", "down", "unembedding"), (1, 1))
"""Number of input and of output axes of the decoder's weights, by name; these are a weight's last axes."""


def init(
    key: Array,
    params: Params,
    *,
    rank: int,
    targets: Iterable[str] = TARGETS,
    splits: Mapping[str, tuple[int, int]] = SPLITS,
    dora: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """`A ~ U(-in^-0.5, in^-0.5)`, `B = 0`, `m = |W|`: an adapter that changes nothing yet.

    LoRA's beginning is exact, DoRA's to rounding: `merge` may sum the norm in another order.

    Args:
      key: random key.
      params: of the network, or their shapes unless `dora`.
      rank: `r`, at least 1.
      targets: names of the weights to change, wherever in the tree they are.
      splits: number of input and of output axes of each, by name.
      dora: train magnitudes as well.
      dtype: of the adapter, whatever that of the network.

    Raises:
      ValueError: a rank below 1; a target that is not in `params` or not in `splits`, or has fewer axes than it says;
        shapes and `dora`.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if isinstance(targets, str):
        raise ValueError(f"targets must be several names, such as [{targets!r}], got the string {targets!r}")
    flat, targets = flatten_dict(params), set(targets)
    valid = {path[-1] for path in flat} & splits.keys()
    if unknown := sorted(targets - valid):
        raise ValueError(f"targets must be among {', '.join(sorted(valid))}, got {', '.join(unknown)}")
    chosen = [path for path in flat if path[-1] in targets]

    def draw(key: Array, name: str, weight: Array) -> Params:
        inputs, outputs = splits[name]
        if (lead := weight.ndim - inputs - outputs) < 0:
            raise ValueError(f"splits gives {name} {inputs} + {outputs} axes, but its shape is {weight.shape}")
        before, between, after = _parts(weight.shape, lead, inputs)
        bound = 1 / math.sqrt(math.prod(between))
        # In float32 at least: a bfloat16 uniform has 128 values.
        wide = jnp.promote_types(dtype, jnp.float32)
        a = jax.random.uniform(key, (*before, *between, rank), wide, -bound, bound).astype(dtype)
        leaf = {"a": a, "b": jnp.zeros((*before, rank, *after), dtype)}
        if dora:
            if isinstance(weight, jax.ShapeDtypeStruct):
                raise ValueError("params must be arrays for dora, which takes their norms, got shapes")
            leaf["magnitude"] = _norm(at_least_float32(weight), lead, inputs).reshape(before + after).astype(dtype)
        return leaf

    keys = jax.random.split(key, len(chosen))
    return unflatten_dict({path: draw(key, path[-1], flat[path]) for key, path in zip(keys, chosen, strict=True)})


def merge(params: Params, adapter: Params, *, alpha: float | Array, rank_stabilized: bool = False) -> Params:
    """`W + s A B`, or `m V / |V|` with `V = W + s A B`: the adapted network's parameters.

    The norm `|V|` receives no gradient. Sums are in float32 at least and the result in the type of `W`: of bfloat16
    weights, changes below their last digit are lost, though their gradient is not. Where `V` is 0 the result is.

    Args:
      params: of the network; leaves without an adapter are passed on as they are.
      adapter: of `init`, or one layer's slice of it for a slice of `params`.
      alpha: strength; `s = alpha / r`.
      rank_stabilized: `s = alpha / sqrt(r)` instead, which neither vanishes nor explodes with the rank.

    Raises:
      ValueError: an adapter of other parameters.

    Reference: LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685; DoRA: Weight-Decomposed Low-Rank
      Adaptation, arXiv:2402.09353; A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
    """

    def change(weight: Array, leaf: Params) -> Array:
        lead, inputs, delta = _delta(weight, leaf, alpha, rank_stabilized)
        v = weight + delta
        if "magnitude" in leaf:
            norm = jax.lax.stop_gradient(_norm(v, lead, inputs))
            v *= leaf["magnitude"].reshape(norm.shape) / jnp.where(norm > 0, norm, 1)
        return v.astype(weight.dtype)

    return _change(params, adapter, change)


def unmerge(params: Params, adapter: Params, *, alpha: float | Array, rank_stabilized: bool = False) -> Params:
    """`W' - s A B`: what `merge` was given, to rounding in the type of `W`.

    `params` is what `merge` returned, and the other arguments are those given to it.

    Raises:
      ValueError: an adapter of other parameters, or one with magnitudes: `W'` has the direction of `V` but no longer
        its norm, so keep the network's parameters instead.
    """

    def change(weight: Array, leaf: Params) -> Array:
        if "magnitude" in leaf:
            raise ValueError("adapter must be LoRA, got DoRA's magnitudes, which replaced a norm that is not kept")
        return (weight - _delta(weight, leaf, alpha, rank_stabilized)[2]).astype(weight.dtype)

    return _change(params, adapter, change)


def axes(params_axes: Params, adapter: Params) -> Params:
    """Logical names of an adapter's axes, for `core.meshes.parameter_specs`: those of `W`, and `None` for the rank.

    `params_axes` are the network's, such as `decoder.axes(config)`; `adapter` may be shapes.

    Raises:
      ValueError: an adapter of other parameters.
    """

    def name(names: tuple[str | None, ...], leaf: Params) -> dict[str, tuple[str | None, ...]]:
        before, between, after = _parts(names, *_split(len(names), leaf))
        out = {"a": (*before, *between, None), "b": (*before, None, *after), "magnitude": before + after}
        return {part: out[part] for part in leaf}

    return _change(params_axes, adapter, name, keep=False)


def count(adapter: Params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def _delta(weight: Array, leaf: Params, alpha: float | Array, rank_stabilized: bool) -> tuple[int, int, Array]:
    """Number of axes before the inputs, number of inputs, and `s A B`."""
    (lead, inputs), a, b = _split(weight.ndim, leaf), leaf["a"], leaf["b"]
    if a.shape[:-1] + b.shape[lead + 1 :] != weight.shape or b.shape[: lead + 1] != (*a.shape[:lead], a.shape[-1]):
        raise ValueError(f"adapter must fit params, got a{a.shape} and b{b.shape} for a weight of {weight.shape}")
    pairs, rank = (((a.ndim - 1,), (lead,)), (tuple(range(lead)),) * 2), a.shape[-1]
    # In full precision: it is a small product, and what is merged must be what was trained, whatever the device.
    product = jax.lax.dot_general(at_least_float32(a), at_least_float32(b), pairs, precision=jax.lax.Precision.HIGHEST)
    return lead, inputs, jnp.asarray(alpha / (math.sqrt(rank) if rank_stabilized else rank), product.dtype) * product


def _split(ndim: int, leaf: Params) -> tuple[int, int]:
    lead = leaf["a"].ndim + leaf["b"].ndim - 2 - ndim
    return lead, leaf["a"].ndim - 1 - lead


def _norm(weight: Array, lead: int, inputs: int) -> Array:
    return jnp.sqrt(jnp.square(weight).sum(tuple(range(lead, lead + inputs)), keepdims=True))


def _parts(axes: tuple, lead: int, inputs: int) -> tuple[tuple, tuple, tuple]:
    return axes[:lead], axes[lead : lead + inputs], axes[lead + inputs :]


def _change(tree: Params, adapter: Params, function: Callable[[Any, Params], Any], *, keep: bool = True) -> Params:
    """The tree with `function(leaf, its adapter)` at the adapted leaves and, with `keep`, the others as they are."""
    flat = flatten_dict(tree, keep_empty_nodes=True)
    known = {path for path, leaf in flat.items() if leaf is not empty_node}
    leaves = flatten_dict(adapter, is_leaf=lambda path, _: path in known)
    if unknown := ["/".join(path[:-1]) for path in leaves if path not in known]:
        raise ValueError(f"adapter must fit params, which have no {unknown[0]}")
    changed = {path: function(flat[path], leaf) for path, leaf in leaves.items()}
    return unflatten_dict(flat | changed if keep else changed)

r"""Modules as pure functions of a parameter pytree, and logical names for the axes of every parameter.

Every parameter of our networks names its axes, one name (or `None`) per dimension, from `AXES`:

    embed          width of the residual stream, or of the conditioning vector
    mlp            hidden units of a feed-forward layer
    heads, kv      attention heads, and the width of one head
    classes        rows of a table of classes (the last one is the null class)
    vocab          rows of a table of tokens
    patch          the pixels and channels of one image patch, or the coordinates of one point
    frequencies    sinusoids that encode the noise level
    modulation     shifts, scales and gates, one per unit of what they act on
    channels_in    what a convolution or a normalisation reads
    channels_out   what a convolution writes, and its bias
    layers         equal layers whose parameters are stacked, see `stack`

`None` is an axis that is never split: a kernel's window, the three of query, key and value. `core.meshes` maps names to
axes of a device mesh; a name without a rule stays whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

__all__ = [
    "AXES",
    "Initializer",
    "Params",
    "functional",
    "initializer",
    "logical_axes",
    "parameter",
    "stack",
    "unstack",
]

AXES = (
    "embed",
    "mlp",
    "heads",
    "kv",
    "classes",
    "vocab",
    "patch",
    "frequencies",
    "modulation",
    "channels_in",
    "channels_out",
    "layers",
)

# Not Flax's `out_sharding`, which shards the array at once and asks for a mesh.
_METADATA = "axis_names"

Params = dict[str, Any]
"""Nested dictionaries with string keys and arrays at the leaves."""


class Initializer(NamedTuple):
    """A network as pure functions, before any of its parameters exist."""

    init: Callable[[Array], Params]  # key -> params
    apply: Callable[..., Any]  # (params, *args, **kwargs) -> what the module returns
    axes: dict[str, Any]  # see `logical_axes`


def parameter(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that knows the logical names of its axes.

    Raises:
      ValueError: not one name per dimension.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"axes must name each of the {value.ndim} dimensions of {value.shape}, got {axes}")
    return nnx.Param(value, **{_METADATA: axes})


def functional(module: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """Splits a module into a pure `apply(params, *args, **kwargs)` and its parameters.

    `apply` may be transformed at will (jit, vmap over stacked parameters, grad); it rebuilds the module while tracing,
    which costs nothing at run time. The module itself is left as it was. A module made by `nnx.eval_shape` gives shapes
    in place of arrays.

    Raises:
      ValueError: the module holds state besides its parameters (batch statistics, the random streams of dropout).
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if held := [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(nnx.to_pure_dict(rest))]:
        raise ValueError(f"module must hold parameters only, got other state at {', '.join(held)}")

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, _list_keys(params))(*args, **kwargs)

    return apply, _string_keys(nnx.to_pure_dict(state))


def initializer(make_module: Callable[..., nnx.Module]) -> Initializer:
    """Makes `init(key) -> params`, `apply` and the axis names of a network without making an array.

    `init` may be vmapped over keys, compiled with output shardings, or given to `jax.eval_shape`.

    >>> import functools
    >>> from esscher.models.mlp import MLP
    >>> init, apply, axes = initializer(functools.partial(MLP, dimension=2, width=16))
    >>> params = jax.vmap(init)(jax.random.split(jax.random.key(0), 3))
    >>> params["out"]["kernel"].shape, axes["out"]["kernel"]
    ((3, 16, 2), ('embed', 'patch'))

    Args:
      make_module: `(rngs=nnx.Rngs) -> module`, for instance a class with all but `rngs` bound.
    """
    module = nnx.eval_shape(lambda: make_module(rngs=nnx.Rngs(0)))

    def init(key: Array) -> Params:
        return functional(make_module(rngs=nnx.Rngs(key)))[1]

    return Initializer(init, functional(module)[0], logical_axes(module))


def logical_axes(module: nnx.Module) -> dict[str, Any]:
    """The names of every parameter's axes: the tree of `functional`'s parameters with a tuple of names at each leaf.

    Parameters that were not made by `parameter` have `None` for each dimension.
    """
    names = jax.tree.map(
        lambda leaf: leaf.get_metadata().get(_METADATA, (None,) * leaf.get_value().ndim),
        nnx.state(module, nnx.Param),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return _string_keys(nnx.to_pure_dict(names))


def stack(make_module: Callable[..., nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """Draws `n` modules as one whose parameters have a leading axis `layers`; run them one by one with `unstack`.

    However many layers, a network then has few parameters, and drawing them compiles in the time of one layer.
    """
    graphs = []

    def draw(key: Array) -> Any:
        graph, state = nnx.split(make_module(rngs=nnx.Rngs(key)))
        graphs.append(graph)
        return state

    state = jax.lax.map(draw, jax.random.split(rngs.params(), n))
    module = nnx.merge(graphs[0], state)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            names = node.get_metadata().get(_METADATA, (None,) * (node.get_value().ndim - 1))
            node.set_metadata(**{_METADATA: ("layers", *names)})
    return module


def unstack(module: nnx.Module) -> list[nnx.Module]:
    """The modules that `stack` drew, in order."""
    graph, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
    return [nnx.merge(graph, structure.unflatten(layer)) for layer in layers]


def _string_keys(tree: Any) -> Any:
    # Flax numbers the items of a list; checkpoints and weight files want names.
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _list_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _list_keys(value) for key, value in tree.items()}

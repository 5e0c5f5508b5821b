"""Device meshes and shardings: one program, from one CPU to a pod."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esscher.core.errors import UsageError

__all__ = [
    "AXES",
    "RULES",
    "from_first",
    "gather",
    "like_parameters",
    "make",
    "parameter_specs",
    "parse",
    "place",
    "row_shards",
    "shardings",
    "topology",
]

AXES = ("sweep", "data", "fsdp", "tensor")
"""Mesh axes: members of a sweep; examples; parameters split for memory; parameters split for compute."""

BATCH = PartitionSpec(("data", "fsdp"))
"""How a batch is laid out: fsdp groups hold different examples too."""

RULES = {
    "embed": "fsdp",
    "channels_in": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "modulation": "tensor",
    "channels_out": "tensor",
}
"""Which mesh axis splits a parameter axis of a given logical name; the others are whole on every device."""


def parse(text: str) -> dict[str, int]:
    """Reads `"data=4,tensor=2"` into the arguments of `make`.

    >>> parse("data=4,tensor=2")
    {'data': 4, 'tensor': 2}

    Raises:
      UsageError: an unknown axis, one given twice, or a size that is neither a positive integer nor -1.
    """
    sizes = {}
    for part in filter(None, text.replace(" ", ",").split(",")):
        name, _, size = part.partition("=")
        number = re.fullmatch(r"-1|[1-9][0-9]*", size)
        if name not in AXES or name in sizes or not number:
            raise UsageError(f"--mesh {part}: write axis=size, each axis of {', '.join(AXES)} once, size >= 1 or -1")
        sizes[name] = int(size)
    return sizes


def make(
    data: int = -1, fsdp: int = 1, tensor: int = 1, sweep: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `AXES`; one size may be -1 and takes the devices that are left.

    Args:
      data: devices over which examples are split.
      fsdp: devices over which parameters and examples are split.
      tensor: devices over which layers are split.
      sweep: devices over which the members of a sweep are split.
      devices: which ones; all there are by default. Sizes without a -1 may use fewer than given.

    Raises:
      UsageError: the sizes do not fit the number of devices; with several processes they must use all of them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"sweep": sweep, "data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ",".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise UsageError(f"mesh {asked}: at most one axis may be -1")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    used = math.prod(sizes.values())
    if used == 0 or used > len(devices) or (used != len(devices) and (open_axes or jax.process_count() > 1)):
        raise UsageError(
            f"mesh {asked} does not fit {len(devices)} device(s): their number must be the product of sizes"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:used])


def topology(name: str) -> Sequence[jax.Device]:
    """Devices of a TPU slice such as `"v5e:2x4"` to compile for, on a machine without any; needs `libtpu`.

    Raises:
      UsageError: `libtpu` is missing or does not know the slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a metadata server that only TPU hosts have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a lock guards chips; compiling needs none
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot compile for {name!r}: {reason}; pip install 'esscher[tpu]' on Linux") from error


def parameter_specs(axes: Any, shapes: Any, mesh: Mesh, *, rules: dict[str, str] = RULES) -> Any:
    """Partition specs of parameters from the logical names of their axes.

    An axis is split by its rule unless the mesh axis has one device, is taken by an earlier axis of the same parameter,
    or does not divide the dimension.

    Args:
      axes: a pytree with a tuple of names (or `None`) for each parameter, one per dimension.
      shapes: a pytree of the same structure with arrays or `jax.ShapeDtypeStruct`.
      mesh: the mesh.
      rules: logical name to mesh axis.

    Returns:
      A pytree of `PartitionSpec`.
    """

    def spec(names: tuple, leaf: Any) -> PartitionSpec:
        taken: list[str | None] = []
        for name, size in zip(names, leaf.shape, strict=True):
            axis = rules.get(name)
            fits = axis is not None and axis not in taken and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
            taken.append(axis if fits else None)
        return PartitionSpec(*taken)

    return jax.tree.map(spec, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def like_parameters(tree: Any, parameters: Any, specs: Any) -> Any:
    """Specs for a tree that holds copies of the parameters, such as an optimiser's state or a moving average.

    A leaf whose path ends in a parameter's path, and which has its shape, gets that parameter's spec; any other leaf is
    whole on every device.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`.
      parameters: the parameters' shapes, likewise.
      specs: their specs, see `parameter_specs`.

    Returns:
      A pytree of `PartitionSpec` with the structure of `tree`.
    """
    known = {
        path: (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree.leaves_with_path(parameters), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True
        )
    }

    def find(path: tuple, leaf: Any) -> PartitionSpec:
        for start in range(len(path) + 1):
            shape, spec = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return spec
        return PartitionSpec()

    return jax.tree.map_with_path(find, tree)


def shardings(mesh: Mesh, specs: Any, *, swept: bool = False) -> Any:
    """Turns a pytree of specs into shardings on `mesh`; with `swept`, each gets a leading `sweep` axis."""
    lead = ("sweep",) if swept else ()
    return jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec(*lead, *spec)), specs, is_leaf=_is_spec)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch onto the mesh, one global array per leaf, split along the batch axis.

    Every process gives the whole batch and keeps the rows that its devices need: which ones depends on the mesh, since
    devices along `tensor` and `sweep` see the same rows.
    """
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda rows: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__), batch)


def gather(tree: Any) -> Any:
    """The arrays as NumPy's, whole, on every process; those that were split are collected from all hosts."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def from_first(array: Any) -> Any:
    """What process 0 gave, on every process; the others give an array of the same shape and type."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return jax.device_get(multihost_utils.broadcast_one_to_all(array))


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)

r"""Decoders to and from Hugging Face checkpoints: `config.json` and safetensors, never pickle.

On disk every layer has its own tensors and matrices are `[out, in]`; ours are stacked and `[in, out]`, see
`models.decoder`. The table of names below serves both ways.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from esscher.core import meshes
from esscher.core.errors import UsageError
from esscher.models import decoder, hf_files
from esscher.models.decoder import Config
from esscher.models.functional import Params
from esscher.models.hf_config import config_from_json, config_to_json
from esscher.models.hf_files import INDEX, WEIGHTS, Source

__all__ = ["config_from_json", "config_to_json", "load", "load_tensor", "save"]

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_OTHER_PARTS = re.compile(r"(vision_tower|vision_model|multi_modal_projector|score)\.|.*\binv_freq$")


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    path_or_repo: str | pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: dict[str, str] = meshes.RULES,
    revision: str | None = None,
) -> tuple[Config, Params]:
    """Configuration and parameters of a checkpoint in a folder or on the Hugging Face hub.

    Every device reads its own part of the files, in the final layout and type: beyond the result, the host's memory
    holds no more than one stacked parameter and one tensor of a layer. (Measured on a CPU device with 1,053 MiB of
    float32, 256 MiB in the largest parameter: 257 MiB above the result at the peak; as bfloat16, 144 MiB. Pages of the
    files themselves, which the system drops at need, are not counted.) Names, shapes and types of all tensors are
    checked before any is read.

    A classifier's checkpoint has no unembedding; it comes as `tied`, and `load_tensor` gives its `score.weight`.

    Args:
      path_or_repo: a folder with `config.json` and `model.safetensors`, or with the index and files of a checkpoint in
        several; or a name such as `Qwen/Qwen3-0.6B`, which is downloaded to the hub's own cache.
      dtype: of the parameters, one of float64, float32, float16 and bfloat16; each as on disk if absent.
      mesh: over which they are split; all on the first device if absent.
      rules: which mesh axis splits which axis, see `meshes.parameter_specs`.
      revision: of the hub's repository.

    Returns:
      `(config, params)`, see `models.decoder`.

    Raises:
      UsageError: no such folder or repository; an architecture that is not supported; weights that are missing, left
        over, ambiguous, of another shape, quantised, pickled or damaged; another `dtype`.
    """
    if dtype is not None and not _is_plain(dtype):
        raise UsageError(f"dtype must be one of {', '.join(_TYPES.values())}, got {dtype!r}")
    folder = hf_files.find_folder(path_or_repo, revision)
    try:
        config = config_from_json(hf_files.read_json(folder / "config.json"))
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None
    with hf_files.open_tensors(folder) as (tensors, names):
        if "score.weight" in tensors and "lm_head.weight" not in tensors:
            config = dataclasses.replace(config, tied=True)
        layout = hf_files.sources(config)
        _check(folder, config, layout, tensors, names)
        read = functools.partial(_read, tensors=tensors, dtype=dtype)
        return config, jax.tree.map(read, layout, _shardings(config, mesh, rules), is_leaf=_is_source)


def load_tensor(path_or_repo: str | pathlib.Path, name: str, *, revision: str | None = None) -> np.ndarray:
    """One tensor of a checkpoint as it is on disk, such as `score.weight[labels, width]`, a classifier's head.

    Args:
      path_or_repo: see `load`.
      name: of the tensor; a leading `model.` makes no difference.
      revision: see `load`.

    Raises:
      UsageError: as `load`, or if there is no such tensor.
    """
    folder = hf_files.find_folder(path_or_repo, revision)
    with hf_files.open_tensors(folder) as (tensors, names):
        if hf_files.short_name(name) not in tensors:
            raise UsageError(f"{folder} has no tensor {name}; it has {', '.join(sorted(names.values())[:5])}, ...")
        return tensors[hf_files.short_name(name)][...]


def _shardings(config: Config, mesh: jax.sharding.Mesh | None, rules: dict[str, str]) -> Params:
    shapes = decoder.shapes(config)
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    return meshes.shardings(mesh, meshes.parameter_specs(decoder.axes(config), shapes, mesh, rules=rules))


def _read(source: Source, sharding: Sharding, *, tensors: Mapping[str, Any], dtype: DTypeLike | None) -> jax.Array:
    """One parameter, each device's part from its part of the files."""
    slices = [tensors[name] for name in source.names]
    if dtype is None:
        dtype = functools.reduce(jnp.promote_types, (_TYPES[each.get_dtype()] for each in slices))
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    shape = (len(slices), *source.shape) if source.stacked else source.shape
    seen: dict[tuple, np.ndarray] = {}  # replicas share what was read

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        if bounds not in seen:
            seen[bounds] = np.empty([stop - start for start, stop in bounds], dtype)
            layers = slices[slice(*bounds[0])] if source.stacked else slices
            within = bounds[1:] if source.stacked else bounds
            for i, each in enumerate(layers):
                seen[bounds][i if source.stacked else ...] = _piece(each, source, within)
        return seen[bounds]

    # Waiting keeps the host from reading ahead of transfers to the devices, which would hold all of it in memory.
    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype).block_until_ready()


def _piece(tensor: Any, source: Source, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """`ours[bounds]` of one tensor on disk, reading little more than that."""
    right = source.pattern.split(" -> ")[1].split()
    wanted = dict(zip(right, bounds, strict=True))
    rows = []
    for first, *rest in source.groups:
        stride = math.prod(source.sizes[axis] for axis in rest)
        rows.append(slice(wanted[first][0] * stride, wanted[first][1] * stride))
    ours = einops.rearrange(tensor[tuple(rows)], source.pattern, **source.inner)
    return ours[tuple(slice(*wanted[axis]) if axis in source.inner else slice(None) for axis in right)]


def _is_plain(dtype: DTypeLike) -> bool:
    try:
        return jnp.dtype(dtype).name in _TYPES.values()
    except TypeError:  # it is no type at all
        return False


def _check(
    folder: pathlib.Path, config: Config, layout: Params, tensors: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Refuses tensors that are missing, left over, misshapen or of a type that is no plain float."""
    leaves = jax.tree.leaves(layout, is_leaf=_is_source)
    wanted = {name: source.disk_shape for source in leaves for name in source.names}
    for name, shape in wanted.items():
        if name not in tensors:
            reason = "is its config.json of another model?"
            if name == "lm_head.weight":
                reason = (
                    "save the model with its head, or set tie_word_embeddings in config.json if the embedding is it"
                )
            raise UsageError(f"{folder} has no tensor {hf_files.full_name(name)}; {reason}")
        found, where = tensors[name], f"{folder}: {names[name]}"
        if tuple(found.get_shape()) != shape:
            raise UsageError(f"{where} has shape {found.get_shape()}, config.json makes it {[*shape]}")
        if found.get_dtype() not in _TYPES:
            kinds = ", ".join(_TYPES)
            raise UsageError(f"{where} is {found.get_dtype()}, must be of {kinds}; is it quantised?")
    extra = sorted(name for name in tensors.keys() - wanted.keys() if not _OTHER_PARTS.match(name))
    if config.tied and "lm_head.weight" in extra:  # a copy of the embedding
        extra.remove("lm_head.weight")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UsageError(f"{folder} has tensors that the decoder does not know: {names[extra[0]]}{more}")


# --- saving -----------------------------------------------------------------------------------------------------------


def save(
    folder: str | pathlib.Path,
    config: Config,
    params: Params,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint that `load` and transformers' `AutoModelForCausalLM.from_pretrained` read.

    Weights that the folder had are replaced once all new ones are written; its other files, such as a tokenizer's,
    stay. The host's memory holds the tensors of one file at a time. With many hosts all make the call and the first one
    writes.

    Args:
      folder: made if need be.
      config: which decoder.
      params: see `models.decoder`.
      extra: further entries of `config.json`, such as `eos_token_id`.
      max_shard_bytes: of one file; past it there are several and an index.

    Raises:
      ValueError: parameters of another structure or shape than the configuration's, or of a type that `load` refuses.
      UsageError: no family of models has the configuration, or the files cannot be written.
    """
    folder, layout = pathlib.Path(folder), hf_files.sources(config)
    _check_params(config, params)
    try:
        import safetensors
    except ImportError:
        raise UsageError("checkpoints need safetensors: pip install 'esscher[hf]'") from None
    kind = params["embedding"].dtype.name
    content = config_to_json(config) | {"torch_dtype": kind, "dtype": kind} | dict(extra or {})
    entries = [
        (name, source, leaf, i if source.stacked else ...)
        for source, leaf in zip(jax.tree.leaves(layout, is_leaf=_is_source), jax.tree.leaves(params), strict=True)
        for i, name in enumerate(source.names)
    ]
    files: list[list[tuple]] = [[]]
    used = 0
    for entry in entries:
        size = math.prod(entry[1].shape) * entry[2].dtype.itemsize
        if files[-1] and used + size > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(entry)
        used += size
    try:
        _write(folder, content, files)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(folder / ".new", ignore_errors=True)
        raise UsageError(f"cannot save the checkpoint in {folder}: {error}; what was there is as before") from error


def _check_params(config: Config, params: Params) -> None:
    """Refuses another structure, shape or type than a checkpoint's."""
    found, shapes = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, decoder.shapes(config))
    )
    for path in sorted(found.keys() | shapes.keys()):
        got, wanted = (tree[path].shape if path in tree else None for tree in (found, shapes))
        if got != wanted:
            wanted, got = ("absent" if wanted is None else wanted), ("nothing" if got is None else got)
            raise ValueError(f"params{path} must be {wanted}, got {got}")
        if not _is_plain(found[path].dtype):
            raise ValueError(f"params{path} must be of {', '.join(_TYPES.values())}, got {found[path].dtype}")


def _write(folder: pathlib.Path, content: dict[str, Any], files: list[list[tuple]]) -> None:
    from safetensors.numpy import save_file

    new, first = folder / ".new", jax.process_index() == 0
    if first:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for i, entries in enumerate(files):
        file = WEIGHTS if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {hf_files.full_name(name): _to_disk(leaf[index], source) for name, source, leaf, index in entries}
        weight_map |= dict.fromkeys(tensors, file)
        if first:
            save_file(tensors, new / file, metadata={"format": "pt"})
        del tensors  # before the next file's are fetched
    if not first:
        return
    if len(files) > 1:
        total = sum(math.prod(s.shape) * leaf.dtype.itemsize for entries in files for _, s, leaf, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (new / INDEX).write_text(json.dumps(index, indent=2))
    (new / "config.json").write_text(json.dumps(content, indent=2))
    for old in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        old.unlink()
    for path in new.iterdir():
        path.replace(folder / path.name)
    new.rmdir()


def _to_disk(leaf: Any, source: Source) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    left, right = source.pattern.split(" -> ")
    return np.ascontiguousarray(einops.rearrange(np.asarray(leaf), f"{right} -> {left}"))


def _is_source(node: Any) -> bool:
    return isinstance(node, Source)

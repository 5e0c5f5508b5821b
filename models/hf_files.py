r"""What Hugging Face checkpoints have on disk: where they are, the tensors' names, and how those become ours."""

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from esscher.core.errors import UsageError
from esscher.models import decoder
from esscher.models.decoder import Config
from esscher.models.functional import Params

__all__ = [
    "INDEX",
    "WEIGHTS",
    "Source",
    "find_folder",
    "full_name",
    "open_tensors",
    "read_json",
    "short_name",
    "sources",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Ours -> name on disk, and how to get ours from it, in einops' words.
_NAMES = {
    "embedding": ("embed_tokens.weight", "v e -> v e"),
    "final_norm": ("norm.weight", "e -> e"),
    "unembedding": ("lm_head.weight", "v e -> e v"),
}
_LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", "e -> e"),
    "query": ("self_attn.q_proj.weight", "(h d) e -> e h d"),
    "key": ("self_attn.k_proj.weight", "(h d) e -> e h d"),
    "value": ("self_attn.v_proj.weight", "(h d) e -> e h d"),
    "query_bias": ("self_attn.q_proj.bias", "(h d) -> h d"),
    "key_bias": ("self_attn.k_proj.bias", "(h d) -> h d"),
    "value_bias": ("self_attn.v_proj.bias", "(h d) -> h d"),
    "query_norm": ("self_attn.q_norm.weight", "d -> d"),
    "key_norm": ("self_attn.k_norm.weight", "d -> d"),
    "output": ("self_attn.o_proj.weight", "e (h d) -> h d e"),
    "attention_post_norm": ("post_attention_layernorm.weight", "e -> e"),
    "mlp_norm": ("post_attention_layernorm.weight", "e -> e"),  # the name says before what it is, or after what
    "mlp_post_norm": ("post_feedforward_layernorm.weight", "e -> e"),
    "gate": ("mlp.gate_proj.weight", "f e -> e f"),
    "up": ("mlp.up_proj.weight", "f e -> e f"),
    "down": ("mlp.down_proj.weight", "e f -> f e"),
}
_SANDWICH_NAMES = {"mlp_norm": ("pre_feedforward_layernorm.weight", "e -> e")}


class Source(NamedTuple):
    """Where a parameter is on disk."""

    names: tuple[str, ...]  # one for each layer if stacked, without the prefix "model."
    pattern: str  # from one of them to ours
    shape: tuple[int, ...]  # ours, of one layer
    stacked: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Of the pattern's axes."""
        return dict(zip(self.pattern.split(" -> ")[1].split(), self.shape, strict=True))

    @property
    def groups(self) -> list[list[str]]:
        """The pattern's axes that each axis on disk consists of."""
        found = re.findall(r"\(([^)]*)\)|(\w+)", self.pattern.split(" -> ")[0])
        return [(several or one).split() for several, one in found]

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """Of each tensor on disk."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    @property
    def inner(self) -> dict[str, int]:
        """Axes that are not the first of their group; they are read whole."""
        return {axis: self.sizes[axis] for group in self.groups for axis in group[1:]}


def sources(config: Config) -> Params:
    """A `Source` for every parameter."""
    layer_names = _LAYER_NAMES | (_SANDWICH_NAMES if config.sandwich else {})

    def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> Source:
        name = path[-1].key
        if len(path) == 1:
            on_disk, pattern = _NAMES[name]
            return Source((on_disk,), pattern, leaf.shape, False)
        on_disk, pattern = layer_names[name]
        names = tuple(f"layers.{i}.{on_disk}" for i in range(config.depth))
        return Source(names, pattern, leaf.shape[1:], True)

    return jax.tree.map_with_path(find, decoder.shapes(config))


# --- files ------------------------------------------------------------------------------------------------------------


def find_folder(path_or_repo: str | pathlib.Path, revision: str | None) -> pathlib.Path:
    """The folder itself, or that of the hub's cache, downloaded if need be.

    Raises:
      UsageError: neither is there.
    """
    path = pathlib.Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file; give the folder of a checkpoint, with config.json and {WEIGHTS}")
    name = str(path_or_repo)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UsageError(f"no folder {path}; give the folder of a checkpoint, or a name on the hub such as org/model")
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(f"no folder {path}, and for the hub's models: pip install 'esscher[hf]'") from None
    wanted = ["*config.json", INDEX, "model*.safetensors", "tokenizer.json"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of its own, of the network, of the file system
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        advice = "check the name and the network, or download it elsewhere and give its folder"
        raise UsageError(f"no folder {path}, and the hub did not give it: {reason}; {advice}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
      UsageError: it is not there or something else; the message does not name the file.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"no such file; the folder of a checkpoint has config.json and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise UsageError("holds no object; get the file again")
    return content


def short_name(name: str) -> str:
    """Without prefixes, which differ between releases, between a model and its part, and with images."""
    return name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Slices of all tensors in a folder, and their names on disk, both by their short names.

    Nothing is read yet but the files' headers.

    Raises:
      UsageError: there are no weights as safetensors, files are missing or damaged, or two tensors have one short name.
    """
    try:
        import safetensors
    except ImportError:
        raise UsageError("checkpoints need safetensors: pip install 'esscher[hf]'") from None
    listed: dict[str, str] = {}
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        try:
            listed = {name: str(file) for name, file in read_json(folder / INDEX)["weight_map"].items()}
        except (UsageError, KeyError, AttributeError) as error:
            raise UsageError(f"{folder / INDEX} is damaged ({error}); get the file again") from error
    elif not (folder / WEIGHTS).exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        reason = f"{pickles[0]} is a pickle, which could run any code; convert it" if pickles else "convert its weights"
        raise UsageError(f"{folder} has neither {WEIGHTS} nor {INDEX}: {reason} with transformers' save_pretrained")
    with contextlib.ExitStack() as stack:
        tensors, names, where = {}, {}, {}
        for file in sorted(set(listed.values())) or [WEIGHTS]:
            if not (folder / file).exists():
                raise UsageError(f"{folder / INDEX} names {file}, which is not there; get the file")
            try:
                opened = stack.enter_context(safetensors.safe_open(folder / file, framework="np"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UsageError(f"{folder / file} is damaged ({error}); get the file again") from error
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                short = short_name(name)
                if (other := names.setdefault(short, name)) != name:
                    raise UsageError(f"{folder} has both {other} and {name}, of which only one can count; remove one")
                tensors[short], where[name] = opened.get_slice(name), file
        for name, file in listed.items():
            if where.get(name) != file:
                raise UsageError(f"{folder / file} has no tensor {name}, which {INDEX} says; get both files again")
        yield tensors, names


def full_name(name: str) -> str:
    """As transformers' causal language models write a short name."""
    return name if name == "lm_head.weight" else f"model.{name}"

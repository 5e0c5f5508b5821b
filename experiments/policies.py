"""The language model that a script trains: a new one, all of a pretrained one, or an adapter on it."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from esscher.core import meshes, reporting, tokens
from esscher.models import adapters, decoder, hf, hf_files
from esscher.models.functional import Params
from esscher.models.language_model import language_model
from esscher.samplers import decoding

__all__ = ["Completions", "Policy", "adapted", "completions", "full", "generator", "new", "save"]


CACHE_MEMORY = 2**30
"""Bytes of a device that the caches of generation may take."""


class Policy(NamedTuple):
    """How trainable parameters make a decoder; the fields are those that `runs.compile_program` asks for."""

    config: decoder.Config
    initialize: Callable[..., Any]  # (key, *pretrained) -> trainable
    axes: Any  # logical names of the trainable parameters' axes
    network: Callable[..., tuple[Params, Callable[[Any], Params]]]  # (trainable, *constants) -> params, layer_weights
    merged: Callable[..., Params]  # (trainable, *constants) -> params
    constants: tuple[Any, ...] = ()
    pretrained: tuple[Any, ...] = ()
    dtype: Any = None  # of the arithmetic; that of the parameters if absent


def new(config: decoder.Config) -> Policy:
    """A decoder that begins at random."""
    return _whole(config, lambda key: decoder.init(key, config), ())


def full(config: decoder.Config, params: Params) -> Policy:
    """All parameters of a pretrained decoder."""
    return _whole(config, lambda key, params: params, (params,))


def _whole(config: decoder.Config, initialize: Callable[..., Params], pretrained: tuple[Params, ...]) -> Policy:
    def network(params: Params) -> tuple[Params, Callable[[Any], Params]]:
        return params, lambda weights: weights

    return Policy(config, initialize, decoder.axes(config), network, lambda params: params, (), pretrained)


def adapted(config: decoder.Config, params: Params, rank: int, alpha: float) -> Policy:
    """A low-rank adapter on a pretrained decoder, which stays as it is."""

    def initialize(key: Array) -> Params:
        return adapters.init(key, decoder.shapes(config), rank=rank)

    def network(adapter: Params, params: Params) -> tuple[Params, Callable[[Any], Params]]:
        layered = {**params, "layers": (params["layers"], adapter["layers"])}
        return layered, lambda weights: adapters.merge(*weights, alpha=alpha)

    def merged(adapter: Params, params: Params) -> Params:
        return adapters.merge(params, adapter, alpha=alpha)

    axes = adapters.axes(decoder.axes(config), jax.eval_shape(initialize, jax.random.key(0)))
    return Policy(config, initialize, axes, network, merged, (params,))


class Completions(NamedTuple):
    """What a model says of the completions in a batch; place `t` is about the token at `t + 1`."""

    logps: Array  # [B, T] of each token from those before it
    mask: Array  # [B, T] whether that token belongs to a completion; the last place of a row never counts
    states: Array  # [B, T, D] last hidden states


def completions(
    policy: Policy,
    trainable: Any,
    batch: dict[str, Array],
    *constants: Any,
    first: int = 0,
    remat: bool = False,
) -> Completions:
    """Runs a model over a batch.

    Args:
      policy: whose.
      trainable: its parameters.
      batch: `tokens`, `segments` and `completion` as of `sequences.pack`, `[B, T]` each.
      *constants: the policy's.
      first: place to begin with, where no completion begins earlier; results have `T - first` places.
      remat: as in `decoder.hidden`.
    """
    params, layer_weights = policy.network(*_cast(policy, (trainable, *constants)))
    segments = batch["segments"]
    states = decoder.hidden(
        params, policy.config, batch["tokens"], segments=segments, remat=remat, layer_weights=layer_weights
    )
    following = lambda x: jnp.roll(x, -1, axis=1)[:, first:]  # noqa: E731
    states, mask = states[:, first:], following(batch["completion"]).at[:, -1].set(False)
    unembedding, cap = decoder.unembedding(params), policy.config.final_softcap
    return Completions(
        tokens.linear_token_logps(states, unembedding, following(batch["tokens"]), softcap=cap), mask, states
    )


def _cast(policy: Policy, trees: Any) -> Any:
    return trees if policy.dtype is None else jax.tree.map(lambda leaf: leaf.astype(policy.dtype), trees)


def generator(policy: Policy, length: int, stop: tuple[int, ...], mesh: Mesh) -> Callable[..., decoding.Generation]:
    """`(key, trainable, prompt, mask, *constants, **options of generate) -> Generation` of up to `length` tokens.

    Prompts whose caches would together take more than a gigabyte of a device's memory are answered in turns.
    """

    def generate(
        key: Array, trainable: Any, prompt: Array, mask: Array, *constants: Any, **options: Any
    ) -> decoding.Generation:
        params = policy.merged(*_cast(policy, (trainable, *constants)))
        model = language_model(params, policy.config, prompt.shape[1] + length)

        def answer(part: tuple[Array, Array, Array]) -> decoding.Generation:
            key, prompt, mask = part
            return decoding.generate(key, model, prompt, mask, length, stop=stop, **options)

        each = jax.tree.leaves(jax.eval_shape(model.init, prompt[:1], mask[:1]))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in each) * (options.get("n") or 1)
        turns = _turns(len(prompt), meshes.row_shards(mesh), size)
        if turns == 1:
            return answer((key, prompt, mask))
        # Every device's rows lie next to each other, so each turn takes some of each.
        parts = jax.tree.map(lambda x: x.reshape(-1, turns, *x.shape[1:]).swapaxes(0, 1), (prompt, mask))
        found = jax.lax.map(answer, (jax.random.split(key, turns), *parts))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)

    return generate


def _turns(rows: int, shards: int, size: int) -> int:
    """The fewest equal turns in which rows of that many bytes each fit the memory for caches of all devices."""
    fitting = max(CACHE_MEMORY // size, 1) * shards
    possible = (n for n in range(1, rows // shards + 1) if rows % (n * shards) == 0)
    return next((n for n in possible if rows <= n * fitting), max(rows // shards, 1))


def save(
    folder: pathlib.Path,
    policy: Policy,
    trainable: Any,
    tokenizer: Any,
    stop: tuple[int, ...],
    origin: pathlib.Path | None = None,
) -> None:
    """Writes the model, adapters merged, and its tokenizer as a folder that `hf.load` and transformers read.

    What the folder of `origin` says beside the architecture, such as special tokens and the longest context, is kept.
    """
    extra: dict[str, Any] = {"eos_token_id": list(stop)}
    if origin is not None:
        known = hf_files.read_json(origin / "config.json")
        extra |= {name: known[name] for name in _KEPT if name in known}
    params = jax.jit(policy.merged)(trainable, *policy.constants)
    hf.save(folder, policy.config, params, extra=extra)
    if not reporting.writes():
        return
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in _COPIED:
        if origin is not None and (origin / name).exists():
            shutil.copyfile(origin / name, folder / name)


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

"""Pairs to learn preferences from, of a file or sampled and judged, and what the reference says of them."""

import functools
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import meshes, reporting, sequences
from esscher.core.errors import UsageError
from esscher.core.sequences import Tokens
from esscher.experiments import language, policies, solving
from esscher.experiments.setups import Setup
from esscher.objectives import preference
from esscher.samplers import decoding

__all__ = ["Pairs", "load", "make", "save"]


class Pairs(NamedTuple):
    """Pairs to learn from and pairs to be judged by, and what is known of the model that made them.

    The columns of a part are `tokens`, `segments` and `completion`, `[N, R, T]`, as of `sequences.pack` with one
    sequence to a row: the chosen, the rejected and perhaps a mismatched response; `ref[N, R, T]`, the reference's
    log-probability of the token after each; and `rank[N]`, each pair's place by CHES score in `[0, 1)`.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    asked: int  # prompts that answers were sampled to; 0 with a file
    exact_match: float  # of the reference's greedy answers to the problems held out; NaN with a file


def make(config: Any, setup: Setup, mesh: Mesh, *, mismatched: bool) -> Pairs:
    """Samples pairs, or takes those of a file, and computes what the reference says of them.

    Args:
      config: of `arithmetic`.
      setup: model and problems.
      mesh: the mesh.
      mismatched: add to each pair the rejected response to the next prompt.

    Raises:
      UsageError: too few pairs are found.
    """
    parts: list[list[tuple[Tokens, Tokens]]]
    asked, exact = 0, float("nan")
    if setup.rejected is not None:
        parts = [list(zip(*part, strict=True)) for part in zip((setup.train, setup.test), setup.rejected, strict=True)]
    else:
        train = setup.task.train[: config.prompts], setup.train[: config.prompts]
        asked, exact = len(train[0]), _exact_match(config, setup, mesh)
        parts = [
            _sample(config, setup, mesh, *part, seed)
            for seed, part in enumerate((train, (setup.task.test, setup.test)), config.seed + 2)
        ]
    _exchange(parts[0], config.flip, config.seed)
    shards = meshes.row_shards(mesh)
    parts[1] = parts[1][: len(parts[1]) // shards * shards]
    if not all(parts):
        raise UsageError(
            f"{len(parts[0])} pairs to learn from and {len(parts[1])} to be judged by: there must be some of both. "
            "Sampled ones need problems that the model solves at times: take a --model trained for less or for longer, "
            "or more --prompts, --problems and --samples"
        )
    length = max(len(ids.prompt) + len(ids.completion) for part in parts for pair in part for ids in pair)
    found = []
    for part in parts:
        columns = _columns(part, length, mismatched)
        found.append(columns | _reference(config, setup, mesh, columns))
    return Pairs(*found, asked, exact)


def _exchange(pairs: list[tuple[Tokens, Tokens]], flip: float, seed: int) -> None:
    for i in np.flatnonzero(np.random.default_rng(seed).random(len(pairs)) < flip):
        pairs[i] = pairs[i][::-1]


# --- sampling ---------------------------------------------------------------------------------------------------------


def _chunks(rows: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of equally many rows each, the last chunk filled up from the front, and how many of them are new."""
    for start in range(0, rows, size):
        yield np.arange(start, start + size) % rows, min(size, rows - start)


def _initial(policy: policies.Policy) -> Callable[..., Any]:
    """`pretrained -> trainable` at the start of training, where an adapter adds nothing: the reference."""
    return lambda pretrained: policy.initialize(jax.random.key(0), *pretrained)


def _exact_match(config: Any, setup: Setup, mesh: Mesh) -> float:
    prompts, answers = zip(*setup.test, strict=True)
    policy, initial = setup.policy, _initial(setup.policy)
    generate = policies.generator(policy, max(map(len, answers)), setup.stop, mesh)

    @jax.jit
    def match(key: Array, prompt: Any, answer: Any, pretrained: Any, constants: Any) -> Array:
        found = generate(key, initial(pretrained), *prompt, *constants, choose=decoding.greedy)
        return solving.exact_match(found, *answer).mean()

    placed = meshes.place((sequences.pad_left(prompts), sequences.pad_right(answers)), mesh)
    return float(match(jax.random.key(0), *placed, policy.pretrained, policy.constants))


def _sample(
    config: Any,
    setup: Setup,
    mesh: Mesh,
    examples: Sequence[sequences.Example],
    encoded: Sequence[Tokens],
    seed: int,
) -> list[tuple[Tokens, Tokens]]:
    """One pair for each problem that has right and wrong ones among its sampled answers."""
    policy, initial, pairs = setup.policy, _initial(setup.policy), []
    longest = max(len(ids.completion) for ids in setup.test)
    generate = policies.generator(policy, longest, setup.stop, mesh)
    decode = functools.partial(language.decode, setup.tokenizer, stop=setup.stop)
    prompts = sequences.pad_left([ids.prompt for ids in encoded])

    @jax.jit
    def answer(key: Array, prompt: Array, mask: Array, pretrained: Any, constants: Any) -> Any:
        return generate(key, initial(pretrained), prompt, mask, *constants, n=config.samples)

    @jax.jit
    def choose(key: Array, logp: Array, mask: Array, correct: Array) -> preference.IndexPairs:
        score = jax.random.uniform(key, correct.shape)
        if config.judge == "confidence":
            score = jax.vmap(preference.answer_confidence)(logp, mask)
        return preference.top_gap_pairs(score, correct, 1)

    size = min(config.batch_size, len(encoded))
    size = -(-size // (shards := meshes.row_shards(mesh))) * shards
    with reporting.progress(len(encoded), label="sampling") as show:
        for number, (rows, new) in enumerate(_chunks(len(encoded), size)):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
            placed = meshes.place(tuple(part[rows] for part in prompts), mesh)
            found = meshes.gather(answer(keys[0], *placed, policy.pretrained, policy.constants))
            texts = [decode(*part) for part in zip(found.tokens, found.mask, strict=True)]
            correct = solving.Solved([examples[row] for row in rows], [], texts).correct
            chosen, rejected, valid = jax.device_get(choose(keys[1], found.logp, found.mask, correct))
            for i in np.flatnonzero(valid[:new, 0]):
                both = (found.tokens[i, j][found.mask[i, j]].tolist() for j in (chosen[i, 0], rejected[i, 0]))
                pairs.append(tuple(Tokens(encoded[rows[i]].prompt, completion) for completion in both))
            show(min(len(encoded), (number + 1) * size))
    return pairs


# --- arrays -----------------------------------------------------------------------------------------------------------


def _columns(pairs: Sequence[tuple[Tokens, Tokens]], length: int, mismatched: bool) -> dict[str, np.ndarray]:
    rows = [
        (*pair, Tokens(pair[0].prompt, other[1].completion)) if mismatched else pair
        for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ]
    each = [ids for row in rows for ids in row]
    length = max(length, *(len(ids.prompt) + len(ids.completion) for ids in each))
    tokens, mask = sequences.pad_right([[*ids.prompt, *ids.completion] for ids in each], length)
    prompt = sequences.pad_right([ids.prompt for ids in each], length)[1]
    columns = {"tokens": tokens, "segments": np.where(mask, 0, -1).astype(np.int32), "completion": mask & ~prompt}
    return {name: column.reshape(len(pairs), -1, length) for name, column in columns.items()}


def _reference(config: Any, setup: Setup, mesh: Mesh, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Log-probabilities under the reference, and the pairs' places by CHES score."""
    policy, initial = setup.policy, _initial(setup.policy)

    @jax.jit
    def ask(batch: dict[str, Array], pretrained: Any, constants: Any) -> tuple[Array, Array]:
        shape = batch["tokens"].shape
        flat = {name: column.reshape(-1, shape[-1]) for name, column in batch.items()}
        found = policies.completions(policy, initial(pretrained), flat, *constants)
        logps, mask, states = (x.reshape(*shape, *x.shape[2:]) for x in found)
        scores = preference.ches_score(states[:, 0], mask[:, 0], states[:, 1], mask[:, 1], length_normalize=True)
        return jnp.where(mask, logps, 0), scores

    pairs, logps, scores = len(columns["tokens"]), [], []
    with reporting.progress(pairs, label="reference") as show:
        for rows, new in _chunks(pairs, config.batch_size):
            batch = meshes.place({name: column[rows] for name, column in columns.items()}, mesh)
            for kept, part in zip((logps, scores), ask(batch, policy.pretrained, policy.constants), strict=True):
                kept.append(meshes.gather(part)[:new])
            show(sum(map(len, scores)))
    rank = np.argsort(np.argsort(np.concatenate(scores), kind="stable")) / pairs
    return {"ref": np.concatenate(logps), "rank": rank.astype(np.float32)}


# --- a file -----------------------------------------------------------------------------------------------------------


def save(path: pathlib.Path, pairs: Pairs) -> None:
    """Keeps the pairs of a run, which goes on with them when it is resumed, on whatever devices."""
    if reporting.writes():
        named = {f"{part}_{name}": x for part in ("train", "test") for name, x in getattr(pairs, part).items()}
        aside = path.with_name(f"aside-{path.name}")
        np.savez(aside, asked=pairs.asked, exact_match=pairs.exact_match, **named)
        aside.replace(path)


def load(path: pathlib.Path) -> Pairs:
    """The pairs that `save` wrote.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file}
        parts = [
            {name.removeprefix(start): x for name, x in arrays.items() if name.startswith(start)}
            for start in ("train_", "test_")
        ]
        return Pairs(*parts, int(arrays["asked"]), float(arrays["exact_match"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is damaged ({error}): take it away, and the run makes its pairs again") from error

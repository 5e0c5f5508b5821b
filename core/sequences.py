"""Prompts and completions: from a file, and into packed rows of one length."""

import codecs
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esscher.core.errors import UsageError

__all__ = ["Example", "Tokens", "pack", "pad_left", "pad_right", "read_jsonl"]


class Example(NamedTuple):
    """A prompt and the completion wanted, as text."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """The same as token ids, with whatever begins a prompt and ends a completion."""

    prompt: Sequence[int]
    completion: Sequence[int]


def read_jsonl(path: pathlib.Path, fields: Sequence[str] = ("prompt", "completion")) -> dict[int, tuple[str, ...]]:
    """The given fields of every line of a file, all of them non-empty text, by the number of the line.

    Raises:
      UsageError: no such file, an empty one, or lines that are not JSON objects with these fields; the message has the
        number of the first and what is wrong with it.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    found = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            found[number] = _fields(line, fields, f"{path}, line {number}")
    if not found:
        raise UsageError(f"{path} has no lines; each must be an object with {', '.join(fields)}")
    return found


def _fields(line: bytes, fields: Sequence[str], where: str) -> tuple[str, ...]:
    wanted = f"must be an object like {json.dumps(dict.fromkeys(fields, '...'))}"
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg} at column {error.colno}); it {wanted}") from error
    except (RecursionError, ValueError) as error:  # brackets in brackets, or a number of thousands of digits
        raise UsageError(f"{where}: not readable as JSON ({str(error).partition(';')[0]}); it {wanted}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {type(value).__name__} instead of an object; it {wanted}")
    for name in fields:
        if not isinstance(value.get(name), str) or not value[name].strip():
            got = "is missing" if name not in value else f"is {json.dumps(value[name])[:40]}"
            raise UsageError(f"{where}: {name!r} {got}; it must be text, not empty")
        try:
            value[name].encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a character, which no tokenizer takes
            raise UsageError(f"{where}: {name!r} is no text: {error.reason} at place {error.start + 1}") from error
    return tuple(value[name] for name in fields)


def pack(examples: Sequence[Tokens], length: int, *, pad: int = 0) -> dict[str, np.ndarray]:
    """Puts sequences into rows of one length, several to a row, so that little of it is padding.

    The longest come first, each into the fullest row that still has room.

    Args:
      examples: as token ids.
      length: `T`.
      pad: token to fill up with.

    Returns:
      `tokens: int32[N, T]`, `segments: int32[N, T]` (number of the sequence in its row, -1 for padding) and
      `completion: bool[N, T]` (whether the token is one to be learned).

    Raises:
      UsageError: an example is longer than a row; the message has its number.
    """
    sizes = [len(example.prompt) + len(example.completion) for example in examples]
    for number, size in enumerate(sizes, 1):
        if size > length:
            raise UsageError(f"example {number} has {size} tokens, a row has {length}: raise --length or shorten it")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room they have
    for index in sorted(range(len(examples)), key=lambda i: -sizes[i]):
        room = next((room for room in range(sizes[index], length + 1) if with_room[room]), None)
        if room is None:
            row, room = len(rows), length
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(index)
        with_room[room - sizes[index]].append(row)
    tokens = np.full((len(rows), length), pad, np.int32)
    segments = np.full((len(rows), length), -1, np.int32)
    completion = np.zeros((len(rows), length), bool)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            prompt, end = len(examples[index].prompt), start + sizes[index]
            tokens[row, start:end] = (*examples[index].prompt, *examples[index].completion)
            segments[row, start:end] = segment
            completion[row, start + prompt : end] = True
            start = end
    return {"tokens": tokens, "segments": segments, "completion": completion}


def pad_left(sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged sequences as an array, padded with 0 on the left, and its mask: `int32[N, T]`, `bool[N, T]`.

    Raises:
      ValueError: a sequence is longer than `length`.
    """
    tokens, mask = pad_right([tuple(reversed(sequence)) for sequence in sequences], length)
    return tokens[:, ::-1].copy(), mask[:, ::-1].copy()


def pad_right(sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged sequences as an array, padded with 0 on the right, and its mask: `int32[N, T]`, `bool[N, T]`.

    Raises:
      ValueError: a sequence is longer than `length`.
    """
    longest = max(map(len, sequences))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"length must be at least {longest}, that of the longest sequence, got {length}")
    tokens, mask = np.zeros((len(sequences), length), np.int32), np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
    return tokens, mask

"""Tasks for language models: arithmetic problems made here, or prompts and completions from a file."""

import itertools
import operator
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from esscher.core import sequences
from esscher.core.errors import UsageError
from esscher.core.sequences import Example, Tokens
from esscher.models import hf_files

__all__ = [
    "OPERATIONS",
    "Pair",
    "Problem",
    "Task",
    "arithmetic",
    "decode",
    "encode",
    "from_file",
    "open_tokenizer",
    "tokenizer_of",
]

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
PAD, END = 0, 1
LARGEST = 100_000  # problems that are made at most


class Pair(NamedTuple):
    """A prompt, and two completions of which one is better."""

    prompt: str
    chosen: str
    rejected: str


class Problem(NamedTuple):
    """A prompt, and what a verifier is to know of the answer."""

    prompt: str
    answer: str


class Task(NamedTuple):
    """Examples (or pairs) to learn from, and others to be judged by."""

    train: list[Any]
    test: list[Any]


def arithmetic(digits: int, operations: str, base: int, held_out: int, seed: int) -> Task:
    """Problems like `37+58=` with their answers, no problem in both parts.

    Args:
      digits: of the operands, at most.
      operations: characters out of `+-*`.
      base: of the numbers, 2 to 36.
      held_out: number of test problems.
      seed: which ones.

    Raises:
      UsageError: values out of range, or fewer problems than are to be held out.
    """
    if not operations or set(operations) - OPERATIONS.keys():
        raise UsageError(f"--operations must be made of {' '.join(OPERATIONS)}, got {operations!r}")
    if not 2 <= base <= len(DIGITS):
        raise UsageError(f"--base must be 2 to {len(DIGITS)}, got {base}")
    if not 1 <= digits <= 9:
        raise UsageError(f"--digits must be 1 to 9, got {digits}")
    operations = "".join(dict.fromkeys(operations))  # one given twice would make each of its problems twice
    numbers = base**digits
    total = len(operations) * numbers**2
    if total >= 2**63:
        raise UsageError(f"--digits {digits} in --base {base}: too many problems to be numbered; take fewer digits")
    made = min(total, LARGEST)
    if made <= held_out:
        raise UsageError(f"--problems {held_out} leaves none of {made} problems to learn from")
    chosen = np.random.default_rng(seed).choice(total, size=made, replace=False)
    problems = []
    for index in chosen.tolist():
        sign, (a, b) = operations[index % len(operations)], divmod(index // len(operations), numbers)
        text = [_write(number, base) for number in (a, b, OPERATIONS[sign](a, b))]
        problems.append(Example(f"{text[0]}{sign}{text[1]}=", text[2]))
    return Task(problems[held_out:], problems[:held_out])


def _write(number: int, base: int) -> str:
    digits = []
    rest = abs(number)
    while rest or not digits:
        rest, digit = divmod(rest, base)
        digits.append(DIGITS[digit])
    return "-" * (number < 0) + "".join(reversed(digits))


def from_file(path: pathlib.Path, held_out: int, seed: int, kind: type = Example) -> Task:
    """Examples, or pairs, of a `jsonl` file; some of the prompts, with all their lines, are held out at random.

    Raises:
      UsageError: the file cannot be read, a line is malformed, or there are too few prompts.
    """
    by_prompt: dict[str, list[Any]] = {}
    for fields in sequences.read_jsonl(path, kind._fields).values():
        by_prompt.setdefault(fields[0], []).append(kind(*fields))
    if len(by_prompt) <= held_out:
        raise UsageError(f"--problems {held_out} leaves none of the {len(by_prompt)} prompts of {path} to learn from")
    groups = list(by_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    train = [example for i in order[held_out:] for example in groups[i]]
    return Task(train, [groups[i][0] for i in order[:held_out]])


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenizer_of(operations: str, base: int) -> Any:
    """A tokenizer of single characters for arithmetic; 0 is padding and 1 ends a completion."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [*DIGITS[:base], *dict.fromkeys(f"{operations}-"), "="]
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<end>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    return tokenizer


def open_tokenizer(folder: pathlib.Path) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a model's folder, and the tokens that end a completion.

    Raises:
      UsageError: `tokenizer.json` is missing or damaged, or no configuration names an end token.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare ones
        raise UsageError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()  # either may be stored in the file, and would change what is learned
    tokenizer.no_truncation()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            try:
                end = hf_files.read_json(folder / name).get("eos_token_id")
            except UsageError as error:
                raise UsageError(f"{folder / name} {error}") from error
            if end not in (None, []):
                return tokenizer, tuple(end) if isinstance(end, list) else (end,)
    raise UsageError(f"neither generation_config.json nor config.json in {folder} has an eos_token_id")


def encode(tokenizer: Any, end: int, examples: Sequence[Example]) -> list[Tokens]:
    """Token ids of prompts, with what the tokenizer begins a text with, and of completions with `end` after them.

    What a tokenizer ends a text with is left out: a prompt goes on.

    Raises:
      UsageError: a prompt or completion without any token.
    """
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    completions = tokenizer.encode_batch([example.completion for example in examples], add_special_tokens=False)
    begun = [encoding.ids[: len(encoding.ids) - _added(encoding.special_tokens_mask)] for encoding in prompts]
    encoded = [Tokens(prompt, [*c.ids, end]) for prompt, c in zip(begun, completions, strict=True)]
    for example, (prompt, _) in zip(examples, encoded, strict=True):
        if not prompt:
            raise UsageError(f"the tokenizer makes no token of the prompt {example.prompt[:40]!r}")
    return encoded


def _added(special: Sequence[int]) -> int:
    """How many tokens at the end the tokenizer has added to those of the text."""
    return len(list(itertools.takewhile(bool, reversed(special))))


def decode(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, stop: Sequence[int]) -> list[str]:
    """Texts of completions `[N, T]`, without special tokens and without those that end one, special or not."""
    kept = (mask != 0) & ~np.isin(tokens, stop)
    return tokenizer.decode_batch([row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)])

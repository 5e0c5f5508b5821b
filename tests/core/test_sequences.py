"""Examples from a file, packed into rows, and padded."""

import json

import numpy as np
import pytest

from esscher.core import sequences
from esscher.core.errors import UsageError
from esscher.core.sequences import Tokens

GOOD = '{"prompt": "1+1=", "completion": "2"}'


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "data.jsonl"

    def write(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- files ------------------------------------------------------------------------------------------------------------


def test_lines_are_read_in_order_and_blank_ones_skipped(write):
    other = json.dumps({"completion": "zwei", "prompt": "eins\nund", "more": [1]})
    assert sequences.read_jsonl(write(f"{GOOD}\r\n\n  \n{other}\n")) == {
        1: ("1+1=", "2"),
        4: ("eins\nund", "zwei"),
    }
    assert sequences.read_jsonl(write(f"{GOOD}\n"), ("completion",)) == {1: ("2",)}


def test_a_mark_of_the_byte_order_is_no_part_of_the_text(write):
    assert sequences.read_jsonl(write(f"\ufeff{GOOD}\r\n")) == {1: ("1+1=", "2")}


@pytest.mark.parametrize("character", "\u2028\u2029\x85")
def test_what_ends_a_line_for_python_but_not_for_json_is_text(write, character):
    line = json.dumps({"prompt": f"a{character}b", "completion": "c"}, ensure_ascii=False)
    assert sequences.read_jsonl(write(f"{line}\n{GOOD}")) == {1: (f"a{character}b", "c"), 2: ("1+1=", "2")}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"prompt": "1+1=", "completion": 2', "not JSON (Expecting ',' delimiter at column 35)"),
        ('["1+1=", "2"]', "list instead of an object; it must be an object like"),
        ('{"prompt": "1+1="}', "'completion' is missing; it must be text"),
        ('{"prompt": "1+1=", "completion": 2}', "'completion' is 2; it must be text"),
        ('{"prompt": null, "completion": "2"}', "'prompt' is null; it must be text"),
        ('{"prompt": "", "completion": "2"}', "'prompt' is \"\"; it must be text, not empty"),
        ('{"prompt": " \\n", "completion": "2"}', "it must be text, not empty"),
        ("[" * 100_000, "not readable as JSON (maximum recursion depth exceeded"),
        (GOOD[:-1] + f', "id": {"1" * 5000}}}', "not readable as JSON (Exceeds the limit"),
        (GOOD.replace("2", "\udce9"), "not UTF-8 (invalid continuation byte at byte 35); save it as UTF-8"),
        ('{"prompt": "\\ud83d", "completion": "2"}', "'prompt' is no text: surrogates not allowed at place 1"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_wrong(write, line, wrong):
    path = write(f"{GOOD}\n\n{line}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as error:
        sequences.read_jsonl(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [(b"\xff\xfe{", "line 1: not UTF-8 .*at byte 1"), ("", "has no lines; each must be"), ("\n \n", "has no lines")],
)
def test_a_file_that_is_no_text_or_empty_is_refused(write, content, wrong):
    with pytest.raises(UsageError, match=wrong):
        sequences.read_jsonl(write(content))


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.jsonl: No such file or directory"):
        sequences.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        sequences.read_jsonl(tmp_path)


# --- packing ----------------------------------------------------------------------------------------------------------


def mix(n, longest, seed=0):
    """Examples of which each token tells the example and the place; sizes are log-normal, as those of texts are."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(4, 0.8, n).astype(int), 2, longest)
    prompts = rng.integers(1, sizes)
    return [
        Tokens(range(1000 * i, 1000 * i + prompt), range(1000 * i + prompt, 1000 * i + size))
        for i, (size, prompt) in enumerate(zip(sizes.tolist(), prompts.tolist(), strict=True))
    ]


def unpacked(packed):
    """The examples in the rows, from segments and completion alone."""
    for tokens, segments, completion in zip(*packed.values(), strict=True):
        for segment in range(segments.max() + 1):
            there = segments == segment
            assert np.ptp(np.flatnonzero(there)) == there.sum() - 1  # in one piece
            yield Tokens(tokens[there & ~completion].tolist(), tokens[there & completion].tolist())


def test_every_example_is_in_one_row_once_and_whole():
    examples = mix(300, 128)
    packed = sequences.pack(examples, 128, pad=7)
    assert {name: (array.dtype, array.shape[1]) for name, array in packed.items()} == {
        "tokens": (np.int32, 128),
        "segments": (np.int32, 128),
        "completion": (bool, 128),
    }
    expected = [Tokens(list(example.prompt), list(example.completion)) for example in examples]
    assert sorted(unpacked(packed)) == sorted(expected)
    padding = packed["segments"] < 0
    assert (packed["tokens"][padding] == 7).all()
    assert not packed["completion"][padding].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # at the end of the row


def test_a_row_that_fits_exactly_is_full_and_an_example_of_its_length_has_it_alone():
    packed = sequences.pack([Tokens([1], [2]), Tokens([3, 4], [5, 6]), Tokens([7], [8])], 4)
    np.testing.assert_array_equal(packed["tokens"], [[3, 4, 5, 6], [1, 2, 7, 8]])
    np.testing.assert_array_equal(packed["segments"], [[0, 0, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(packed["completion"], [[0, 0, 1, 1], [0, 1, 0, 1]])


@pytest.mark.parametrize("length", [256, 1024])
def test_little_of_a_realistic_mix_is_padding(length):
    assert (sequences.pack(mix(2000, 256), length)["segments"] >= 0).mean() > 0.95


def test_packing_is_deterministic():
    one, other = (sequences.pack(mix(200, 100), 128) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_an_example_longer_than_a_row_is_named():
    with pytest.raises(UsageError, match="example 2 has 5 tokens, a row has 4: raise --length"):
        sequences.pack([Tokens([1], [2]), Tokens([1, 2], [3, 4, 5]), Tokens([1] * 9, [1])], 4)


# --- padding ----------------------------------------------------------------------------------------------------------


def test_padding_is_on_the_side_that_the_name_says():
    left, mask = sequences.pad_left([[1, 2], [3], []])
    np.testing.assert_array_equal(left, [[1, 2], [0, 3], [0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1], [0, 1], [0, 0]])
    right, mask = sequences.pad_right([[1, 2], [3]], 3)
    np.testing.assert_array_equal(right, [[1, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 0, 0]])
    assert right.dtype == np.int32
    assert mask.dtype == bool
    np.testing.assert_array_equal(sequences.pad_left([[1, 2]], 4)[0], [[0, 0, 1, 2]])


@pytest.mark.parametrize("pad", [sequences.pad_left, sequences.pad_right])
def test_a_length_below_the_longest_is_refused(pad):
    with pytest.raises(ValueError, match="length must be at least 3, that of the longest sequence, got 2"):
        pad([[1], [1, 2, 3]], 2)

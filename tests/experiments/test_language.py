"""Arithmetic problems are right and apart, files become tasks, and text becomes tokens and text again."""

import json
import re
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from esscher.core.errors import UsageError
from esscher.core.sequences import Example
from esscher.experiments import language

# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 10, 16])
def test_answers_are_right_and_no_problem_is_in_both_parts(base):
    task = language.arithmetic(2, "+-*", base, held_out=20, seed=0)
    seen, negative = set(), 0
    for example in (*task.train, *task.test):
        a, sign, b = re.fullmatch(r"([0-9a-z]+)([-+*])([0-9a-z]+)=", example.prompt).groups()
        a, b, answer = (int(text, base) for text in (a, b, example.completion))
        assert answer == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert max(a, b) < base**2
        seen.add((a, sign, b))
        negative += answer < 0
    assert len(task.test) == 20
    assert len(seen) == len(task.train) + len(task.test) == min(3 * base**4, language.LARGEST)
    assert negative > 0


def test_an_operation_given_twice_makes_no_problem_twice():
    assert language.arithmetic(1, "+-+", 10, 20, 0) == language.arithmetic(1, "+-", 10, 20, 0)


def test_a_seed_fixes_the_problems():
    one, same, other = (language.arithmetic(1, "+", 10, 20, seed) for seed in (3, 3, 4))
    assert one == same
    assert set(one.test) != set(other.test)


@pytest.mark.parametrize(("digits", "base"), [(9, 10), (3, 16)])
def test_many_digits_need_no_more_memory_than_the_problems_that_are_made(digits, base, monkeypatch):
    monkeypatch.setattr(language, "LARGEST", 100)
    tracemalloc.start()
    task = language.arithmetic(digits, "+*", base, held_out=10, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(task.train) == 90
    assert max(len(example.prompt) for example in task.train) == 2 * digits + 2
    assert peak < 10**6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operations": "x"}, "--operations must be made of + - *, got 'x'"),
        ({"operations": ""}, "--operations must be made of"),
        ({"base": 1}, "--base must be 2 to 36, got 1"),
        ({"base": 37}, "--base must be 2 to 36, got 37"),
        ({"digits": 0}, "--digits must be 1 to 9, got 0"),
        ({"digits": 10}, "--digits must be 1 to 9, got 10"),
        ({"digits": 9, "base": 36}, "--digits 9 in --base 36: too many problems"),
        ({"held_out": 100}, "--problems 100 leaves none of 100 problems"),
        ({"held_out": 100_000, "digits": 3}, "--problems 100000 leaves none of 100000 problems"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(UsageError) as error:
        language.arithmetic(**{"digits": 1, "operations": "+", "base": 10, "held_out": 10, "seed": 0} | changes)
    assert message in str(error.value)


# --- files ------------------------------------------------------------------------------------------------------------


def test_lines_of_a_file_are_split_at_random(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [Example(f"p{i}", f"c{i}") for i in range(30)]
    path.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines))
    task, same, other = (language.from_file(path, 10, seed) for seed in (0, 0, 1))
    assert task == same
    assert task != other
    assert len(task.test) == 10
    assert sorted(task.train + task.test) == sorted(lines)
    assert task.test not in (lines[:10], lines[20:])
    with pytest.raises(UsageError, match="--problems 30 leaves none of the 30 prompts"):
        language.from_file(path, 30, 0)


def test_a_prompt_on_several_lines_is_held_out_with_all_of_them(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [Example(f"p{i % 6}", f"c{i}") for i in range(18)]
    path.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines))
    task = language.from_file(path, 2, 0)
    assert len(task.test) == 2
    assert len(task.train) == 12
    assert not {line.prompt for line in task.train} & {line.prompt for line in task.test}


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 10, 36])
def test_what_is_encoded_is_decoded_again(base):
    tokenizer = language.tokenizer_of("+-*", base)
    examples = language.arithmetic(2, "+-*", base, 5, 0).train[:200]
    encoded = language.encode(tokenizer, language.END, examples)
    assert {token for ids in encoded for part in ids for token in part} == set(range(1, base + 6))
    for example, ids in zip(examples, encoded, strict=True):
        assert len(ids.prompt) == len(example.prompt)
        assert ids.completion[-1] == language.END
        assert language.END not in (*ids.prompt, *ids.completion[:-1])
    for part in ("prompt", "completion"):
        rows = [getattr(ids, part) for ids in encoded]
        tokens, mask = (np.zeros((len(rows), 12), dtype) for dtype in (np.int32, bool))
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        assert language.decode(tokenizer, tokens, mask, ()) == [getattr(example, part) for example in examples]


def test_what_the_mask_hides_is_not_decoded():
    tokenizer = language.tokenizer_of("+", 10)
    tokens = np.array(tokenizer.encode("12+3").ids)[None]
    assert language.decode(tokenizer, tokens, np.array([[1, 0, 1, 0]]), ()) == ["1+"]


def test_what_ends_an_answer_is_no_part_of_it_even_where_the_tokenizer_holds_it_for_text():
    tokenizer = language.tokenizer_of("+", 10)
    tokens = np.array(tokenizer.encode("12+3").ids)[None]
    assert language.decode(tokenizer, tokens, tokens >= 0, (tokens[0, -1],)) == ["12+"]


def test_a_prompt_begins_as_the_tokenizer_wants_and_goes_on_and_a_completion_does_not():
    tokenizer = language.tokenizer_of("+", 10)
    plain = language.encode(tokenizer, 1, [Example("1+1=", "2")])[0]
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", begin)])
    ids = language.encode(tokenizer, 1, [Example("1+1=", "2")])[0]
    assert ids.prompt == [begin, *plain.prompt]
    assert ids.completion == plain.completion
    tokens = np.array([[*ids.prompt, *ids.completion]])
    assert language.decode(tokenizer, tokens, tokens >= 0, ()) == ["1+1=2"]
    written = language.encode(tokenizer, 1, [Example("1+1=<s>", "2")])[0]
    assert written.prompt == [*ids.prompt, begin]  # in the text it stays


def test_a_prompt_without_tokens_is_refused():
    tokenizer = Tokenizer(models.BPE({"1": 0}, []))
    with pytest.raises(UsageError, match="the tokenizer makes no token of the prompt 'é'"):
        language.encode(tokenizer, 1, [Example("1", "1"), Example("é", "1")])


@pytest.fixture
def model_folder(tmp_path):
    language.tokenizer_of("+", 10).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    return tmp_path


@pytest.mark.parametrize(
    ("generation", "stop"),
    [
        (None, (1,)),
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 7}, (7,)),
        ({}, (1,)),
        ({"eos_token_id": []}, (1,)),
    ],
)
def test_the_end_is_that_of_generation_or_else_of_the_model(model_folder, generation, stop):
    if generation is not None:
        (model_folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer, found = language.open_tokenizer(model_folder)
    assert found == stop
    assert tokenizer.get_vocab() == language.tokenizer_of("+", 10).get_vocab()


def test_padding_and_truncation_that_a_tokenizer_was_saved_with_are_not_used(model_folder):
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(model_folder / "tokenizer.json"))
    tokenizer, stop = language.open_tokenizer(model_folder)
    assert [len(part) for part in language.encode(tokenizer, stop[0], [Example("12+34=", "46")])[0]] == [6, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("tokenizer.json", "{", r"tokenizer\.json is damaged: "),
        ("config.json", "{}", "has an eos_token_id"),
        ("config.json", None, "has an eos_token_id"),
        ("config.json", "{", r"/config\.json cannot be read"),
        ("generation_config.json", "[1]", r"/generation_config\.json holds no object"),
    ],
)
def test_a_folder_without_what_is_needed_is_refused(model_folder, name, content, message):
    if content is None:
        (model_folder / name).unlink()
    else:
        (model_folder / name).write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        language.open_tokenizer(model_folder)
    assert "\n" not in str(error.value)

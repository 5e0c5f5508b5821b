"""What is right is counted as such, and shown in a table that nothing breaks."""

import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.sequences import Example
from esscher.experiments import solving, verifiers
from esscher.samplers import decoding


def test_a_generation_is_exact_token_for_token_and_no_longer():
    tokens, mask = jnp.array([[3, 4, 1, 0]] * 5), jnp.array([[True, True, True, False]] * 5)
    given = jnp.array([[3, 4, 1, 0], [3, 5, 1, 0], [3, 4, 1, 9], [3, 4, 1, 9], [3, 1, 0, 0]])
    kept = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], bool)
    answer = decoding.Generation(given, kept, given * 0.0, given * 0.0)
    np.testing.assert_array_equal(solving.exact_match(answer, tokens, mask), [1, 0, 1, 0, 0])


def test_attempts_are_those_of_a_count_by_hand():
    examples = [Example("a", "x"), Example("b", "y"), Example("c", "z")]
    sampled = [["x ", "w", " x", "v"], ["w", "w", "y", "w"], ["", "a", "b", "c"]]
    solved = solving.Solved(examples, ["x", "y", "w"], sampled)
    np.testing.assert_array_equal(solved.exact_match, [True, True, False])
    np.testing.assert_array_equal(solved.correct.sum(1), [2, 1, 0])
    budgets, passed, majority = solving.attempts(solved)
    np.testing.assert_array_equal(budgets, [1, 2, 4])
    # Of 6 pairs, 5 hold one of two right ones and 3 the only one.
    np.testing.assert_allclose(passed, [(1 / 2 + 1 / 4) / 3, (5 / 6 + 3 / 6) / 3, 2 / 3], rtol=1e-6)
    # First: one pair is both right, four are ties. Second: three ties. Of all four votes, 2 win and 1 loses.
    np.testing.assert_allclose(majority, [(1 / 2 + 1 / 4) / 3, ((1 + 4 / 2) / 6 + (3 / 2) / 6) / 3, 1 / 3], rtol=1e-6)


def test_right_answers_in_other_words_vote_as_one():
    examples, sampled = [Example("a", "42")], [["it is 42", "so 42", "7", "7", "7", "x", "y", "42"]]
    solved = solving.Solved(examples, ["42"], sampled, verifiers.last_number)
    assert solved.correct.sum() == 3
    assert solving.attempts(solved)[2][-1] == pytest.approx(0.5)  # three against three
    assert solving.attempts(solved._replace(verifier=verifiers.exact))[2][-1] == 0


def test_budgets_end_at_the_number_of_samples():
    solved = solving.Solved([Example("a", "x")], ["x"], [["x"] * 6])
    budgets, passed, majority = solving.attempts(solved)
    np.testing.assert_array_equal(budgets, [1, 2, 4])
    np.testing.assert_allclose([passed, majority], 1, rtol=1e-6)


def test_any_text_stands_in_a_cell(tmp_path):
    odd, long = "a|b\n\\| \u2028`", "0123456789" * 20
    examples = [Example("right", "x")] * 3 + [Example(odd, long)] + [Example("right", "x")] * 9
    solved = solving.Solved(examples, ["x"] * 3 + ["é|\t"] + ["x"] * 9, [["x"]] * 13)
    sections = solving.report(tmp_path, solved)
    assert (tmp_path / "figures" / "attempts.png").exists()
    assert "92.3% of 13 problems" in sections["Solved"]
    header, _, first, *others = sections["Answers"].split("\n\n", 1)[1].split("\n")
    assert [cell.strip() for cell in header.split("|")] == ["", "problem", "answer", "wanted", ""]
    assert len(others) == solving.SHOWN - 1
    assert all("right" in line for line in others)
    cells = [cell.strip() for cell in first.replace("\\|", "\0").split("|")]
    assert cells[1].startswith("a\0b\\n")
    assert cells[2] == "é\0\\t"
    assert cells[3] == long[:60] + "..."
    assert len(cells) == 5

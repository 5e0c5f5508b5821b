"""What an answer is worth: functions of two texts, `(answer, wanted) -> reward`, for `--verifier`."""

import decimal
import re

__all__ = ["exact", "last_number"]

NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")  # after a digit a - is no sign


def exact(answer: str, wanted: str) -> float:
    """1 if the two are one text, but for space around them.

    >>> exact(" 42", "42")
    1.0
    """
    return float(answer.strip() == wanted.strip())


def last_number(answer: str, wanted: str) -> float:
    """1 if the last numbers in the two are equal; commas between digits do not count.

    >>> last_number("So it is 1,200 apples.", "12 * 100 = 1200")
    1.0
    """
    numbers = [NUMBER.findall(text) for text in (answer, wanted)]
    if not all(numbers):
        return 0.0
    first, second = (decimal.Decimal(found[-1].replace(",", "")) for found in numbers)
    return float(first == second)

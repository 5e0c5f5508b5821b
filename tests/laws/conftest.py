"""Laws are tested on few numbers, by many programs."""

import pytest


@pytest.fixture(autouse=True)
def compile_laws_quickly(compile_quickly):
    """At these shapes compiling is what takes time, not running."""

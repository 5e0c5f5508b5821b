"""Laws compile much and run little."""

import pytest


@pytest.fixture(autouse=True)
def compile_laws_quickly(compile_quickly):
    pass

"""Every public function of objectives, samplers and core/tokens has an example."""

import importlib
import pathlib

import pytest
from laws.collection import examples

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("objectives", "samplers", "core/tokens")


def public_functions():
    """Name and function for all that a module of the rooms defines and lists in `__all__`, classes and types apart."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(("esscher", *parts)).removesuffix(".__init__"))
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                if callable(value) and not isinstance(value, type) and value.__module__ == module.__name__:
                    yield f"{module.__name__.removeprefix('esscher.')}.{name}", value


COVERED = {function for example in examples() for function in example.covers}


@pytest.mark.parametrize(("name", "function"), [pytest.param(*pair, id=pair[0]) for pair in public_functions()])
def test_has_an_example(name, function):
    folder = f"tests/laws/examples/{name.split('.')[0]}"
    assert function in COVERED, f"{name} is under no law: add an Example that covers it ({folder} or its family's file)"


def test_examples_cover_public_functions_only():
    public = {function for _, function in public_functions()}
    strangers = {f"{function.__module__}.{function.__name__}" for function in COVERED - public}
    assert not strangers, f"covered, but not listed in __all__: {sorted(strangers)}"

"""All examples, from every file in `laws/examples/`."""

import importlib
import pathlib

from laws.harness import LAWS, Example

__all__ = ["examples"]


def examples() -> list[Example]:
    """Every example of every family, families in alphabetical order."""
    files = sorted((pathlib.Path(__file__).parent / "examples").glob("*.py"))
    found = [example for file in files for example in importlib.import_module(f"laws.examples.{file.stem}").EXAMPLES]
    names = [example.name for example in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"examples need names of their own: {sorted(twice)}"
    unknown = {f"{example.name}: {law}" for example in found for law in example.exempt if law not in LAWS}
    assert not unknown, f"exempt from laws that do not exist: {sorted(unknown)}"
    return found

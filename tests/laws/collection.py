"""All examples, from every file in `laws/examples/`."""

import importlib
import pathlib

import jax
from laws.harness import LAWS, Example

__all__ = ["examples"]


def examples() -> list[Example]:
    """Every example of every family, families in alphabetical order."""
    files = sorted((pathlib.Path(__file__).parent / "examples").glob("*.py"))
    jax.config.update("jax_disable_most_optimizations", True)  # hundreds of programs that run once make the arrays
    modules = [importlib.import_module(f"laws.examples.{file.stem}") for file in files]
    jax.config.update("jax_disable_most_optimizations", False)
    found = [example for module in modules for example in module.EXAMPLES]
    names = [example.name for example in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"examples need names of their own: {sorted(twice)}"
    unknown = {f"{example.name}: {law}" for example in found for law in example.exempt if law not in LAWS}
    assert not unknown, f"exempt from laws that do not exist: {sorted(unknown)}"
    return found

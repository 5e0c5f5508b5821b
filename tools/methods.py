"""Prints METHODS.md: every public function of the library, what it does in a line, and the papers it comes from."""

import importlib
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("objectives", "samplers", "models", "core")

HEADER = """\
# Methods

Every public function, by room. Made from the docstrings by `make methods`; do not edit.
"""


def public_functions(room: str) -> Iterator[tuple[str, str, object]]:
    """Yields `(module, name, object)` of what the modules of a room define and list in `__all__`."""
    for path in sorted((ROOT / room).rglob("*.py")):
        name = ".".join(("esscher", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == name:
                yield name, public, value


def first_line(value: object) -> str:
    """The summary of a docstring, on one line and safe inside a table."""
    return (inspect.getdoc(value) or "").split("\n")[0].replace("|", "\\|")


def references(value: object) -> str:
    """The papers named by a docstring's `Reference:` lines."""
    found = re.findall(r"^References?: (.+?)(?=^\S+: |\Z)", inspect.getdoc(value) or "", flags=re.S | re.M)
    titles = [textwrap.dedent(text).replace("\n", " ").strip().rstrip(".") for text in found]
    linked = [re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", title) for title in titles]
    return "; ".join(linked)


def render() -> str:
    """The whole page."""
    parts = [HEADER]
    for room in ROOMS:
        rows = [
            f"| `{name}` | `{module.removeprefix('esscher.')}` | {first_line(value)} | {references(value)} |"
            for module, name, value in public_functions(room)
        ]
        parts += [f"\n## {room}\n", "| name | module | what it does | paper |\n|---|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")

"""The `esscher` command: lists the experiments and runs one of them."""

import ast
import errno
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from esscher.core.errors import UsageError

__all__ = ["experiments", "main", "run"]


def experiments() -> dict[str, str]:
    """Name and summary of each experiment: the modules here that define `Config` and `main`. Imports none of them."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if {"Config", "main"} <= defined:
            found[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main() -> None:
    """Entry point of the console command."""
    known = experiments()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: esscher EXPERIMENT [flags]\n\nexperiments:")
        print("\n".join(f"  {name:<{width}}  {summary}" for name, summary in known.items()))
        print("\n`esscher EXPERIMENT --help` explains its flags.")
        return
    if name not in known:
        print(f"error: no experiment {name!r}; there are: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"esscher.experiments.{name.replace('-', '_')}")
    run(module.main, module.Config, arguments, prog=f"esscher {name}", description=module.__doc__)


def run(
    main: Callable[[Any], None],
    config: type,
    arguments: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> None:
    """Reads a config dataclass from the command line and calls `main` on it.

    What a user got wrong is printed in one line, with exit code 2 and no traceback. Compiled programs are kept in
    `~/.cache/esscher/xla` unless `JAX_COMPILATION_CACHE_DIR` says otherwise, so that a second run starts at once.
    """
    import jax
    import tyro

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "esscher" / "xla"))
    settings = tyro.cli(config, args=arguments, prog=prog, description=description)
    try:
        main(settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({error}); free some space and run the same command again", file=sys.stderr)
        sys.exit(2)

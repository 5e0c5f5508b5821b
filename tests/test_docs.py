"""Examples in docstrings run, METHODS.md is fresh, and the README's Python runs."""

import doctest
import importlib
import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
    ".".join(("esscher", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ("core", "models", "objectives", "samplers", "experiments")
    for path in (ROOT / room).rglob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if ">>> " in (ROOT / (name[8:].replace(".", "/") + ".py")).read_text()]
)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_methods_page_is_fresh():
    page = runpy.run_path(str(ROOT / "tools" / "methods.py"))["render"]()
    assert page == (ROOT / "METHODS.md").read_text(), "METHODS.md is stale: run `make methods`"


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


@pytest.mark.parametrize("index", range(len(python_blocks("README.md"))))
def test_the_readmes_python_runs(index):
    exec(compile(python_blocks("README.md")[index], f"README.md, example {index + 1}", "exec"), {})


def test_the_example_of_contributing_is_the_code_itself():
    blocks = python_blocks("CONTRIBUTING.md")
    for index, file in ((0, "objectives/score.py"), (-1, "tests/objectives/test_score.py")):
        assert blocks[index] in (ROOT / file).read_text(), f"example {index} of CONTRIBUTING.md is not in {file}"


def test_links_between_the_pages_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

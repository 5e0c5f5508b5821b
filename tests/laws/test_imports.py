"""The house keeps its rules: who imports whom, what is public, and how it is written."""

import ast
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY = ("core", "models", "objectives", "samplers")
ROOMS = (*LIBRARY, "experiments")
MAY_IMPORT = {room: {"core"} for room in LIBRARY} | {"experiments": set(ROOMS)}
LONGEST = 400


def sources(*rooms):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for room in rooms for path in files(room)]


def files(room):
    return sorted((ROOT / room).rglob("*.py"))


def parse(path):
    return ast.parse(path.read_text())


def imported_modules(path):
    """Absolute names of what a file imports, `from x import y` as `x.y`, relative imports resolved."""
    package = ("esscher", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def listed(tree):
    """The names in a module's `__all__`, None if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return [element.value for element in node.value.elts]
    return None


def public(tree, kinds):
    names = listed(tree) or ()
    return [node for node in tree.body if isinstance(node, kinds) and node.name in names]


@pytest.mark.parametrize("path", sources(*ROOMS))
def test_rooms_import_only_what_the_design_allows(path):
    room = path.relative_to(ROOT).parts[0]
    own_folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} | {"laws"}
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        assert top not in own_folders - {"esscher"}, f"{module}: write esscher.{module}; the package never needs tests"
        if top == "esscher":
            target = rest.split(".")[0]
            assert target == room or target in MAY_IMPORT[room], f"{room} must not import {module}"


def test_the_import_check_sees_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "core").mkdir()
    path = tmp_path / "core" / "bad.py"
    path.write_text(
        "import esscher.models\nfrom esscher import samplers\nfrom ..objectives import score\nfrom . import x\n"
    )
    assert list(imported_modules(path)) == [
        "esscher.models", "esscher.samplers", "esscher.objectives.score", "esscher.core.x",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match=r"core must not import esscher\.models"):
        test_rooms_import_only_what_the_design_allows(path)


@pytest.mark.parametrize("path", sources(*LIBRARY))
def test_public_names_are_listed(path):
    tree = parse(path)
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    missing = set(names) - set(listed(tree) or ())
    assert not missing, f"not in __all__: {sorted(missing)}; list them, or start their names with an underscore"


@pytest.mark.parametrize("path", sources(*ROOMS))
def test_public_functions_are_typed(path):
    for function in public(parse(path), ast.FunctionDef):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [argument.arg for argument in every if argument is not None and argument.annotation is None]
        assert not bare, f"{function.name}: no annotation for {', '.join(bare)}"
        assert function.returns is not None, f"{function.name}: no annotation for what it returns"


@pytest.mark.parametrize("path", sources(*ROOMS))
def test_docstrings_of_public_names_open_with_a_sentence_on_one_line(path):
    for node in public(parse(path), (ast.FunctionDef, ast.ClassDef)):
        first, *rest = (ast.get_docstring(node) or "").split("\n")
        assert first.endswith((".", ":")), f"{node.name}: the first line is no sentence: {first!r}"
        assert not rest or not rest[0].strip(), f"{node.name}: a blank line must follow the first line"


@pytest.mark.parametrize("path", sources(*ROOMS, "tests"))
def test_modules_stay_readable(path):
    length = len(path.read_text().splitlines())
    assert length <= LONGEST, f"{length} lines: probably two families"


def test_every_package_is_listed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for room in ROOMS for path in files(room) if path.name == "__init__.py"]
    found = {"esscher", *(".".join(("esscher", *folder.relative_to(ROOT).parts)) for folder in folders)}
    assert set(packages) == found, "pyproject.toml lists other packages than the folders with an __init__.py"


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))

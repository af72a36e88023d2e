"""Who may import whom: the contracts of `pyproject.toml`, read by import-linter, and what it cannot say."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """All names that a file imports, at its top and within functions: `(module, name)`, or `(module, None)`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def short(path):
    return str(path.relative_to(ROOT))


def test_tests_and_benchmarks_do_not_import_each_other():
    """But for `tests/benchmarks`, which is about them."""
    own = {path.stem for path in sources("tests")} - {"__init__"}
    for path in sources("tests"):
        if path.parent != ROOT / "tests" / "benchmarks":
            assert not [module for module, _ in imports(path) if module.split(".")[0] == "benchmarks"], short(path)
    for path in sources("benchmarks"):
        found = {module.split(".")[0] for module, _ in imports(path)}
        assert not found & {"tests", *own}, short(path)


@pytest.mark.parametrize("path", sources("optimum_clp", "benchmarks"), ids=short)
def test_no_private_name_is_imported(path):
    for module, name in imports(path):
        ours = module.startswith((".", "optimum_clp", "benchmarks"))
        private = [part for part in (*module.split("."), name or "") if part.startswith("_") and part[:2] != "__"]
        assert not (ours and private), f"{module} {name}"

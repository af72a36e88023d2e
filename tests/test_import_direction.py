"""Who may import whom: the contracts of `pyproject.toml`, read by import-linter, and what it cannot say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
}
# a module, an import that it must not have, and the contract that says so
FORBIDDEN = [
    ("forward/hooks.py", "from ..tuning import endpoints", "house"),
    ("search/gate.py", "from ..tuning import rows", "house"),
    ("errors.py", "from . import segments\nfrom .surgery import sizes", "house"),
    ("exporters/rounding/matrices.py", "from ..graph import file", "exporters"),
    ("runtime/names.py", "from .causal_lm import OnnxCausalLM", "no-torch"),
    ("commands/tune.py", "def late():\n    import torch", "no-torch-in-commands"),
    ("pruner.py", "import benchmarks.demo", "product"),
]


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """All names that a file imports, at its top and within functions: `(module, name)`, or `(module, None)`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def lint(tree):
    """import-linter's exit status and what it prints, of a tree with the two packages and `pyproject.toml`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-c", LINTER, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def short(path):
    return str(path.relative_to(ROOT))


def test_contracts_are_kept():
    status, printed = lint(ROOT)
    assert status == 0, printed
    assert f"{len(CONTRACTS)} kept, 0 broken" in printed


def test_what_a_contract_forbids_is_found(tmp_path):
    for folder in ("optimum_clp", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda _, names: [n for n in names if n[0] == "."])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, line, _ in FORBIDDEN:
        with (tmp_path / "optimum_clp" / module).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    (tmp_path / "optimum_clp" / "cellar.py").write_text('"""A room that has no place."""\n', encoding="utf-8")
    status, printed = lint(tmp_path)
    assert status == 1
    assert {contract for _, _, contract in FORBIDDEN} == set(CONTRACTS)
    assert f"0 kept, {len(CONTRACTS)} broken" in printed
    for module, _, contract in FORBIDDEN:
        part = printed.split(f"\n{CONTRACTS[contract]}\n")[1]
        assert f"- optimum_clp.{module.removesuffix('.py').replace('/', '.')} -> " in re.sub(" +", " ", part)
    assert "- optimum_clp.cellar" in printed, "a room that has no place"


def test_tests_and_benchmarks_do_not_import_each_other():
    """But for `tests/benchmarks`, which is about them."""
    own = {path.stem for path in sources("tests")} - {"__init__"}
    for path in sources("tests"):
        if path.parent != ROOT / "tests" / "benchmarks":
            assert not [module for module, _ in imports(path) if module.split(".")[0] == "benchmarks"], short(path)
    for path in sources("benchmarks"):
        found = {module.split(".")[0] for module, _ in imports(path)}
        assert not found & {"tests", *own}, short(path)


def test_hooks_of_modules_are_registered_in_one_place():
    found = [short(path) for path in sources("optimum_clp") if "register_forward" in path.read_text(encoding="utf-8")]
    assert found == ["optimum_clp/forward/hooks.py"]


def test_a_package_is_described_by_its_docstring_alone():
    """One public page, `optimum_clp`; no other `__init__` has names of its own or of others."""
    for path in sources("optimum_clp"):
        if path.name == "__init__.py" and path.parent != ROOT / "optimum_clp":
            (only,) = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), short(path)


def test_no_private_name_is_imported():
    found = []
    for path in sources("optimum_clp", "benchmarks"):
        for module, name in imports(path):
            ours = module.startswith((".", "optimum_clp", "benchmarks"))
            private = [part for part in (*module.split("."), name or "") if re.match("_[^_]", part)]
            found += [f"{short(path)}: {module} {name or ''}"] if ours and private else []
    assert found == []

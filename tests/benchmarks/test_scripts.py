"""Every benchmark can be imported and run, and every configuration that it uses can be constructed."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from optimum_clp import CLPConfig
from optimum_clp.configuration.stages import STAGES

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.glob("benchmarks/**/*.py"))
}
MODULES = sorted(name for name in FILES if not name.endswith("__init__"))
SCRIPTS = [name for name in MODULES if '__name__ == "__main__"' in FILES[name].read_text(encoding="utf-8")]
CONFIGS = {kind.__name__: kind for kind in (CLPConfig, *STAGES.values())}


def is_construction(node):
    """Whether a call makes a configuration of ours: `SearchConfig(...)`, or `dataclasses.replace(config, ...)`."""
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return name.rpartition(".")[2] in CONFIGS or name == "dataclasses.replace"


def constructions(path):
    """Whether a configuration is made anywhere, and the first and last lines of the places within functions where one is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    calls = [node for function in functions for node in ast.walk(function) if is_construction(node)]
    return any(map(is_construction, ast.walk(tree))), {(node.lineno, node.end_lineno) for node in calls}


def traced(module, path, monkeypatch):
    """What `configurations()` gives, and the lines of the module that stood on the stack when one was made."""
    lines = set()

    def watched(plain):
        def __init__(self, *args, **kwargs):
            frame = sys._getframe()
            while frame is not None:
                if frame.f_code.co_filename == str(path):
                    lines.add(frame.f_lineno)
                frame = frame.f_back
            plain(self, *args, **kwargs)

        return __init__

    for kind in CONFIGS.values():
        monkeypatch.setattr(kind, "__init__", watched(kind.__init__))
    return module.configurations(), lines


def check(config):
    """By the rules of the whole configuration."""
    if isinstance(config, CLPConfig):
        config.validate()
    else:
        (stage,) = (name for name, kind in STAGES.items() if type(config) is kind)
        CLPConfig(**{stage: config})


def test_scripts_are_found():
    assert {"benchmarks.demo", "benchmarks.edge.speed", "benchmarks.search.compare"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", MODULES)
def test_every_configuration_that_a_script_uses_can_be_constructed(name, monkeypatch):
    module, (needed, places) = importlib.import_module(name), constructions(FILES[name])
    if not hasattr(module, "configurations"):
        assert not needed, f"{name} makes configurations and has no `configurations()`"
        return
    found, lines = traced(module, FILES[name], monkeypatch)
    assert found
    for config in found:
        check(config)
    missed = {place for place in places if not any(place[0] <= line <= place[1] for line in lines)}
    assert not missed, f"lines of {name} at which a configuration is made that `configurations()` does not make"


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_runs_nothing(name):
    """At module level: a docstring, imports, constants, definitions, and the call of `main`."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    docstring, *body, last = tree.body
    assert isinstance(docstring, ast.Expr) and f"python -m {name}" in ast.get_docstring(tree)
    assert [ast.unparse(node) for node in body if not isinstance(node, kinds)] == []
    assert ast.unparse(last).splitlines()[0] == "if __name__ == '__main__':"
    assert callable(importlib.import_module(name).main)


TEXTS = [
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/**/*.md"),
    *FILES.values(),
]
# a command may go on in further lines, each of which ends with a backslash but the last
COMMAND = re.compile(r"(?:python|\$\(PY\)) -m (benchmarks[\w.]*)((?:\\\n|[^\n`#])*)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_in_texts_name_scripts_and_options_that_exist(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bpython3? benchmarks/", text), (
        "a script of the package is run as `python -m benchmarks.NAME`"
    )
    for name, arguments in COMMAND.findall(text):
        if name == "benchmarks.NAME":
            continue
        assert name in SCRIPTS
        source = FILES[name].read_text(encoding="utf-8")
        assert [flag for flag in re.findall(r"(?<!\w)--[a-z-]+", arguments) if f'"{flag}"' not in source] == []

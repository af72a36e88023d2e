"""That the commands are found where `optimum-cli` looks, and that they start without torch and transformers."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from optimum_clp.commands.clp import COMMANDS, main
from optimum_clp.commands.optimum_cli import CLPCommand

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "onnxruntime", "datasets", "matplotlib")


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "code",
    [
        "import optimum_clp.commands",
        "import optimum_clp.commands.optimum_cli",
        "from optimum_clp.commands.clp import main\nmain(['--help'])",
        "from optimum_clp.commands.clp import main\nmain(['prune', '--help'])",
        "from optimum_clp.commands.clp import main\nmain(['prune', '--help-all'])",
        "from optimum_clp.commands.clp import main\nmain(['prune', '--epochs', 'x'])",
        "from optimum_clp.commands.clp import main\nassert main(['prune', '--model', 'm', '--epochs', '0', 'out']) == 1",
        "from optimum_clp.commands.clp import main\nassert main(['tune', '--model', 'm', '--loss', 'mse', 'out']) == 1",
    ],
)
def test_help_and_import_are_light(code):
    check = f"import sys, atexit\natexit.register(lambda: print('loaded', [m for m in {HEAVY} if m in sys.modules]))\n"
    done = run_python(check + code)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stdout + done.stderr


def optimum_cli(line):
    """What `optimum.commands.optimum_cli.main` does, without looking for other packages' commands."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(CLPCommand, parent_command=root)
    args = root.parser.parse_args(line.split())
    args.func(args).run()


def test_optimum_cli_runs_the_same_commands(pruner, tmp_path, capsys):
    optimum_cli("clp prune --model m --weights int8 int4 out")
    name, config, folder, _ = pruner.calls[-1]
    assert (name, folder, config.quantization.weights) == ("prune", tmp_path / "out", ["int8", "int4"])
    assert "Written to out." in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_optimum_cli_has_every_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        optimum_cli(f"clp {name} --help")
    assert stopped.value.code == 0
    assert COMMANDS[name].EXAMPLE.split()[2] in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_three_ways_to_call_it_say_the_same(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["optimum-clp", name, "--help"])
    said = []
    for call in (
        main,
        lambda: runpy.run_module("optimum_clp", run_name="__main__"),
        lambda: optimum_cli(f"clp {name} --help"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call()
        assert stopped.value.code == 0
        usage, rest = capsys.readouterr().out.split("\n", 1)
        said.append((re.sub(r"^usage: optimum-(clp|cli clp) ", "", usage), rest))
    assert said[0] == said[1] == said[2] and said[0][0].startswith(f"{name} ")


def test_optimum_cli_ends_with_the_exit_status(pruner, capsys):
    with pytest.raises(SystemExit) as stopped:
        optimum_cli("clp prune --model m --epochs 0 out")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("optimum-clp: error: tuning.epochs is 0")


def test_optimum_cli_without_a_command_prints_the_help(capsys):
    optimum_cli("clp")
    assert "Continuous layer pruning" in capsys.readouterr().out


def test_register_folder_is_a_namespace():
    assert [p.name for p in (ROOT / "optimum_clp" / "_register").glob("*.py")] == ["register_clp.py"]
    spec = importlib.util.spec_from_file_location(
        "register_clp", ROOT / "optimum_clp" / "_register" / "register_clp.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.REGISTER_COMMANDS == [CLPCommand]


def registered():
    try:
        return importlib.util.find_spec("optimum.commands.register.register_clp") is not None
    except ModuleNotFoundError:  # no package has the folder
        return False


@pytest.mark.slow
@pytest.mark.skipif(not registered(), reason="needs an installed package, not only an importable one")
def test_installed_optimum_cli_lists_the_commands():
    done = run_python(
        "import sys; sys.argv = ['optimum-cli', 'clp', '--help']; from optimum.commands.optimum_cli import main; main()"
    )
    assert done.returncode == 0, done.stderr
    assert f"{{{','.join(COMMANDS)}}}" in done.stdout


@pytest.mark.slow
def test_wheel_holds_the_register_file_and_no_namespace_init(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "optimum_clp", source / "optimum_clp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = tmp_path.glob("optimum_clp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "optimum-clp = optimum_clp.commands.clp:main" in entry_points
    assert {n for n in names if n.startswith("optimum/")} == {"optimum/commands/register/register_clp.py"}
    modules = {
        str(p.relative_to(source)) for p in (source / "optimum_clp").rglob("*.py") if "_register" not in p.parts
    }
    assert modules == {n for n in names if n.startswith("optimum_clp/") and n.endswith(".py")}
    assert names >= {f"optimum_clp/{name}" for name in ("py.typed", "evaluation/prompts.jsonl")}
    parts = {str(p.relative_to(source)) for p in (source / "optimum_clp").rglob("page.*") if p.suffix != ".py"}
    assert parts and names >= parts

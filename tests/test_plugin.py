"""The doors: an installed package adds one of each kind, without a line changed here.

`tests/plugin` is that package. It is installed by pip into a folder of its own, and everything runs in processes that see
that folder.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from optimum_clp.doors import RUNTIMES

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NAMES = ("toy_first", "toy_squared", "toy_damped", "toy_coarse", "toy_reader", "toy_llama")
MAKE_MODEL = """
import sys
from optimum_clp_toy.architecture import ToyLlamaConfig, ToyLlamaForCausalLM
from tiny_models import tiny_config, tiny_tokenizer
import torch
torch.manual_seed(0)
values = {k: v for k, v in tiny_config(num_layers=6).to_dict().items() if k not in ("model_type", "architectures")}
ToyLlamaForCausalLM(ToyLlamaConfig(**values)).eval().save_pretrained(sys.argv[1])
tiny_tokenizer().save_pretrained(sys.argv[1])
"""
LIGHT = """
import atexit, sys
from optimum_clp.commands.clp import main
atexit.register(lambda: print([m for m in ("torch", "transformers", "optimum_clp_toy") if m in sys.modules]))
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package, installed."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(TESTS / "plugin", folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    command = [sys.executable, "-m", "pip", "install", *options, str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"


def run(site, *arguments):
    """A process that sees the package; what it has printed."""
    path = [str(site), str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def output(site, tmp_path_factory):
    """The folder of a run of all six."""
    folder = tmp_path_factory.mktemp("run")
    made = run(site, "-c", MAKE_MODEL, str(folder / "dense"))
    assert made.returncode == 0, made.stderr
    command = (
        "--quiet --pruning-ratio 0.34 --strategy toy_first --loss toy_squared=1 --init toy_damped --method toy_coarse"
    )
    rows = "--sequence-length 16 --train-sequences 16 --validation-sequences 4 --test-sequences 2 --epochs 1"
    places = ["--text-cache-dir", str(folder / "cache"), "--model", str(folder / "dense"), str(folder / "out")]
    done = run(site, "-m", "optimum_clp.commands.clp", "prune", *command.split(), *rows.split(), *places)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_help_shows_them_and_imports_none(site):
    done = run(site, "-c", LIGHT, "prune", "--help-all")
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f"{name}: of the package optimum-clp-toy" in " ".join(done.stdout.split()), name
    assert done.stdout.splitlines()[-1] == "[]"


def test_their_names_are_listed_where_one_is_not_valid(site):
    given = "search={'strategy': 'toy_last'}, tuning={'loss': 'toy_cubed', 'init': 'toy_wet'}, quantization={'method': 'toy'}"
    done = run(site, "-c", f"from optimum_clp import CLPConfig; CLPConfig({given})")
    assert done.returncode == 1
    for name, known in (
        ("search.strategy is 'toy_last'", "'toy_first'"),
        ("tuning.loss is 'toy_cubed'", "'toy_squared'"),
        ("tuning.init is 'toy_wet'", "'toy_damped'"),
        ("quantization.method is 'toy'", "'toy_coarse'"),
    ):
        (line,) = [line for line in done.stderr.splitlines() if name in line]
        assert "it must be" in line and known in line


def test_each_stands_in_the_report(output):
    report = json.loads((output / "clp_report.json").read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "docs" / "clp_report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["base_model"]["model_type"] == "toy_llama"
    assert report["search"]["strategy"] == report["search"]["used_strategy"] == "toy_first"
    assert report["search"]["segments"] == [[0, 2]]
    assert report["tuning"]["loss"] == {"toy_squared": 1.0}
    assert report["tuning"]["init"]["method"] == "toy_damped"
    assert [file["rounding"] for file in report["export"]["files"]] == [None, "toy_coarse", "toy_coarse"]
    assert report["export"]["runtimes"] == dict.fromkeys([*RUNTIMES, "toy_reader"])


def test_each_has_done_its_work(output):
    assert json.loads((output / "toy.json").read_text()) == {"file": "onnx/model_q4.onnx", "layers": 4}
    report = json.loads((output / "clp_report.json").read_text(encoding="utf-8"))
    errors = [file["max_relative_error"] for file in report["export"]["files"]]
    assert errors[0] < 1e-4 < errors[1] < errors[2]


def test_the_checkpoint_is_read_by_stock_classes_that_its_package_has_registered(site, output):
    code = (
        "import optimum_clp_toy.architecture, sys; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(type(model).__name__, model.config.num_hidden_layers)"
    )
    done = run(site, "-c", code, str(output))
    assert done.stdout.split() == ["ToyLlamaForCausalLM", "4"], done.stderr


def test_the_contract_tests_take_them_in(site):
    """Each kind's contract test runs over the registry, so an installed package's are held to it too."""
    files = [
        "search/test_strategy_contract.py",
        "tuning/test_loss_contract.py",
        "tuning/test_start_contract.py",
        "exporters/rounding/test_method_contract.py",
        "exporters/runtimes/test_runtime_contract.py",
    ]
    paths = [str(TESTS / file) for file in files]
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "toy_", *paths)
    assert done.returncode == 0, done.stdout[-3000:]

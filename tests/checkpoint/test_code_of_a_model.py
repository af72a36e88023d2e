"""Models that come with code (`auto_map`): the code goes along where it was trusted, and is named nowhere where it was not."""

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_model

from optimum_clp import LayerSegment
from optimum_clp.architecture.table import Architecture
from optimum_clp.checkpoint.loading import load_model
from optimum_clp.checkpoint.saving import save_checkpoint, save_configs, verify_checkpoint
from optimum_clp.doors import ARCHITECTURES
from optimum_clp.errors import ModelError
from optimum_clp.surgery.cut import cut_model

CODE = ["configuration_mine.py", "helper_mine.py", "modeling_mine.py"]


@pytest.fixture(params=["llama", "mine_of_tests"])
def folder(request, tmp_path, monkeypatch):
    """A checkpoint with code of its own, of a type that transformers knows too, and of one that it does not."""
    path = tmp_path / "model"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    tiny_model().save_pretrained(path)
    (path / "helper_mine.py").write_text("SCALE = 1\n")
    (path / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        f"class MineConfig(LlamaConfig):\n    model_type = {request.param!r}\n"
    )
    (path / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n"
        "from .helper_mine import SCALE\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n    scale = SCALE\n"
    )
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": request.param,
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    if request.param not in ARCHITECTURES and request.param != "llama":
        ARCHITECTURES.register(request.param, Architecture(request.param))
    return path


def read_by_another_process(folder, trust):
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})\n"
        "print(type(m).__name__, m.config.num_hidden_layers)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_trusted_code_goes_along(folder, tmp_path):
    smaller = cut_model(load_model(folder, trust_remote_code=True, quiet=True), [LayerSegment(2, 4)])
    out = tmp_path / "out"
    save_checkpoint(smaller, None, out)
    verify_checkpoint(out, smaller)
    assert sorted(path.name for path in out.glob("*.py")) == CODE
    assert read_by_another_process(out, True) == ["MineForCausalLM", "4"]


def test_code_that_was_not_trusted_is_not_named(folder, tmp_path):
    if json.loads((folder / "config.json").read_text())["model_type"] != "llama":
        with pytest.raises(ModelError, match="needs code that comes with the model, and trust_remote_code is False"):
            load_model(folder, quiet=True)
        return
    model = load_model(folder, quiet=True)
    named = dict(model.config.auto_map)
    smaller = cut_model(model, [LayerSegment(2, 4)])
    out = tmp_path / "out"
    save_checkpoint(smaller, None, out)
    verify_checkpoint(out, smaller)
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert not list(out.glob("*.py"))
    assert read_by_another_process(out, False) == ["LlamaForCausalLM", "4"]
    (tmp_path / "configs").mkdir()
    assert "auto_map" not in save_configs(smaller, tmp_path / "configs")
    assert model.config.auto_map == named

"""Every command of ours and every Python block in README, docs and a model card runs, on small models, page by page.

A page runs in a folder in which `Qwen/Qwen3-0.6B` and its like are folders with small models, so that what is run is what is
read. Amounts of text are small, a budget is two seconds and a size 70 kB; nothing else is changed. Commands of `accelerate launch` run in one
process, and the CPU stands in for an accelerator. What is not run: installation, `make`, benchmarks, `pytest` (`test_page_commands.py` checks them), and other languages.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tomllib
import types
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
from chat_templates import chat_tokenizer
from page_blocks import PAGES, ROOT, blocks, commands, name_of, own_arguments
from tiny_models import make_identity, tiny_model

from optimum_clp import CLPConfig, doors
from optimum_clp.commands.clp import build_parser, main
from optimum_clp.configuration.stages import STAGES
from optimum_clp.planning import plan, speed_target
from optimum_clp.planning.speed import LayerTimes
from optimum_clp.registry import Registry

pytestmark = pytest.mark.slow

MODELS = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct")
# what a page may take for granted: folders that were made before
MADE = ("qwen3-0.6b-clp20", "me/qwen3-0.6b-clp20", "smollm2-chat")
SMALL = {
    "calibration": {
        "sequence_length": 64,
        "train_sequences": 16,
        "validation_sequences": 2,
        "test_sequences": 2,
        "generation_batch_size": 16,
    },
    "search": {"num_sequences": 4, "batch_size": 4},
    "tuning": {"hidden_epochs": 1, "batch_size": 4},
    "quantization": {"calibration_sequences": 4},
    "evaluation": {"num_prompts": 2, "max_new_tokens": 8},
}
# pages of many runs, whose ONNX files nobody reads: none are written, as tracing is most of a small run's time
WITHOUT_FILES = ("docs/how_to/chat_models.md", "docs/how_to/own_data.md", "docs/how_to/several_gpus.md")
# programs that a block needs and that need not be installed
OPTIONAL = ("onnxruntime_genai", "optimum.onnxruntime", "openvino", "ctranslate2")
# a task of lm-eval is this one, by the name that the page has
DEFINITION = r"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = "Once upon a time there was a fox, and it had seven apples in a basket. It went home before the rain came.\n"
RECIPES = {
    "strategies": lambda name: {"search": {"strategy": name}},
    "starts": lambda name: {"tuning": {"init": name}},
    "losses": lambda name: {"tuning": {"loss": name}},
    "roundings": lambda name: {"quantization": {"method": name}},
    "runtimes": lambda name: {},
}
OURS = [page for page in PAGES if "benchmarks" not in page.parts and "contribute" not in page.parts]
TO_RUN = [
    page
    for page in OURS
    if any(
        language == "python" or (language == "bash" and any(map(own_arguments, commands(code))))
        for language, code in blocks(page.read_text(encoding="utf-8"))
    )
]
GUIDES = sorted(ROOT.glob("docs/contribute/*.md"))


@contextlib.contextmanager
def small_amounts(**more):
    """Defaults of the settings are small ones, and every budget is two seconds."""
    with contextlib.ExitStack() as stack:
        for stage, amounts in {**SMALL, **more}.items():
            plain = STAGES[stage].__init__

            def __init__(self, *args, _plain=plain, _amounts=amounts, **kwargs):
                _plain(self, *args, **{**_amounts, **kwargs})

            stack.enter_context(mock.patch.object(STAGES[stage], "__init__", functools.wraps(plain)(__init__)))
        whole = CLPConfig.__init__

        def init(self, *args, **kwargs):
            if kwargs.get("budget"):
                kwargs["budget"] = 2
            if kwargs.get("target_size_mb"):
                kwargs["target_size_mb"] = 0.07  # of the small models' files
            if kwargs.get("target_tokens_per_second"):
                kwargs["target_tokens_per_second"] = 130  # 2 of their 5 layers must go for it, as below
            whole(self, *args, **kwargs)

        stack.enter_context(mock.patch.object(CLPConfig, "__init__", functools.wraps(whole)(init)))
        for module in (plan, speed_target):
            stack.enter_context(
                mock.patch.object(module, "layer_times", lambda *_, **__: LayerTimes(0.004, 0.001, 5, 1))
            )
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder that every page finds: models, texts, and what a first run has left."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = chat_tokenizer()
    # two layers do nothing, so that a quality budget lets some go
    model = make_identity(tiny_model(num_layers=5, vocab_size=len(tokenizer), max_position_embeddings=448), (2, 3))
    for name in MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("corpus.txt", "other.txt", "train.txt", "test.txt"):
        (folder / name).write_text(TEXT * 150, encoding="utf-8")
    talk = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes."}]
    rows = {
        "corpus.jsonl": [{"body": TEXT}] * 150,
        "chats.jsonl": [{"messages": talk}] * 200,
        "prompts.jsonl": [{"messages": talk[:1], "kind": "facts"}, {"prompt": "What is 6 + 7?", "kind": "arithmetic"}],
        "piqa.jsonl": [
            {"query": f"Question: Is ice cold{'?' * n}", "choices": ["yes", "no"], "gold": 0} for n in range(1, 9)
        ],
        "lambada.jsonl": [{"context": "She opened the", "continuation": "door"}] * 3,
    }
    rows["prompts.jsonl"][1]["answer"] = "13"
    for name, values in rows.items():
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    with contextlib.chdir(folder), small_amounts():
        model, made = MODELS[0], MADE[0]
        assert main(["prune", "--quiet", "--text-cache-dir", "cache", "--model", model, made]) == 0
    for name in MADE[1:]:
        shutil.copytree(folder / MADE[0], folder / name)
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """A page's own folder, with nothing in it that the page makes itself; no network."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    load, given = datasets.load_dataset, datasets.Dataset.from_dict({"text": [TEXT] * 150})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: load(**k) if k.get("path") == "json" else given)
    # for the pages that name one
    monkeypatch.setattr("optimum_clp.checkpoint.on_device.accelerator", lambda number: torch.device("cpu"))
    sent = mock.Mock(repo_id="me/qwen3-0.6b-clp20")
    monkeypatch.setattr("optimum_clp.report.hub_access.check_upload", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: sent)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *a, **k: "https://example.org/commit")
    with small_amounts():
        yield folder


def run_command(command):
    """A command of ours; it ends well."""
    arguments = own_arguments(command)
    if arguments == ["--version"]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    elif arguments is not None and arguments[0] == "chat":  # what the page asks is asked in the terminal
        with mock.patch.object(sys, "stdin", io.StringIO("Is ice cold?\n")):
            assert main([*arguments, "--no-browser", "--quiet", "--max-new-tokens", "8"]) == 0
    elif arguments is not None:
        names = build_parser().parse_args(arguments)
        named = [name for name in getattr(names, "evaluation.tasks", None) or () if "=" not in name]
        if named and not installed("lm_eval"):
            return
        if named:
            os.makedirs("definitions", exist_ok=True)
            for name in named:
                text = DEFINITION.format(name=name, rows=os.path.abspath("piqa.jsonl"))
                Path("definitions", f"{name}.yaml").write_text(text, encoding="utf-8")
            arguments = [*arguments, "--tasks-dir", "definitions"]
        assert main([*arguments, *([] if "--quiet" in arguments else ["--quiet"])]) == 0, " ".join(command)


def run_python(code, page, namespace):
    needed = re.findall(r"^(?:import|from) ([\w.]+)", code, re.MULTILINE)
    if any(name.startswith(other) and not installed(other) for name in needed for other in OPTIONAL):
        return
    exec(compile(code, page, "exec"), namespace)


def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.notices
@pytest.mark.parametrize("page", TO_RUN, ids=name_of)
def test_a_page_runs(page, workplace):
    text = page.read_text(encoding="utf-8")
    for name in MADE:  # a page that makes it itself finds none
        made = rf"""(prune .*\s{name}( +#.*)?$|save_directory="{name}")"""
        if re.search(made, text.replace("\\\n", " "), re.MULTILINE):
            shutil.rmtree(name)
    with small_amounts(export={"enabled": False}) if name_of(page) in WITHOUT_FILES else contextlib.nullcontext():
        run_page(text, name_of(page))
    if page.name == "README.md":
        run_card(workplace / "qwen3-0.6b-clp20")


def run_page(text, name):
    namespace = {"__name__": "page"}
    for language, code in blocks(text):
        if language == "python":
            run_python(code, name, namespace)
        elif language == "yaml" and (file := re.match(r"# (\S+\.yaml)\n", code)):
            Path(file[1]).write_text(code + "\n", encoding="utf-8")
        elif language == "bash":
            for command in commands(code):
                arguments = own_arguments(command) or []
                if (
                    arguments
                    and os.path.isdir(arguments[-1])
                    and arguments[0] in {"prune", "tune", "export", "quantize"}
                ):
                    shutil.rmtree(arguments[-1])  # made by another block of the page
                run_command(command)


def run_card(folder):
    """What the model card says, with the place that it leaves open filled in."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    codes = [code for language, code in blocks(card) if language == "python"]
    assert len(codes) >= 2
    for code in codes:
        run_python(code.replace("path/to/this/folder", str(folder)), "card", {})


@pytest.mark.notices
@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_guide_for_contributors_runs(page, workplace, monkeypatch):
    """Its module under the name that its `pyproject.toml` gives it, its registration, and a run with it."""
    found = blocks(page.read_text(encoding="utf-8"))
    (points,) = (tomllib.loads(code)["project"]["entry-points"] for language, code in found if language == "toml")
    ((group, entries),) = points.items()
    ((name, target),) = entries.items()
    module, _, attribute = target.partition(":")
    codes = [code for language, code in found if language == "python"]
    made = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, made)
    exec(compile(codes[0], f"{module}.py", "exec"), made.__dict__)
    door = next(d for d in vars(doors).values() if isinstance(d, Registry) and d.group == group)
    monkeypatch.setattr(door, "_rows", dict(door._rows))
    kind = group.rpartition(".")[2]
    namespace = {**made.__dict__} if kind == "architectures" else dict(vars(doors))
    for place in re.findall(r'"(optimum_clp[\w.]+):', codes[1]):
        monkeypatch.setitem(sys.modules, place, made)
    for code in codes[1:]:
        exec(compile(code, name_of(page), "exec"), namespace)
    if kind == "architectures":
        assert namespace["smaller"].config.num_wide_layers == 1
        return
    assert door.get(name) is getattr(made, attribute)
    small = {"weights": ["int4"]}
    settings = RECIPES[kind](name)
    settings["quantization"] = {**small, **settings.get("quantization", {})}
    settings["export"] = {"enabled": kind in {"roundings", "runtimes"}}
    settings["evaluation"] = {"generation": False}
    torch.manual_seed(0)
    pruner = importlib.import_module("optimum_clp.pruner").CLPPruner.from_pretrained(MODELS[0], quiet=True)
    pruner.prune(CLPConfig(0.34, calibration={"cache_dir": "cache"}, **settings), "made")
    report = json.dumps(pruner.report.to_dict())
    assert f'"{name}"' in report and not pruner.report.failures


def test_the_pages_are_found():
    names = {name_of(page) for page in TO_RUN}
    assert {"README.md", "docs/tutorial.md", "docs/runtimes.md", "docs/how_to/own_data.md", "docs/cli.md"} <= names
    assert len(GUIDES) == 6

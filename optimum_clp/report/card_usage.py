"""How to use what lies in an output folder, as code for a model card: in the form that fits the model and its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..precisions import PRECISIONS
from .report import CLPReport

QUESTION, BEGINNING = "What is the capital of Japan?", "Once upon a time"
_MESSAGES = f'messages = [{{"role": "user", "content": "{QUESTION}"}}]'
_NEW_TOKENS = 128


def usage(report: CLPReport, model_name: str | None, folder: Path) -> str:
    """The section of the card; empty without a file to use.

    Args:
        report ([`CLPReport`]): What was exported, and for which runtimes.
        model_name (`str` or `None`): What the examples load: a Hub id, or a folder's name.
        folder (`Path`): The output folder.
    """
    name, chat = model_name or "path/to/this/folder", is_chat_model(report, folder)
    from_hub = "/" in (model_name or "")
    export: dict[str, Any] = report.to_dict()["export"] or {}
    files, runtimes = export.get("files", []), export.get("runtimes", {})
    # of two with as few bits the first: the other is for graphics processors
    smallest: dict[str, Any] = min(files, key=lambda entry: PRECISIONS[entry["weights"]].bits, default={})
    quanto = [entry["folder"] for entry in report.quantization or []]
    parts: list[str] = []
    if any(folder.glob("*.safetensors")):
        load = f'model = AutoModelForCausalLM.from_pretrained("{name}")'
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        parts += ["With transformers alone:", _python(imports, [load, *_generation(f'"{name}"', chat)])]
    hub = ["from huggingface_hub import snapshot_download"] if from_hub else []
    place = f'folder = snapshot_download("{name}")' if from_hub else f'folder = "{name}"'
    if files:
        imports = [*hub, "from optimum_clp import OnnxCausalLM", "from transformers import AutoTokenizer"]
        load = f'model = OnnxCausalLM.from_pretrained(folder, "{smallest["file"]}")'
        least = smallest.get("least_onnxruntime")
        runtime = "ONNX Runtime" if least is None else f"ONNX Runtime {least} or later"
        parts += [f"In {runtime}, with optimum-clp:", _python(imports, [place, load, *_generation("folder", chat)])]
    if runtimes.get("genai", "not asked") is None:
        parts += ["In onnxruntime-genai, which reads `genai_config.json`:", _genai(hub, place, chat)]
    if from_hub and files and runtimes.get("transformers_js", "not asked") is None:
        parts += ["In transformers.js:", _transformers_js(name, smallest["weights"], chat)]
    if quanto:
        imports = [*hub, "from optimum_clp.quantization import load_quantized"]
        load = f'model = load_quantized(f"{{folder}}/{quanto[0]}")'
        parts += ["With optimum-quanto's weights, through optimum-clp:", _python(imports, [place, load])]
    broken = bool(report.type_rule_broken())
    # of all kinds that alternate, windows alone are what a file can tell llama.cpp of
    if any(folder.glob("*.safetensors")) and (not broken or _has_windows(folder)):
        parts += [
            "llama.cpp has a converter for checkpoints of this kind; it was not run on this one:",
            _llama_cpp(name, from_hub, chat, broken),
        ]
    if files or any(folder.glob("*.safetensors")):
        parts += ["Side by side with the dense model, on a local page:", _code("bash", f"optimum-clp chat {name}")]
    return "\n\n".join(["## Use", *parts]) if parts else ""


def is_chat_model(report: CLPReport, folder: Path) -> bool:
    """Whether a model is asked through a chat template: it was when it was measured, or its tokenizer has one."""
    generation = (report.evaluation or {}).get("generation") or {}
    if generation:
        return generation["asked"] == "chat"
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _generation(source: str, chat: bool) -> list[str]:
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({source})"
    if not chat:
        return [
            tokenizer,
            f'inputs = tokenizer("{BEGINNING}", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    return [
        tokenizer,
        _MESSAGES,
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        f"output = model.generate(**inputs, max_new_tokens={_NEW_TOKENS})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _genai(hub: Sequence[str], place: str, chat: bool) -> str:
    template = [_MESSAGES, "prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)"]
    return _python(
        [*(["import json", ""] if chat else []), "import onnxruntime_genai as og", *hub],
        [
            place,
            "model = og.Model(folder)",
            "tokenizer = og.Tokenizer(model)",
            *(template if chat else [f'prompt = "{BEGINNING}"']),
            "params = og.GeneratorParams(model)",
            "params.set_search_options(max_length=256)",
            "generator = og.Generator(model, params)",
            "generator.append_tokens(tokenizer.encode(prompt))",
            "stream = tokenizer.create_stream()",
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            '    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)',
        ],
    )


def _transformers_js(name: str, weights: str, chat: bool) -> str:
    asked = json.dumps([{"role": "user", "content": QUESTION}] if chat else BEGINNING)
    said = "output[0].generated_text.at(-1).content" if chat else "output[0].generated_text"
    device = 'device: "webgpu", ' if PRECISIONS[weights].floats == 16 else ""
    return _code(
        "js",
        'import { pipeline } from "@huggingface/transformers";',
        "",
        f'const generate = await pipeline("text-generation", "{name}", {{ {device}dtype: "{PRECISIONS[weights].transformers_js}" }});',
        f"const output = await generate({asked}, {{ max_new_tokens: {_NEW_TOKENS} }});",
        f"console.log({said});",
    )


def _has_windows(folder: Path) -> bool:
    try:
        return "sliding_attention" in json.loads((folder / "config.json").read_text(encoding="utf-8"))["layer_types"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _llama_cpp(name: str, from_hub: bool, chat: bool, broken: bool) -> str:
    # a model with a template begins a conversation by itself
    asked = "" if chat else f' -no-cnv -p "{BEGINNING}"'
    folder = "folder" if from_hub else name
    convert = [
        *([f"hf download {name} --local-dir folder"] if from_hub else []),
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf",
    ]
    if not broken:
        return _code("bash", *convert, f"llama-cli -m model.gguf{asked}")
    # docs/runtimes.md has the same, with what it was checked by
    told = _python(
        [
            "import json",
            "",
            "from gguf import GGUFReader, GGUFWriter",
            "from gguf.scripts.gguf_new_metadata import copy_with_new_metadata",
        ],
        [
            f'kinds = json.load(open("{folder}/config.json"))["layer_types"]',
            'reader = GGUFReader("model.gguf")',
            'writer = GGUFWriter("told.gguf", reader.get_field("general.architecture").contents())',
            'writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])',
            "copy_with_new_metadata(reader, writer, {}, [])",
        ],
    )
    which = "Its file has to be told which layers have a window, or they are wrong (`pip install gguf`):"
    return "\n\n".join([_code("bash", *convert), which, told, _code("bash", f"llama-cli -m told.gguf{asked}")])


def _python(imports: Sequence[str], lines: Sequence[str]) -> str:
    return _code("python", *imports, "", *lines)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])

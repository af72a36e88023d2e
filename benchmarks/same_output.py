"""Hashes of what a few seeded runs write: equal before and after a change that must not change behaviour.

    export OMP_NUM_THREADS=1
    python -m benchmarks.same_output --model FOLDER --text FILE --out before.json
    python -m benchmarks.same_output --model FOLDER --text FILE --out after.json --expect before.json

An older checkout that lacks this file runs it by its path: `PYTHONPATH=CHECKOUT python same_output.py ...`.

Weights, tokenizer files and plots are hashed byte for byte; ONNX files with their nodes and stored tensors sorted; JSON
files after times, speeds, versions and the name of the machine are taken out of them. The model card, whose text shows
speeds, is left out. Hashes are the same on one machine, with one number of threads and one set of versions.
"""

import argparse
import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from optimum_clp import CLPConfig, CLPPruner

TEXT: dict[str, Any] = {"sequence_length": 64, "train_sequences": 24, "validation_sequences": 8, "test_sequences": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {"pruning_ratio": 0.2, "quantization": {"quanto": True}, "tuning": {"epochs": 2}},
    "gate-qdq": {
        "pruning_ratio": 0.2,
        "search": {"strategy": "gate", "num_sequences": 8},
        "tuning": {"epochs": 1, "init": "fold", "loss": {"kd": 0.7, "ce": 0.1, "hidden": 0.2}, "endpoint_width": 2},
        "quantization": {"method": "hqq", "weights": ["int4"]},
        "export": {"format": "qdq"},
    },
    "budget": {
        "pruning_ratio": 0.4,
        "num_segments": 2,
        "search": {"strategy": "block_influence"},
        "tuning": {"epochs": 1, "init": "none", "train_final_norm": True},
        "quantization": {"bits_per_weight": 5.5, "weights": ["int4"], "calibration_sequences": 8},
    },
}
# in the others the dense model writes its own text
GIVEN_TEXT = ("gate-qdq",)
# keys of a JSON file with one of these words differ between two runs of one program
VOLATILE = (
    "seconds",
    "per_second",
    "version",
    "created",
    "environment",
    "name_or_path",
    "cache_dir",
    "source",
    "text",
)


def configurations() -> list[CLPConfig]:
    return [configuration(name, "train.txt", "cache") for name in RECIPES]


def configuration(name: str, text: str, cache: str) -> CLPConfig:
    """A recipe by its name, on `text` if it is one of those that are given some."""
    calibration = {**TEXT, "dataset": text if name in GIVEN_TEXT else None, "cache_dir": cache}
    return CLPConfig(**RECIPES[name], calibration=calibration, seed=3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense model: a folder")
    parser.add_argument("--text", required=True, help="text for the recipes that are given some")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--expect", type=Path, help="JSON file of an earlier run to compare with")
    parser.add_argument(
        "--added", nargs="+", default=[], metavar="KEY", help="keys of JSON files that came later, and are left out"
    )
    args = parser.parse_args()
    found = {}
    for name in RECIPES:
        found[name] = run(name, args.model, args.text, args.added)
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.expect is None:
        return 0
    different = differences(json.loads(args.expect.read_text(encoding="utf-8")), found)
    print("\n".join(different) or f"the same: {sum(map(len, found.values()))} files of {len(found)} recipes")
    return 1 if different else 0


def run(name: str, model: str, text: str, added: Sequence[str] = ()) -> dict[str, str]:
    """Prune a model by a recipe, and hash every file of the output folder."""
    with tempfile.TemporaryDirectory() as parent:
        output = Path(parent) / "output"
        pruner = CLPPruner.from_pretrained(model, quiet=True)
        pruner.prune(configuration(name, text, f"{parent}/cache"), output)
        files = sorted(file for file in output.rglob("*") if file.is_file() and file.name != "README.md")
        return {str(file.relative_to(output)): digest(file, added) for file in files}


def differences(expected: dict[str, dict[str, str]], found: dict[str, dict[str, str]]) -> list[str]:
    """A line for each file that is not what was expected."""
    lines = []
    for name in sorted({*expected, *found}):
        before, now = expected.get(name, {}), found.get(name, {})
        changed = [file for file in sorted({*before, *now}) if before.get(file) != now.get(file)]
        lines += [f"{name}/{file}: {before.get(file)} before, {now.get(file)} now" for file in changed]
    return lines


def digest(file: Path, added: Sequence[str] = ()) -> str:
    """The hash of a file, of a JSON file without what is volatile in it and without keys that came later."""
    content = file.read_bytes()
    if file.suffix == ".onnx":
        content = graph_content(file)
    if file.suffix == ".json":
        content = json.dumps(lasting(json.loads(content), added), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def graph_content(file: Path) -> bytes:
    """An ONNX file with nodes and stored tensors sorted: their order means nothing as long as nodes are connected alike."""
    model = onnx.load(file)
    for part in (model.graph.node, model.graph.initializer, model.graph.value_info):
        # copies: what is still in the list dies with it
        entries = sorted(map(copy.copy, part), key=lambda entry: entry.SerializeToString(deterministic=True))
        del part[:]
        part.extend(entries)
    return model.SerializeToString(deterministic=True)


def lasting(value: Any, added: Sequence[str] = ()) -> Any:
    """A JSON value without the keys that have a word of [`VOLATILE`], or are `added`."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in added and not any(word in k for word in VOLATILE)}
        return {k: lasting(v, added) for k, v in kept.items()}
    return [lasting(item, added) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())

"""What a search layer by layer costs beside a search with every weight in memory: layers that run, and seconds of the processor.

    OMP_NUM_THREADS=1 python -m benchmarks.offload.search_cost MODEL [--turns 2]

MODEL is what `benchmarks.offload.model` wrote. Both ways take turns, each in a process of its own with a cache of its own. Every call of a
layer is counted, times its rows. Prints one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.offload.stages import recipe
from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.calibration.rows import load_calibration
from optimum_clp.forward.layer_major import Residence
from optimum_clp.search.recipe import search_by_recipe

WAYS = ("resident", "layer by layer")


def configurations() -> list[CLPConfig]:
    return [recipe("text.txt", "cache", None)]


class LayerRuns:
    """Counts the rows that go through layers of LLaMA's shape while a block runs."""

    def __enter__(self) -> "LayerRuns":
        self.rows, self._forward = 0, LlamaDecoderLayer.forward

        def counted(layer: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows += len(hidden)
            return self._forward(layer, hidden, *args, **kwargs)

        LlamaDecoderLayer.forward = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        LlamaDecoderLayer.forward = self._forward  # type: ignore[method-assign]


def one_search(model: PreTrainedModel, tokenizer: Any, text: str, way: str) -> dict[str, Any]:
    """A search of the strategy `auto`, without its trial cut."""
    residence = Residence() if way == WAYS[1] else None
    with tempfile.TemporaryDirectory() as cache:
        config = recipe(text, cache, None)
        rows = load_calibration(config.calibration, tokenizer, model, config.seed, True)
        begin = time.process_time()
        with LayerRuns() as runs:
            result = search_by_recipe(model, rows.train, rows.validation, config, quiet=True, residence=residence)
    found = {"way": way, "layer_rows": runs.rows, "cpu_seconds": round(time.process_time() - begin, 1)}
    return found | {"segments": list(map(str, result.segments))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="one search of this way, in this process")
    args = parser.parse_args()
    if args.way is not None:
        pruner = CLPPruner.from_pretrained(args.model, quiet=True)
        assert pruner.model is not None
        print(json.dumps(one_search(pruner.model, pruner.tokenizer, str(args.model / "text.txt"), args.way)))
        return
    runs = []
    for _ in range(args.turns):
        for way in WAYS:
            command = [sys.executable, "-m", __spec__.name, str(args.model), "--way", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    size = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    counts = [next(run["layer_rows"] for run in runs if run["way"] == way) for way in WAYS]
    print(json.dumps({"gigabytes": round(size / 1e9, 2), "arithmetic": counts[1] / counts[0], "runs": runs}))


if __name__ == "__main__":
    main()

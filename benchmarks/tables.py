"""Markdown tables from the files that `pipeline.py` wrote.

python -m benchmarks.tables benchmarks/results/pipeline-*.json
"""

import json
import sys
from pathlib import Path

from benchmarks import markdown

COLUMNS = {
    "cut": "cut",
    "tuned": "tuned",
    "dense_control": "dense, same steps",
    "onnx int8": "int8 ONNX",
    "onnx int4": "int4 ONNX",
}


def main() -> None:
    for path in sys.argv[1:]:
        results = json.loads(Path(path).read_text())
        print(f"### {results['model']}, tuned with {results['runs'][0].get('loss', 'kd')}\n")
        for text, name in results["texts"].items():
            dense = results["dense"][text]
            print(
                f"`{name}`, {dense['num_tokens']:,} tokens; dense perplexity {dense['perplexity']:.3f}. Perplexity (KL):\n"
            )
            print(table(results["runs"], text))
        print(search_table(results["runs"]))


def table(runs: list[dict], text: str) -> str:
    used = [key for key in COLUMNS if any(key in run for run in runs)]
    rows = [["tuned on", "ratio", *(COLUMNS[key] for key in used)]]
    for run in runs:
        cells = [f"{run[k][text]['perplexity']:.3f} ({run[k][text]['kl']:.3f})" if k in run else "" for k in used]
        rows.append([run["source"], str(run["ratio"]), *cells])
    return markdown.table(rows)


def search_table(runs: list[dict]) -> str:
    rows = [["searched on", "ratio", "gate", "KL", "exhaustive", "KL", "gate above it", "layer passes", "ONNX error"]]
    for run in runs:
        gate, oracle = run["gate"], run["exhaustive"]
        error = f"{run['export']['files'][0]['max_relative_error']:.1e}" if "export" in run else ""
        rows.append(
            [
                run["source"],
                str(run["ratio"]),
                str(gate["segments"][0]),
                f"{gate['score']:.4f}",
                str(oracle["segments"][0]),
                f"{oracle['score']:.4f}",
                f"{run['gate_excess']:+.2%}",
                f"{gate['layer_passes']:.0f} / {oracle['layer_passes']:.0f}",
                error,
            ]
        )
    return markdown.table(rows)


if __name__ == "__main__":
    main()

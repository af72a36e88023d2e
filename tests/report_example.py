"""A report with every section filled in, as `CLPPruner.prune` writes it, for the tests of report, card and plots."""

from optimum_clp.report.report import CLPReport


def _step(step: int, start: float, steepness: float, loss: float) -> dict:
    return {"step": step, "start": start, "steepness": steepness, "loss": loss, "valleys": [[start, 3.0]]}


def older_report() -> CLPReport:
    """The example as versions before scored cuts had several segments wrote it."""
    report = example_report()
    report.search["strategy"] = report.search.pop("used_strategy")
    for key in ("layer_scores", "dense_loss", "forward_equivalents"):
        del report.search[key]
    for entry in report.search["scored"]:
        for key in ("segments", "loss", "num_rows", "behind", "behind_error"):
            del entry[key]
    for entry in report.search["trajectory"]:
        del entry["valleys"]
    return report


def example_report() -> CLPReport:
    rows = [
        ("dense", "PyTorch", 16, 3_729_024, 14_920_000, 8.1234, 0.0, 1.0, 5120.0, 210.0),
        ("cut", "PyTorch", 13, 3_180_000, 12_720_000, 12.5, 0.41, 0.71, 6100.0, 250.0),
        ("tuned", "PyTorch", 13, 3_180_000, 12_720_000, 8.9, 0.093, 0.86, 6100.0, 250.0),
        ("onnx", "ONNX Runtime", 13, 3_180_000, 12_780_000, 8.9, 0.093, 0.86, 9000.0, 480.0),
        ("onnx int8", "ONNX Runtime", 13, 3_180_000, 3_600_000, 8.91, 0.094, 0.86, 15000.0, 700.0),
        ("onnx int4", "ONNX Runtime", 13, 3_180_000, 2_100_000, 9.1, 0.12, 0.84, 14000.0, 720.0),
    ]
    keys = (
        "name runtime num_layers num_parameters bytes perplexity kl top1_agreement "
        "prefill_tokens_per_second decode_tokens_per_second"
    ).split()
    needs = {
        name: {
            "memory": {
                "before": 40_000_000,
                "loaded": 48_000_000 + size,
                "peak": 50_000_000 + size,
                "num_tokens": 512,
                "cache_per_token": 8_000,
            }
        }
        for name, *_, size in (("onnx", 12_780_000), ("onnx int8", 3_600_000), ("onnx int4", 2_100_000))
    }
    kls = [2.9, 1.4, 0.9, 0.7, 0.6, 0.52, 0.45, 0.41, 0.44, 0.5, 0.62, 0.8, 1.3, 2.2]
    return CLPReport(
        created="2026-01-02T03:04:05+00:00",
        environment={
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "optimum": "2.3.0",
            "onnxruntime": "1.32.0",
            "platform": "Linux x86_64",
            "device": "cpu (Example Processor)",
            "num_threads": 2,
        },
        base_model={
            "name_or_path": "example/stories-16l",
            "revision": None,
            "model_type": "llama",
            "num_layers": 16,
            "num_parameters": 3_729_024,
            "dtype": "float32",
        },
        calibration={
            "source": "self-written",
            "sequence_length": 256,
            "train_sequences": 192,
            "validation_sequences": 24,
            "test_sequences": 24,
            "statistics": {"distinct_4gram_share": 0.93, "dense_perplexity": 7.9, "seed": 0, "temperature": 1.0},
        },
        search={
            "strategy": "auto",
            "used_strategy": "gate",
            "segments": [[7, 10]],
            "score": 0.41,
            "scored": [
                {
                    "start": i,
                    "stop": i + 3,
                    "segments": [[i, i + 3]],
                    "kl": kl,
                    "standard_error": 0.02,
                    "loss": 2.1 + kl,
                    "num_rows": 32 if kl < 1 else 8,
                    "behind": kl - 0.41,
                    "behind_error": 0.025 if i != 7 else 0.0,
                }
                for i, kl in enumerate(kls)
            ],
            "trajectory": [
                _step(0, 0.0, 0.5, 0.9),
                _step(0, 4.5, 0.5, 0.45),
                _step(0, 9.0, 0.5, 0.5),
                _step(0, 13.0, 0.5, 0.8),
                *(_step(i, 7 - 2.5 * 0.8**i, 0.5 + i * 0.15, 0.6 - 0.008 * i) for i in range(1, 25)),
            ],
            "layer_scores": [],
            "num_layers": 16,
            "num_removed": 3,
            "num_tokens": 8192,
            "dense_loss": 2.1,
            "forward_equivalents": 4.1,
            "layer_passes": 310.5,
            "seconds": 12.5,
        },
        cut={
            "segments": [[7, 10]],
            "removed_layers": [7, 8, 9],
            "num_layers_before": 16,
            "num_layers_after": 13,
            "num_parameters_before": 3_729_024,
            "num_parameters_after": 3_180_000,
        },
        tuning={
            "layers": [6, 7],
            "modules": [],
            "loss": {"kd": 1.0},
            "init": None,
            "num_trainable": 366_000,
            "learning_rate": 7.8e-4,
            "steps": 96,
            "best_step": 96,
            "initial_validation_loss": 0.41,
            "best_validation_loss": 0.1006,
            "improved": True,
            "history": [
                {"step": 0, "train_loss": None, "validation_loss": 0.41, "learning_rate": 0.0, "by_kind": None},
                *(
                    {
                        "step": 12 * (i + 1),
                        "train_loss": 0.09 + 0.25 * 0.6**i,
                        "validation_loss": 0.095 + 0.2 * 0.6**i,
                        "learning_rate": 7.8e-4 * (1 - i / 8),
                        "by_kind": None,
                    }
                    for i in range(8)
                ),
            ],
            "stopped": "finished",
            "num_tokens": 196_608,
            "num_processes": 1,
            "seconds": 61.0,
            "cache_seconds": 3.0,
        },
        quantization=[{"folder": "quanto-int8", "weights": "int8", "num_quantized": 91, "bytes": 4_800_000}],
        export={
            "opset": 21,
            "context": {"length": 512, "checked": "whole"},
            "files": [
                {
                    "file": f"onnx/{name}.onnx",
                    "weights": weights,
                    "bytes": size,
                    "num_quantized_matmuls": count,
                    "num_quantized_embeddings": min(count, 1),
                    "bits_per_weight": bits,
                    "max_relative_error": error,
                    "seconds": 3.1,
                }
                for name, weights, size, count, bits, error in (
                    ("model", "float32", 12_780_000, 0, 32.0, 4.1e-7),
                    ("model_quantized", "int8", 3_600_000, 92, 9.0, 0.011),
                    ("model_q4", "int4", 2_100_000, 92, 5.0, 0.09),
                )
            ],
        },
        evaluation={
            "text": "self-written text (seed 1, temperature 1.0)",
            "rows": [dict(zip(keys, row, strict=True), num_tokens=6120) | needs.get(row[0], {}) for row in rows],
        },
    )

"""The metadata of a model card: what the Hub files a model under, and the figures that it shows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .origin import Origin, origin_of
from .recognition import headline
from .report import CLPReport
from .tables import is_known

# as the Hub's own check takes them: ISO 639 codes, and two words; what else a card calls a language has a key of its own
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}|code|multilingual")
_BCP47 = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})+")
# what a licence's identifier looks like; words of a stranger become the name of another one
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_OWN_TAGS = ("optimum", "optimum-clp", "pruning", "layer-pruning", "clp")
# what a folder gives its reader first
_DELIVERED = ("tuned", "cut", "onnx", "onnx int8", "onnx int4")


def card_metadata(report: CLPReport, folder: Path, title: str) -> ModelCardData:
    """The block at the head of a card, with nothing in it that is neither measured nor said by the dense model's own card.

    Args:
        report ([`CLPReport`]): What was done and measured, with the dense model's `origin`.
        folder (`Path`): The output folder, where a licence's text may lie.
        title (`str`): The model's name.
    """
    origin = origin_of(report.base_model)
    base = origin.repository or origin.base_model
    extra: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    extra |= terms(origin, folder)
    if report.cut:
        extra["pruning"] = {
            "method": "clp",
            "num_hidden_layers_before": report.cut["num_layers_before"],
            "num_hidden_layers_after": report.cut["num_layers_after"],
            "removed_layers": list(report.cut["removed_layers"]),
        }
    results = list(_results(report))
    if results:
        extra |= {"model_name": title.rpartition("/")[2], "eval_results": results}
    regions = [name for name in origin.language if _BCP47.fullmatch(name)]
    if regions:
        extra["language_bcp47"] = regions
    own = [*_OWN_TAGS, *(["onnx"] if report.export else [])]
    read = (report.calibration or {}).get("dataset")
    return ModelCardData(
        base_model=base,
        language=[name for name in origin.language if _LANGUAGE_CODE.fullmatch(name)] or None,
        datasets=list(dict.fromkeys([*origin.datasets, *([read] if read else [])])) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*own, *(tag for tag in origin.tags if tag not in own)],
        **extra,
    )


def terms(origin: Origin, folder: Path) -> dict[str, str]:
    """The licence as the metadata of a card has it, in the form that the Hub takes; a link to a file that did not come along
    leads to the Hub."""
    link, repository = origin.license_link, origin.repository
    if link and repository and "://" not in link and not (folder / link).is_file():
        link = f"https://huggingface.co/{repository}/blob/main/{link}"
    license, name = origin.license, origin.license_name
    if license and not _LICENSE.fullmatch(license):
        license, name = ("other", license) if not _LICENSE.fullmatch(license.lower()) else (license.lower(), name)
    # the Hub takes a name in the form of an identifier
    name = re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-") if name else None
    if license == "other" and not name:
        name = "unnamed"
    stated = {"license": license, "license_name": name, "license_link": link}
    return {key: value for key, value in stated.items() if value}


def _results(report: CLPReport) -> Iterator[EvalResult]:
    """What was measured of the model that the folder delivers, for the Hub's tables."""
    evaluation = report.to_dict()["evaluation"] or {}
    rows = {row["name"]: row for row in evaluation.get("rows") or ()}
    name = next((name for name in _DELIVERED if name in rows), None)
    if name is None:
        return
    texts = [(evaluation.get("text") or "unnamed text", rows[name])]
    for entry in evaluation.get("texts", ()):
        texts += [(entry["text"], row) for row in entry["rows"] if row["name"] == name]
    for text, row in texts:
        for key, title in (("perplexity", "Perplexity"), ("kl", "KL to the dense model (nats per token)")):
            if is_known(row.get(key)):
                yield _result(text, key, title, row[key])
    for entry in evaluation.get("tasks", ()):
        for row in entry["rows"]:
            if row["name"] == name and entry.get("lm_eval"):
                yield from _harness_result(entry, row)
            elif row["name"] == name and is_known(row["accuracy"]):
                # the report's chance is 0 for tasks of a last word, which have no choices to normalize
                title = "Accuracy (acc_norm)" if entry["chance"] > 0 else "Accuracy (acc)"
                yield _result(entry["task"], "accuracy", title, row["accuracy"])


def _harness_result(entry: dict[str, Any], row: dict[str, Any]) -> Iterator[EvalResult]:
    """A score by lm-eval, filed under the dataset that it was measured on."""
    harness, value = entry["lm_eval"], headline(row, entry["lm_eval"])
    if not is_known(value):
        return
    is_share = is_known(row["accuracy"])
    metric = harness["metric"].partition(",")[0]
    title = f"Accuracy ({harness['metric']})" if is_share else harness["metric"]
    title += f", {harness['num_fewshot']}-shot{', chat template' if harness['chat_template'] else ''}"
    result = _result(entry["task"], "accuracy" if is_share else metric, title, value)
    if harness["dataset"]:
        result.dataset_type, result.dataset_name = harness["dataset"], entry["task"]
        result.dataset_config, result.dataset_split = harness["dataset_config"], harness["split"]
    yield result


def _result(text: str, metric: str, title: str, value: float) -> EvalResult:
    slug = re.sub(r"[^\w/.-]+", "-", text).strip("-").lower()[:80] or "text"
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=slug,
        dataset_name=text,
        metric_type=metric,
        metric_name=title,
        metric_value=round(float(value), 5),
    )

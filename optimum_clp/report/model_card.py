"""The README of the output folder: a model card that says only what the report has measured.

A stage that did not run has no section. A local folder is never named: the dense model's entry in the metadata is for
models of the Hub alone.
"""

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import ModelCard

from ..doors import STARTS, STRATEGIES
from .card_metadata import card_metadata, terms
from .card_usage import usage
from .files import file_cells
from .generation import answers_markdown, generation_text, requirement_line
from .legend import legend
from .origin import LICENSE_FILES, base_name, origin_of
from .page import REPORT_PAGE
from .plots import SEARCH_PLOT, TUNING_PLOT, segments_of
from .recognition import recognition_legend, recognition_tables
from .report import CLPReport
from .tables import cell, describe_loss, format_count, markdown_table

if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig

PAPER = "[arXiv 2510.23652](https://arxiv.org/abs/2510.23652)"
_WAYS = {
    "gate": "by gradient descent on the position of a concave gate over the layers, with all weights frozen",
    "exhaustive": "by trying every possible cut",
    "halving": "by a race of every possible cut, in which the worse half drops out after each round",
    "block_influence": "by block influence (ShortGPT), which is how much a layer turns the hidden states",
    "angular": "by angular distance (Gromov et al.) between the hidden states before and after a segment",
    "cosine_block": "by cosine similarity (LLM-Streamline) of the hidden states before and after a segment",
    "taylor": "by first-order Taylor importance of the layers' weights (LLM-Pruner, Shortened LLaMA)",
    "perplexity_greedy": "by the perplexity of the model without them (SLEB)",
    "tail": "as the last layers that can go",
    "random": "at random",
}
_NOT_OF_A_CARD = ("bits_per_weight", "rounding")
_LIBRARIES = ("python", "torch", "transformers", "optimum", "onnxruntime")


def write_model_card(
    report: CLPReport, config: "CLPConfig", folder: str | os.PathLike, *, model_name: str | None = None
) -> Path:
    """Write `README.md` into `folder`.

    The plots are shown if they are in `folder`, and the files of the checkpoint are listed from there, so the card is
    written last.

    Args:
        report ([`CLPReport`]): What was done and measured.
        config ([`CLPConfig`]): The recipe.
        folder (`str` or `os.PathLike`): The output folder; it must exist.
        model_name (`str`, *optional*): What the examples load: the repository on the Hub, which is the title as well, or
            the folder's name. A title is made from the dense model's name.

    Returns:
        `Path`: The file.
    """
    folder = Path(folder)
    from_hub = "/" in (model_name or "")
    title = model_name if model_name and from_hub else f"{base_name(report.base_model)}-clp"
    sections = [
        _introduction(report, title),
        _removed(report, folder),
        _recovery(report, folder),
        _measurements(report),
        _in_use(report),
        _files(report, folder),
        usage(report, model_name, folder),
        _limitations(report, config),
        _license(report, folder),
        _reproduction(report, config, folder),
    ]
    body = "\n\n".join(section for section in sections if section)
    path = folder / "README.md"
    ModelCard(f"---\n{card_metadata(report, folder, title).to_yaml()}\n---\n\n{body}\n").save(path)
    return path


def _introduction(report: CLPReport, title: str) -> str:
    origin = origin_of(report.base_model)
    base = _linked(origin.repository) if origin.repository else f"`{base_name(report.base_model)}`"
    if origin.base_model and not origin.repository:
        base += f", which was made from {_linked(origin.base_model)}"
    kind = (report.base_model or {}).get("model_type")
    text = f"# {title}\n\n{base}" + (f" ({kind})" if kind else "")
    if report.cut:
        text += f" with {len(report.cut['removed_layers'])} of its {_number(report.cut['num_layers_before'], 'decoder layer')} removed"
    tuned = report.tuning and report.tuning["improved"]
    if report.tuning and tuned:
        one = len(report.tuning["layers"]) == 1
        which = "it" if report.cut and len(report.cut["removed_layers"]) == 1 else "them"
        text += f", and the layer{' ' if one else 's '}next to the cut tuned to make up for {which}"
    return (
        f"{text}. Made with optimum-clp {report.clp_version}, which does continuous layer pruning (CLP), "
        f"reimplemented from the paper's abstract ({PAPER})."
    )


def _linked(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _removed(report: CLPReport, folder: Path) -> str:
    if not report.cut:
        return ""
    cut = report.to_dict()["cut"]
    runs = " and ".join(
        str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in cut["segments"]
    )
    before, after = cut["num_parameters_before"], cut["num_parameters_after"]
    lines = [
        "## What was removed",
        f"Layer{'s' if len(cut['removed_layers']) != 1 else ''} {runs} of {cut['num_layers_before']} (counted from 0) "
        f"went: {format_count(before)} parameters became {format_count(after)} ({after / before - 1:+.1%}). What is "
        f"left is an ordinary checkpoint of {_number(cut['num_layers_after'], 'layer')}.",
    ]
    if len(cut.get("chain", ())) > 1:
        lines.append(_chain(cut))
    if report.type_rule_broken():
        lines.append(report.type_rule_broken())
    search = report.to_dict()["search"]
    if search and search["segments"] == cut["segments"]:  # else the layers were chosen by hand
        lines.append(_choice(report, search, one=len(cut["removed_layers"]) == 1))
        lines += _picture(folder, SEARCH_PLOT, "KL divergence of each scored cut, and importance of each layer")
    return "\n\n".join(lines)


def _chain(cut: dict[str, Any]) -> str:
    steps = ", then ".join(
        f"{', '.join(f'[{start}, {stop})' for start, stop in step['segments'])} of {step['num_layers_before']} layers"
        for step in cut["chain"]
    )
    return f"That came about in {len(cut['chain'])} cuts: {steps}. What is left was made like the {cut['towards']}."


def _choice(report: CLPReport, search: dict[str, Any], one: bool) -> str:
    """How the layers were chosen, what their removal costs, and how sure the choice is."""
    used = search.get("used_strategy") or search["strategy"]
    says = STRATEGIES.says(used) if used in STRATEGIES else ""
    way = _WAYS.get(used) or f"by strategy `{used}`{f' ({says})' if says else ''}"
    if used != search["strategy"]:
        way += f" (strategy `{search['strategy']}` took `{used}`)"
    scored, segments = search["scored"], search["segments"]
    chosen: dict[str, Any] = next((entry for entry in scored if segments_of(entry) == segments), {})
    others = [entry for entry in scored if entry is not chosen]
    sentences = [f"{'It was' if one else 'They were'} chosen {way}."]
    if search["score"] is not None:
        error = chosen.get("standard_error")
        sentences.append(
            f"Removing {'it' if one else 'them'} costs a KL divergence from the dense model of {search['score']:.4f} nats per token"
            f"{'' if error is None else f' (standard error {error:.4f})'}, over {_scored_text(report, search, chosen)}."
        )
    rows = chosen.get("num_rows") or 0
    fewer = sum((entry.get("num_rows") or rows) < rows for entry in others)
    sentences.append(
        f"{len(scored)} cut{'s were' if len(scored) != 1 else ' was'} scored"
        f"{f', {fewer} of them on fewer rows of text' if fewer else ''}."
    )
    margins = [(entry.get("behind"), entry.get("behind_error")) for entry in others]
    known = [(behind, 2 * error) for behind, error in margins if behind is not None and error is not None]
    close = sum(abs(behind) <= margin for behind, margin in known)
    better = sum(behind < -margin for behind, margin in known)
    if close:
        sentences.append(f"{close} other{'s are' if close > 1 else ' is'} within two standard errors of this one.")
    if better:
        sentences.append(f"{better} other{'s are' if better > 1 else ' is'} better by more than two standard errors.")
    repaired = [entry["repaired_kl"] for entry in scored if entry.get("repaired_kl") is not None]
    if repaired and chosen.get("repaired_kl") is not None:
        sentences.append(
            f"The best {len(repaired)} of them were compared after a cheap repair, after which this one's divergence was the "
            f"lowest, {chosen['repaired_kl']:.4f}."
        )
    if search.get("lengths"):
        sentences.append(_lengths(search))
    return " ".join(sentences)


def _scored_text(report: CLPReport, search: dict[str, Any], chosen: dict[str, Any]) -> str:
    """The text that the chosen cut was measured on, which may be less than the search had."""
    rows, length = chosen.get("num_rows"), (report.calibration or {}).get("sequence_length") or 0
    if rows is None or rows * length == search["num_tokens"]:
        return f"{search['num_tokens']:,} tokens of {_source(report)}"
    return f"{rows:,} row{'s' if rows != 1 else ''} of {_source(report)}"


def _lengths(search: dict[str, Any]) -> str:
    """For a quality budget: the numbers of layers that were tried."""
    tried = [
        f"{entry['num_removed']} ({entry['perplexity_increase']:+.1%})"
        for entry in search["lengths"]
        if entry["perplexity_increase"] is not None
    ]
    return (
        f"Removing {search['num_removed']} was the most of those tried that kept within the limit on perplexity, which "
        f"was measured on validation rows before tuning: {', '.join(tried)}."
    )


def _source(report: CLPReport) -> str:
    source = (report.to_dict()["calibration"] or {}).get("source") or "the calibration text"
    return source.replace("self-written", "text that the dense model wrote itself")


def _picture(folder: Path, name: str, text: str) -> list[str]:
    return [f"![{text}]({name})"] if (folder / name).is_file() else []


def _recovery(report: CLPReport, folder: Path) -> str:
    tuning = report.to_dict()["tuning"]
    if not tuning:
        return ""
    layers, one = ", ".join(map(str, tuning["layers"])), len(tuning["layers"]) == 1
    text = (
        f"The layer{'' if one else 's'} next to the cut ({layers} in the new numbering, "
        f"{format_count(tuning['num_trainable'])} parameters) {'was' if one else 'were'} trained in full "
        f"{_stages(tuning)}, on {_number(tuning['num_tokens'], 'token')} (repeats counted) of {_source(report)}. "
    )
    init = tuning.get("init")
    if init and init["kept"]:
        text += (
            f"{'It' if one else 'They'} started from {_start(init, one)}, "
            f"which took the validation loss from {cell(init['loss_before'], '.4f')} to {cell(init['loss_after'], '.4f')}. "
        )
    before, after = tuning["initial_validation_loss"], tuning["best_validation_loss"]
    if not tuning["improved"]:
        text += "The validation loss did not improve, and the weights were kept as they were."
    elif before is not None and after is not None:
        text += (
            f"The validation loss went from {before:.4f} to {after:.4f} nats per token (step {tuning['best_step']})."
        )
    text += _forecast(tuning.get("forecast"))
    return "\n\n".join(["## Recovery", text, *_picture(folder, TUNING_PLOT, "Losses while tuning")])


def _stages(tuning: dict[str, Any]) -> str:
    stages = tuning.get("stages") or [tuning]
    return ", then ".join(
        f"with the loss `{describe_loss(stage['loss'])}` for {_number(stage['steps'], 'step')}" for stage in stages
    )


def _forecast(forecast: dict[str, Any] | None) -> str:
    if not forecast:
        return ""
    planned, more = forecast["predictions"]
    return (
        f" Short pilots had foretold {planned['loss']:.3f} ({planned['low']:.3f} to {planned['high']:.3f}) for "
        f"{planned['num_tokens']:,} fresh tokens; they foretell {more['loss']:.3f} ({more['low']:.3f} to {more['high']:.3f}) for "
        f"{more['num_tokens']:,}."
    )


def _start(init: dict[str, Any], one: bool) -> str:
    """What the trained layers started from; all starts of this package are closed-form, another one is called by its name."""
    name = init["method"]
    if name in STARTS and STARTS.row(name).package is None:
        return f"a closed-form solution for {'its' if one else 'their'} output projections ({name.replace('_', ' ')})"
    return f"the start `{name}`"


def _measurements(report: CLPReport) -> str:
    table = report.to_table(markdown=True)
    if not table:
        return ""
    names = {row["name"] for row in (report.evaluation or {})["rows"]}
    rows = [
        f"*{name}*: {text}"
        for name, text in (
            ("dense", "the model before anything was removed"),
            ("cut", "layers removed, nothing else"),
            ("tuned", "after recovery"),
            ("onnx", "the same in ONNX Runtime"),
        )
        if name in names
    ]
    return f"## Measurements\n\n{table}\n\n{'; '.join(rows)}."


def _in_use(report: CLPReport) -> str:
    """Recognition and generation, never one alone, and what follows from both."""
    evaluation = report.to_dict()["evaluation"] or {}
    generation = evaluation.get("generation")
    parts = [markdown_table(table, "llr") for table in recognition_tables(evaluation)]
    parts.append(recognition_legend(evaluation, markdown=True))
    parts.append(generation_text(generation, evaluation.get("verdicts", ()), markdown=True))
    parts += map(requirement_line, evaluation.get("requirements", ()))
    if answers := answers_markdown(generation):
        parts += ["How some greedy answers begin:", answers]
    parts = [part for part in parts if part]
    if not parts:
        return ""
    unsaid = (
        []
        if generation
        else ["What the model says when it writes was not measured: loops and wrong answers would not show."]
    )
    return "\n\n".join(["## In use", *unsaid, *parts])


def _files(report: CLPReport, folder: Path) -> str:
    cells = file_cells(report.to_dict(), folder, _NOT_OF_A_CARD, code=True)
    if not cells:
        return ""
    parts = [
        "## Files",
        markdown_table(cells),
        legend(cells[0], markdown=True),
        report.size_reached(),
        report.speed_reached(),
    ]
    return "\n\n".join(filter(None, parts))


def _limitations(report: CLPReport, config: "CLPConfig") -> str:
    items = []
    if report.evaluation:
        items.append(_unmeasured(report.evaluation))
    else:
        items.append("Nothing was measured on held-out text.")
    if (report.calibration or {}).get("statistics"):
        others = [entry["text"] for entry in (report.evaluation or {}).get("texts", ())]
        besides = any(not text.startswith("test rows: ") for text in others)
        items.append(
            f"The {'test rows were' if besides else 'text was'} written by the dense model itself: the figures on "
            f"{'them' if besides else 'it'} show how close the model stays to the dense one, not how good either is on "
            "other people's text."
        )
    if report.cut:
        items.append("The limits and biases of the dense model were not measured again.")
    weights = {entry["weights"] for entry in (report.export or {}).get("files", [])} - {"float32", "float16"}
    if weights and config.quantization.accuracy_level == 4:
        items.append(
            f"ONNX Runtime multiplies the {' and '.join(sorted(weights, reverse=True))} weights with int8 activations "
            f"(accuracy level 4){'; the figures of these files have been taken so' if report.evaluation else ''}."
        )
    return "\n".join(["## Limitations", "", *(f"- {item}" for item in items)])


def _unmeasured(evaluation: dict[str, Any]) -> str:
    unsaid = ["longer contexts", "safety behaviour"]
    unsaid[:0] = [] if evaluation.get("tasks") else ["benchmark tasks"]
    unsaid[:0] = [] if evaluation.get("texts") else ["other text"]
    measured = "everything that was measured is in the tables above"
    if not any(evaluation.get(part) for part in ("tasks", "texts", "generation")):
        measured = "everything that was measured is in the table above, on that text alone"
    said = f"{', '.join(unsaid[:-1])} and {unsaid[-1]} were not measured."
    return f"{measured.capitalize()}. {said.capitalize()}"


def _license(report: CLPReport, folder: Path) -> str:
    """Under which terms the dense model came, which hold of what was made from it."""
    origin = origin_of(report.base_model)
    stated, name = terms(origin, folder), origin.license_name or origin.license
    if not name:
        return ""
    text = f"The dense model's card says: `{name.replace('`', '')}`"
    link = stated.get("license_link", "")
    if link.startswith(("https://", "http://")):
        text += f", see [its terms]({quote(link, safe=':/?#=&%')})"
    files = sorted(path.name for path in folder.iterdir() if _is_license(path))
    named = ", ".join(f"[{file}]({quote(file)})" for file in files)
    beside = f" Its file{'s' if len(files) > 1 else ''} {named} lie{'' if len(files) > 1 else 's'} beside this card."
    return f"## License\n\n{text}.{beside if files else ''}"


def _is_license(path: Path) -> bool:
    known = any(fnmatch(path.name.lower(), pattern) for pattern in LICENSE_FILES)
    # a stranger's name that Markdown would read is not shown
    return known and path.is_file() and re.fullmatch(r"[\w .-]+", path.name) is not None


def _number(count: int, noun: str) -> str:
    """`1 step`, `4,908 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _reproduction(report: CLPReport, config: "CLPConfig", folder: Path) -> str:
    environment = report.environment or {}
    versions = [f"- {name} {environment[name]}" for name in _LIBRARIES if environment.get(name)]
    text = f"The recipe is in `{config.CONFIG_NAME}` (seed {config.seed}), every figure in `clp_report.json`."
    if (folder / REPORT_PAGE).is_file():
        text += f" All of it to look at, with answers side by side: [{REPORT_PAGE}]({REPORT_PAGE}), for a browser."
    lines = ["## Framework versions", "", f"- optimum-clp {report.clp_version}", *versions, "", text]
    return "\n".join(lines)

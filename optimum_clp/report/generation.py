"""Generation, verdicts and requirements of a report in words and tables, for terminals and for Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from .legend import legend
from .tables import Column, Show, cell, is_known, markdown_table, record_cells, text_table

_ASKED = {
    "chat": "{number} questions through the chat template",
    "prompts": "{number} prompts, as they are",
    "text": "{number} beginnings of held-out text",
}
_COLUMNS = (
    ("loops", "loops", ".0%"),
    ("ended", "end by themselves", ".0%"),
    ("length", "tokens", ".0f"),
    ("dense_loss", "dense loss on samples", ".2f"),
    ("kl", "KL on dense answers", ".3f"),
    ("agreement", "first 32 as dense", ".0%"),
    ("json_parses", "JSON parses", ".0%"),
    ("arithmetic_right", "arithmetic right", ".0%"),
)
_SHOWN_ANSWER = 160
_SHOWN_EXAMPLES = 4  # of a card; the page beside it has all of them


def generation_text(
    generation: Mapping[str, Any] | None, verdicts: Iterable[Mapping[str, Any]], *, markdown: bool = False
) -> str:
    """What the models say, as a table with a row for each, and what follows from it.

    Args:
        generation (`Mapping` or `None`): The `generation` part of the report's `evaluation`.
        verdicts (`Iterable[Mapping]`): Its `verdicts`.
        markdown (`bool`): For a Markdown file, not for a terminal.

    Returns:
        `str`: Empty if nothing was measured.
    """
    if not generation:
        return ""
    cells = generation_cells(generation, head="" if markdown else "generation")
    table = markdown_table(cells, "lr") if markdown else text_table(cells, ruled=True)
    lines = [f"- {words}" if markdown else words for words in map(verdict_line, verdicts)]
    parts = [table, legend(cells[0], markdown=markdown), asked(generation), "\n".join(lines)]
    return ("\n\n" if markdown else "\n").join(filter(None, parts))


def generation_cells(
    generation: Mapping[str, Any], names: Mapping[str, str] | None = None, head: str = ""
) -> list[list[str]]:
    """A row of cells for each model or file; the first row is the head of the table.

    Args:
        generation (`Mapping`): The `generation` part of the report's `evaluation`.
        names (`Mapping[str, str]`, *optional*): What some rows are called for the reader.
        head (`str`): What stands above the names.
    """
    columns = [Column("name", head), *(Column(key, title) for key, title, _ in _COLUMNS)]
    shown = [
        {
            "name": (names or {}).get(row["name"], row["name"]),
            **{key: _with_error(row, key, show) for key, _, show in _COLUMNS},
        }
        for row in generation["rows"]
    ]
    return record_cells(shown, columns)


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """A verdict and the share of generation that it stands on: `"tuned: usable with losses: ... (generation kept: 0.71)."`"""
    return f"{verdict['name']}: {verdict['text']} (generation kept: {verdict['generation_kept']['share']:.2f})."


def requirement_line(requirement: Mapping[str, Any]) -> str:
    """What was required, and whether it was reached."""
    name, required = requirement["name"], requirement["required"]
    if not is_known(requirement["reached"]):
        return f"Falls short: {name} of at least {required:g} was required, and could not be measured."
    reached = f"{name} {requirement['reached']:.3f} ({requirement['row']}), at least {required:g} was required"
    return f"{'Met' if requirement['met'] else 'Falls short'}: {reached}."


def asked(generation: Mapping[str, Any]) -> str:
    """One sentence that says what the answers are to, and how they were written."""
    number, left = generation["num_prompts"], generation["num_left_out"]
    said = _ASKED[generation["asked"]].format(number=number)
    said += f" ({left} more are longer than the model takes)" if left else ""
    note = f" Note: {generation['note']}." if generation["note"] and generation["asked"] != "text" else ""
    return (
        f"Generation: {said}, answers of at most {generation['max_new_tokens']} tokens; greedy, but for the loss and the KL, "
        f"which are in nats per token on answers sampled at temperature {generation['temperature']:g}; ± is a standard "
        f"error.{note}"
    )


def answers_markdown(generation: Mapping[str, Any] | None) -> str:
    """The beginnings of some answers, models side by side, as a Markdown table; empty without any."""
    examples = (generation or {}).get("examples") or []
    if not examples:
        return ""
    names = [name for name in ("dense", "cut", "tuned") if name in examples[0]["answers"]]
    names = names or list(examples[0]["answers"])[:1]
    rows = [["prompt", *names]]
    for example in examples[:: max(1, len(examples) // _SHOWN_EXAMPLES)][:_SHOWN_EXAMPLES]:
        rows.append([_one_line(example["prompt"]), *(_one_line(example["answers"].get(name, "")) for name in names)])
    return markdown_table(rows, "l")


def _with_error(row: Mapping[str, Any], key: str, show: Show) -> str | None:
    value, error = row.get(key), row.get(f"{key}_error")
    if value is None:
        return None
    return f"{cell(value, show)} ± {cell(error, show)}" if error else cell(value, show)


def _one_line(text: str) -> str:
    """Text as a cell: on one line, with nothing in it that Markdown or HTML would read."""
    line = " ".join(text.split())
    line = line if len(line) <= _SHOWN_ANSWER else f"{line[: _SHOWN_ANSWER - 1].rstrip()}…"
    for mark in "\\`*_[]|~#":
        line = line.replace(mark, f"\\{mark}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

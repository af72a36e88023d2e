"""Tables of what models recognize: other texts and tasks of a report's `evaluation`."""

from collections.abc import Iterator, Mapping
from typing import Any

from .legend import legend
from .tables import Column, record_cells

_TEXT_COLUMNS = (
    Column("text", "text"),
    Column("name", "model"),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL to dense", ".4f"),
    Column("retention", "retention", ".3f"),
)
_TASK_COLUMNS = (
    Column("task", "task"),
    Column("name", "model"),
    Column("metric", "metric"),
    Column("num_fewshot", "shots"),
    Column("accuracy", "accuracy", ".4f"),
    Column("accuracy_stderr", "std. error", ".4f"),
    Column("plain_accuracy", "plain", ".4f"),
    Column("value", "value", ".4f"),
    Column("retention", "retention", ".3f"),
)

_OF_ALL_MODELS = ("perplexity", "KL to dense")


def harness_cells(row: Mapping[str, Any], harness: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a table says of a score by lm-eval besides: its metric, the examples in front, its value where that is no accuracy.

    Args:
        row (`Mapping`): With `accuracy` and `metrics`.
        harness (`Mapping` or `None`): As in [`Harness`]; `None` for a task in a file, of which there is nothing to say.
    """
    if harness is None:
        return {}
    return {
        "metric": harness["metric"],
        "num_fewshot": harness["num_fewshot"],
        "value": headline(row, harness) if row["accuracy"] is None else None,
    }


def headline(row: Mapping[str, Any], harness: Mapping[str, Any]) -> float | None:
    """The figure that lm-eval's `metric` names."""
    metrics, metric = row["metrics"], harness["metric"]
    return metrics.get(metric, metrics.get(f"{metric},none"))


def recognition_tables(evaluation: Mapping[str, Any]) -> Iterator[list[list[str]]]:
    """The cells of a table of texts and one of tasks, as far as they were measured; the first row is the head."""
    for key, name, columns in (("texts", "text", _TEXT_COLUMNS), ("tasks", "task", _TASK_COLUMNS)):
        records = [
            {name: entry[name], **row, **harness_cells(row, entry.get("lm_eval"))}
            for entry in evaluation.get(key, ())
            for row in entry["rows"]
        ]
        if records:
            yield record_cells(records, columns)


def recognition_legend(evaluation: Mapping[str, Any], *, markdown: bool = False) -> str:
    """What the columns of these tables mean that the table of all models does not have; empty without such tables."""
    titles = dict.fromkeys(title for cells in recognition_tables(evaluation) for title in cells[0])
    return legend((title for title in titles if title not in _OF_ALL_MODELS), markdown=markdown)

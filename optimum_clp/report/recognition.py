"""Tables of what models recognize: other texts and tasks of a report's `evaluation`."""

from collections.abc import Iterator, Mapping
from typing import Any

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
    Column("accuracy", "accuracy", ".4f"),
    Column("accuracy_stderr", "std. error", ".4f"),
    Column("plain_accuracy", "plain", ".4f"),
    Column("retention", "retention", ".3f"),
)


def recognition_tables(evaluation: Mapping[str, Any]) -> Iterator[list[list[str]]]:
    """The cells of a table of texts and one of tasks, as far as they were measured; the first row is the head."""
    for key, name, columns in (("texts", "text", _TEXT_COLUMNS), ("tasks", "task", _TASK_COLUMNS)):
        records = [{name: entry[name], **row} for entry in evaluation.get(key, ()) for row in entry["rows"]]
        if records:
            yield record_cells(records, columns)

"""Zero-shot accuracy: on tasks given as JSON lines, and, where lm-eval is installed, on its own tasks by their names.

Prompts, accuracies and standard errors of tasks in files follow lm-eval 0.4.13: a figure can be set beside published ones. They need
nothing but this package; [`~optimum_clp.evaluation.named_tasks`] leaves everything but the likelihoods to lm-eval.
"""

import importlib.util
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..argument_types import check_arguments
from ..configuration.stages import EvaluationConfig
from ..errors import CalibrationError, ConfigurationError
from ..forward.layer_major import Residence
from ..json_files import JsonProblem, is_whole, json_lines
from .likelihood import continuation_request, log_likelihoods, max_length
from .scores import TaskScore, task_retention

if TYPE_CHECKING:
    from .named_tasks import NamedTask

_FORMATS = '{"context", "continuation"} or {"query", "choices", "gold"}'


@dataclass(frozen=True)
class Example:
    """A text and what may follow it.

    Args:
        context (`str`): The text so far, `"\\nAnswer:"` included; may be empty.
        continuations (`tuple[str, ...]`): One last word, or at least two choices; none is empty. A space is put before each.
        gold (`int`): Index of the right one.
    """

    context: str
    continuations: tuple[str, ...]
    gold: int = 0

    def texts(self) -> Iterator[str]:
        """The continuations, with the space before each where there is none yet."""
        for continuation in self.continuations:
            spaced = self.context.endswith(" ") or continuation.startswith(" ")
            yield continuation if spaced else f" {continuation}"


@dataclass(frozen=True)
class Task:
    """Examples of one kind.

    Args:
        name (`str`): What the figures are called.
        examples (`tuple[Example, ...]`): At least one; all of them last words, or all of them choices.
    """

    name: str
    examples: tuple[Example, ...]

    @property
    def has_choices(self) -> bool:
        """Whether the model chooses between continuations; otherwise it has to find the one there is."""
        return len(self.examples[0].continuations) > 1

    def check(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Say before any work whether a model with this tokenizer can be asked: it can; each text is looked at when it is asked."""

    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        limit: int | None,
        quiet: bool,
        residence: Residence | None = None,
    ) -> TaskScore:
        """As [`evaluate_task`], which has checked `limit`."""
        examples, longest = self.examples[:limit], max_length(model, tokenizer)
        requests = [
            continuation_request(example.context, text, tokenizer, longest, self.name)
            for example in examples
            for text in example.texts()
        ]
        found = iter(log_likelihoods(model, requests, batch_size, self.name, quiet, residence))
        answers = [[next(found) for _ in example.continuations] for example in examples]
        if not self.has_choices:
            right = [float(greedy) for ((_, greedy),) in answers]
            mean = statistics.fmean(log_likelihood for ((log_likelihood, _),) in answers)
            return _score(self.name, right, right, 0.0, math.exp(-mean) if mean > -700 else math.inf)
        normalised, plain = [], []
        for example, answer in zip(examples, answers, strict=True):
            scores = [log_likelihood for log_likelihood, _ in answer]
            shares = [s / len(choice) for s, choice in zip(scores, example.continuations, strict=True)]
            normalised.append(float(shares.index(max(shares)) == example.gold))
            plain.append(float(scores.index(max(scores)) == example.gold))
        chance = statistics.fmean(1 / len(example.continuations) for example in examples)
        return _score(self.name, normalised, plain, chance, None)


@check_arguments
def load_task(name: str, source: str | os.PathLike | list[dict[str, Any]]) -> Task:
    """Read a task.

    Args:
        name (`str`): What it is to be called; any name.
        source (`str`, `os.PathLike` or `list[dict]`): A JSON lines file, or its rows, all of one of two shapes (other keys are
            ignored): `{"context": str, "continuation": str}`, a text and its last word, as LAMBADA; or `{"query": str,
            "choices": list[str], "gold": int}`, a question, at least two answers and the index of the right one, as PIQA and
            ARC. A query that begins with `Question:` gets `"\\nAnswer:"` at its end, unless it has it.

    Returns:
        [`Task`]

    Raises:
        CalibrationError: If the file cannot be read, or a row is not of that shape.
    """
    shown = f"list of {len(source)} rows" if isinstance(source, list) else os.fspath(source)
    examples: list[Example] = []
    for place, row in _rows(name, source, shown):
        try:
            example = _example(row)
        except ValueError as error:
            raise CalibrationError.of(
                f"task {name}", shown, f"{place} {error}", f"Give rows that are {_FORMATS}"
            ) from None
        if examples and (len(example.continuations) > 1) != (len(examples[0].continuations) > 1):
            raise CalibrationError.of(
                f"task {name}", shown, f"{place} is of another shape than those before it", "Give each shape a task"
            )
        examples.append(example)
    if not examples:
        raise CalibrationError.of(
            f"task {name}", shown, "it is empty: there are no examples in it", f"Give rows that are {_FORMATS}"
        )
    return Task(name, tuple(examples))


def load_tasks(
    tasks: "Mapping[str, str | os.PathLike | list[dict[str, Any]]] | Sequence[str | Task | NamedTask]",
    evaluation: EvaluationConfig | None = None,
) -> "list[Task | NamedTask]":
    """Read tasks, in files and of lm-eval.

    Args:
        tasks (`Mapping` or `Sequence`): For each name a file or its rows, as in [`load_task`]; or, one by one, `NAME=FILE`, a name that
            lm-eval has, or a task that was loaded before.
        evaluation ([`EvaluationConfig`], *optional*): How lm-eval's tasks are measured: `num_fewshot`, `apply_chat_template`,
            `tasks_dir`.

    Returns:
        `list[Task | NamedTask]`: In that order, with names of their own. A tag of lm-eval, or a group without figures of its own,
        stands for all its tasks.

    Raises:
        CalibrationError: If a task cannot be read.
        ConfigurationError: If lm-eval is needed and not installed; if a setting is for tasks of lm-eval and there is none; if a
            name comes twice, or something is no task.
    """
    settings = evaluation or EvaluationConfig()
    if isinstance(tasks, Mapping):
        return [load_task(name, source) for name, source in tasks.items()]
    named = [task for task in tasks if isinstance(task, str) and "=" not in task]
    found = _named(named, settings) if named else {}
    loaded: list[Any] = []
    for task in tasks:
        if not isinstance(task, str):
            if not hasattr(task, "score"):
                rule = (
                    f"it is of the type {type(task).__name__}, and must be NAME=FILE or the name of a task of lm-eval"
                )
                raise ConfigurationError.of("tasks", task, rule, "Give for example ['piqa=piqa.jsonl', 'arc_easy']")
            loaded.append(task)
        elif task in found:
            loaded += found[task]
        else:
            name, _, file = task.partition("=")
            loaded.append(load_task(name, file))
    names = [task.name for task in loaded]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError.of(
                "tasks", name, "it is measured twice", "Name each task once, alone or by its group"
            )
    return loaded


def _named(names: Sequence[str], settings: EvaluationConfig) -> "dict[str, list[NamedTask]]":
    rule, remedy = "without =FILE it is a task of lm-eval, which", "pip install 'optimum-clp[tasks]'"
    if importlib.util.find_spec("lm_eval") is None:
        remedy += f", or give its examples as a file: {names[0]}={names[0]}.jsonl"
        raise ConfigurationError.of("task", names[0], f"{rule} is not installed", remedy)
    try:
        from .named_tasks import load_named
    except ImportError as error:  # an older one, or a part of it is missing
        rule += f" is installed and cannot be loaded ({error})"
        raise ConfigurationError.of("task", names[0], rule, remedy) from error

    return load_named(names, settings)


def evaluate_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    task: "Task | NamedTask",
    *,
    batch_size: int = 8,
    limit: int | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> TaskScore:
    """Accuracy of a model on a task: zero-shot, but for tasks of lm-eval that say otherwise.

    Args:
        model: As in [`evaluate_tokens`]: a PyTorch model or an [`OnnxCausalLM`].
        tokenizer (`PreTrainedTokenizerBase`): The model's; adds the special tokens that it adds by default.
        task ([`Task`] or [`NamedTask`]): What is measured.
        batch_size (`int`): Continuations in one forward pass; does not change the result beyond rounding. Answers that are
            written at once.
        limit (`int`, *optional*): Only so many examples, from the start; at least 1.
        residence ([`Residence`], *optional*): For a PyTorch model that memory does not hold: likelihoods are taken layer by layer. What is
            written goes token by token, and reads the weights for each.
        quiet (`bool`): No progress bar.

    Returns:
        [`TaskScore`]

    Raises:
        ConfigurationError: If `limit` is below 1.
        CalibrationError: If there is no tokenizer, or it is not the model's; or a continuation has no tokens, or more than
            the model takes. A context that is too long loses its beginning.
        ModelError: If the model gives NaN.
    """
    if limit is not None and limit < 1:
        raise ConfigurationError.of("task_limit", limit, "it must be at least 1", "Leave it out to measure all")
    if tokenizer is None:
        raise CalibrationError.of(
            f"task {task.name}", None, "it needs a tokenizer, and the model has none", "Give tokenizer="
        )
    return task.score(model, tokenizer, batch_size=batch_size, limit=limit, quiet=quiet, residence=residence)


def evaluate_tasks(
    model: Any,
    dense: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: "Sequence[Task | NamedTask]",
    *,
    batch_size: int = 8,
    limit: int | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """The scores of a model on several tasks, beside the dense model's.

    Args:
        model, tokenizer, batch_size, limit, residence, quiet: As in [`evaluate_task`].
        dense: The dense model; `None` if it is not at hand. May be `model`, which is then measured once.
        tasks (`Sequence[Task | NamedTask]`): With names of their own.

    Returns:
        `dict[str, dict]`: For each task's name the values of [`TaskScore`]; with a dense model also `dense_accuracy` and
        `retention`, see [`task_retention`], and for a task of lm-eval `dense_metrics`.
    """
    scores = {}
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "residence": residence, "quiet": quiet}
    for task in tasks:
        score = evaluate_task(model, tokenizer, task, **options)
        scores[task.name] = score.to_dict()
        if dense is not None:
            whole = score
            if dense is not model:
                whole = evaluate_task(dense, tokenizer, task, **options)
            scores[task.name] |= {"dense_accuracy": whole.accuracy, "retention": task_retention(whole, score)}
            if whole.metrics is not None:
                scores[task.name]["dense_metrics"] = whole.to_dict()["metrics"]
    return scores


def _score(name: str, right: list[float], plain: list[float], chance: float, perplexity: float | None) -> TaskScore:
    count = len(right)
    error = statistics.stdev(right) / math.sqrt(count) if count > 1 else None
    return TaskScore(name, statistics.fmean(right), error, statistics.fmean(plain), chance, perplexity, count)


def _rows(name: str, source: str | os.PathLike | list[dict[str, Any]], shown: str) -> Iterator[tuple[str, Any]]:
    """Each row, and where it stands."""
    if isinstance(source, list):
        yield from ((f"row {number}", row) for number, row in enumerate(source, 1))
        return
    try:
        with Path(source).expanduser().open(encoding="utf-8-sig") as lines:
            yield from ((f"line {number}", row) for number, row in json_lines(lines))
    except JsonProblem as error:
        remedy = "Give JSON lines: one object a line"
        raise CalibrationError.of(f"task {name}", shown, error.rule, remedy) from error
    except UnicodeDecodeError as error:
        rule = f"it is not UTF-8 text ({error.reason})"
        raise CalibrationError.of(
            f"task {name}", shown, rule, "Convert it to UTF-8, for example with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise CalibrationError.of(
            f"task {name}", shown, f"it cannot be read ({error.strerror})", "Give a JSON lines file"
        ) from error


def _example(row: Any) -> Example:
    """A row's example; a ValueError says what the row does wrong."""
    keys = set(row) if isinstance(row, dict) else set()
    if {"query", "choices", "gold"} <= keys:
        query, choices, gold = row["query"], row["choices"], row["gold"]
        if not isinstance(query, str):
            raise ValueError("has a query that is not a string")
        if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)):
            raise ValueError("has choices that are not two or more strings with text in them")
        _check_whole(query, *choices)
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise ValueError(f"has {gold!r} as gold, which is no index of its {len(choices)} choices (0 is the first)")
        return Example(_prompt(query), tuple(choices), gold)
    if {"context", "continuation"} <= keys:
        context, continuation = row["context"], row["continuation"]
        if not isinstance(context, str) or not isinstance(continuation, str):
            raise ValueError("has a context or continuation that is not a string")
        if not continuation.strip():
            raise ValueError("has an empty continuation")
        _check_whole(context, continuation)
        return Example(context, (continuation,))
    raise ValueError(f"has the keys {sorted(keys)}" if isinstance(row, dict) else "is not an object")


def _check_whole(*texts: str) -> None:
    if not all(map(is_whole, texts)):
        raise ValueError("has half of a character in it (a lone surrogate), which no tokenizer takes")


def _prompt(query: str) -> str:
    """lm-eval's prompt of PIQA and ARC; published files leave its last line out."""
    if query.startswith("Question:") and not query.endswith("Answer:"):
        return query.removesuffix("\n") + "\nAnswer:"
    return query

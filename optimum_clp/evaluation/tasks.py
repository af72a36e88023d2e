"""Zero-shot accuracy on tasks given as JSON lines, with the figures that EleutherAI's lm-eval gives.

Prompts, tokens, truncation, accuracies and standard errors follow lm-eval 0.4.13: a figure can be set beside published ones.
"""

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..architecture.lookup import context_limit, text_config
from ..argument_types import check_arguments
from ..errors import CalibrationError, ConfigurationError, ModelError
from ..forward.hooks import evaluation_mode
from ..json_files import JsonProblem, json_lines
from ..progress import progress_bar
from ..report.section import to_section

# lm-eval's, for a model whose config and tokenizer name no length
_DEFAULT_MAX_LENGTH = 2048
# transformers' tokenizers say 1e30 where no length is set
_NO_LENGTH = 10**18
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


@dataclass(frozen=True)
class TaskScore:
    """How a model did on a task.

    Args:
        name (`str`): The task's.
        accuracy (`float`): In [0, 1]. Choices: share of examples whose right choice has the highest log-likelihood for each of
            its characters (lm-eval's `acc_norm`). Last words: share of words each of whose tokens is the most likely one.
        accuracy_stderr (`float` or `None`): Its standard error; `None` for a single example.
        plain_accuracy (`float`): Choices: the same by the log-likelihood itself (lm-eval's `acc`). Last words: `accuracy`.
        chance (`float`): Accuracy of a random guess; 0 for last words.
        perplexity (`float` or `None`): Last words: `exp` of the mean negative log-likelihood of a word (not of a token).
        num_examples (`int`): Examples that were measured.
    """

    name: str
    accuracy: float
    accuracy_stderr: float | None
    plain_accuracy: float
    chance: float
    perplexity: float | None
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values; a perplexity beyond all numbers is `None`."""
        return to_section(self)


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


def evaluate_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    quiet: bool = False,
) -> TaskScore:
    """Zero-shot accuracy of a model.

    Args:
        model: As in [`evaluate_tokens`]: a PyTorch model or an [`OnnxCausalLM`].
        tokenizer (`PreTrainedTokenizerBase`): The model's; adds the special tokens that it adds by default.
        task ([`Task`]): What is measured.
        batch_size (`int`): Continuations in one forward pass; does not change the result beyond rounding.
        limit (`int`, *optional*): Only so many examples, from the start; at least 1.
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
    examples = task.examples[:limit]
    longest = _max_length(model, tokenizer)
    requests = [r for example in examples for r in _requests(example, tokenizer, longest, task.name)]
    _check_vocabulary(requests, model)
    found = iter(_log_likelihoods(model, requests, batch_size, task.name, quiet))
    answers = [[next(found) for _ in example.continuations] for example in examples]
    if not task.has_choices:
        right = [float(greedy) for ((_, greedy),) in answers]
        mean = statistics.fmean(log_likelihood for ((log_likelihood, _),) in answers)
        return _score(task.name, right, right, 0.0, math.exp(-mean) if mean > -700 else math.inf)
    normalised, plain = [], []
    for example, answer in zip(examples, answers, strict=True):
        scores = [log_likelihood for log_likelihood, _ in answer]
        shares = [s / len(choice) for s, choice in zip(scores, example.continuations, strict=True)]
        normalised.append(float(shares.index(max(shares)) == example.gold))
        plain.append(float(scores.index(max(scores)) == example.gold))
    chance = statistics.fmean(1 / len(example.continuations) for example in examples)
    return _score(task.name, normalised, plain, chance, None)


def evaluate_tasks(
    model: Any,
    dense: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: list[Task],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """The scores of a model on several tasks, beside the dense model's.

    Args:
        model, tokenizer, batch_size, limit, quiet: As in [`evaluate_task`].
        dense: The dense model; `None` if it is not at hand. May be `model`, which is then measured once.
        tasks (`list[Task]`): With names of their own.

    Returns:
        `dict[str, dict]`: For each task's name the values of [`TaskScore`]; with a dense model also `dense_accuracy` and
        `retention`, see [`task_retention`].
    """
    scores = {}
    for task in tasks:
        score = evaluate_task(model, tokenizer, task, batch_size=batch_size, limit=limit, quiet=quiet)
        scores[task.name] = score.to_dict()
        if dense is not None:
            whole = score
            if dense is not model:
                whole = evaluate_task(dense, tokenizer, task, batch_size=batch_size, limit=limit, quiet=quiet)
            scores[task.name] |= {"dense_accuracy": whole.accuracy, "retention": task_retention(whole, score)}
    return scores


def task_retention(dense: TaskScore, cut: TaskScore) -> float | None:
    """Accuracy of the cut model divided by the dense one's.

    Args:
        dense, cut ([`TaskScore`]): Of the same examples.

    Returns:
        `float` or `None`: `None` where the dense model is less than three standard errors above chance, or its standard error
        is not known: the ratio of two guesses says nothing.
    """
    if dense.accuracy_stderr is None or dense.accuracy <= dense.chance:
        return None
    if dense.accuracy < dense.chance + 3 * dense.accuracy_stderr:
        return None
    return cut.accuracy / dense.accuracy


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
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise ValueError(f"has {gold!r} as gold, which is no index of its {len(choices)} choices (0 is the first)")
        return Example(_prompt(query), tuple(choices), gold)
    if {"context", "continuation"} <= keys:
        context, continuation = row["context"], row["continuation"]
        if not isinstance(context, str) or not isinstance(continuation, str):
            raise ValueError("has a context or continuation that is not a string")
        if not continuation.strip():
            raise ValueError("has an empty continuation")
        return Example(context, (continuation,))
    raise ValueError(f"has the keys {sorted(keys)}" if isinstance(row, dict) else "is not an object")


def _prompt(query: str) -> str:
    """lm-eval's prompt of PIQA and ARC; published files leave its last line out."""
    if query.startswith("Question:") and not query.endswith("Answer:"):
        return query.removesuffix("\n") + "\nAnswer:"
    return query


@dataclass(frozen=True)
class _Request:
    """Token ids of which the last `length` are scored; there is at least one before them."""

    ids: list[int]
    length: int


def _requests(example: Example, tokenizer: PreTrainedTokenizerBase, longest: int, name: str) -> Iterator[_Request]:
    """One request for each continuation, cut on the left to `longest` tokens of input."""
    context = example.context.rstrip()
    # white space belongs to the token after it, so it is scored there
    space = example.context[len(context) :]
    context_ids = _encode(tokenizer, context) if context else []
    for continuation in example.continuations:
        text = space + ("" if space.endswith(" ") or continuation.startswith(" ") else " ") + continuation
        if context_ids:
            whole, scored = _encode(tokenizer, context + text), len(context_ids)
        else:
            whole, scored = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 0
            start = _start(tokenizer, name)
            whole = whole if whole[:1] == [start] else [start, *whole]
            scored = 1
        length = len(whole) - scored
        if length < 1:
            rule = "the tokenizer makes no token of it beside those of its context"
            raise CalibrationError.of(f"task {name}", continuation, rule, "Correct or remove that example")
        if length > longest:
            rule = f"it has {length} tokens, and the model takes {longest}"
            raise CalibrationError.of(f"task {name}", continuation, rule, "Shorten or remove that example")
        # the last token is only predicted, so one more than the model takes
        yield _Request(whole[-(longest + 1) :], length)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the tokenizer's own special tokens; no second BOS for a text that brings one."""
    start = tokenizer.bos_token or tokenizer.eos_token
    if start and text.startswith(start):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(text, verbose=False)["input_ids"]


def _start(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """What stands in for an empty context."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        rule = "an example has an empty context, and the tokenizer has no BOS or EOS token to begin with"
        raise CalibrationError.of(f"task {name}", "", rule, "Remove that example, or set the tokenizer's bos_token")
    return start


def _max_length(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    own = int(tokenizer.model_max_length) if tokenizer.model_max_length < _NO_LENGTH else None
    return context_limit(model.config) or own or _DEFAULT_MAX_LENGTH


def _check_vocabulary(requests: list[_Request], model: Any) -> None:
    size = getattr(text_config(model.config), "vocab_size", None)
    largest = max(max(request.ids) for request in requests)
    if size is not None and largest >= size:
        rule = f"a task has this token, and the model's vocabulary ends at {size - 1}"
        raise CalibrationError.of("token", largest, rule, "Give the tokenizer that belongs to the model")


def _log_likelihoods(
    model: Any, requests: list[_Request], batch_size: int, name: str, quiet: bool
) -> list[tuple[float, bool]]:
    """For each request, the log-likelihood of its last tokens in nats, and whether each of them is the most likely one."""
    found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    device = getattr(model, "device", torch.device("cpu"))
    # neighbours of one length need little padding; the longest come first, where memory would run out
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(requests), f"Task {name}", quiet) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            ids = torch.zeros(len(batch), len(requests[batch[0]].ids) - 1, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                inputs = requests[index].ids[:-1]
                ids[row, : len(inputs)] = torch.tensor(inputs)
                mask[row, : len(inputs)] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for row, index in enumerate(batch):
                length, end = requests[index].length, len(requests[index].ids) - 1
                predicted = logits[row, end - length : end].float().log_softmax(-1)
                target = torch.tensor(requests[index].ids[-length:], device=predicted.device)
                log_likelihood = predicted.gather(-1, target[:, None]).double().sum().item()
                if math.isnan(log_likelihood):
                    rule = f"it gives NaN for an example of the task {name}"
                    remedy = "Load it in another dtype, such as float32"
                    raise ModelError.of("model", type(model).__name__, rule, remedy)
                found[index] = (log_likelihood, bool((predicted.argmax(-1) == target).all()))
            bar.update(len(batch))
    return found

"""What a model has scored on a task, and what of a dense model's score is left."""

from dataclasses import dataclass
from typing import Annotated, Any

from ..report.section import Key, to_section


@dataclass(frozen=True)
class Harness:
    """How a task of lm-eval was measured.

    Args:
        version (`str`): lm-eval's own.
        task_version (`str`): Of the task's definition.
        metric (`str`): What `accuracy` is: `acc_norm` where the task has it, else `acc`, else the task's first; with its filter, if it has
            one: `exact_match,strict-match`.
        num_fewshot (`int`): Examples in front of each question.
        chat_template (`bool`): Whether questions were put through the tokenizer's chat template, examples as turns.
        dataset (`str` or `None`): Its id on the Hub; `None` if it is not there, or if there are several.
        dataset_config (`str` or `None`): Its configuration.
        split (`str` or `None`): Its split.
    """

    version: str
    task_version: str
    metric: Annotated[str, Key("What `accuracy` is, by lm-eval's name.")]
    num_fewshot: Annotated[int, Key("Examples in front of each question.", minimum=0)]
    chat_template: bool
    dataset: Annotated[str | None, Key("Its id on the Hub.")] = None
    dataset_config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """How a model did on a task.

    Args:
        name (`str`): The task's.
        accuracy (`float` or `None`): In [0, 1]. Choices: share of examples whose right choice has the highest log-likelihood for each of
            its characters (lm-eval's `acc_norm`). Last words: share of words each of whose tokens is the most likely one. Of a task
            of lm-eval what `lm_eval.metric` says; `None` where that is no share, such as a perplexity.
        accuracy_stderr (`float` or `None`): Its standard error; `None` for a single example, and where lm-eval has none.
        plain_accuracy (`float` or `None`): Choices: the same by the log-likelihood itself (lm-eval's `acc`). Otherwise `accuracy`.
        chance (`float`): Accuracy of a random guess; 0 where there are no choices.
        perplexity (`float` or `None`): Last words: `exp` of the mean negative log-likelihood of a word (not of a token).
        num_examples (`int`): Examples that were measured.
        metrics (`dict[str, float | None]`, *optional*): All figures of a task of lm-eval, by its names: `"acc,none"`,
            `"acc_stderr,none"`.
        lm_eval ([`Harness`], *optional*): How lm-eval measured it.
    """

    name: str
    accuracy: float | None
    accuracy_stderr: float | None
    plain_accuracy: float | None
    chance: float
    perplexity: float | None
    num_examples: int
    metrics: Annotated[dict[str, float | None] | None, Key(sparse=True)] = None
    lm_eval: Annotated[Harness | None, Key(sparse=True)] = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values; a perplexity beyond all numbers is `None`."""
        return to_section(self)


def task_retention(dense: TaskScore, cut: TaskScore) -> float | None:
    """Accuracy of the cut model divided by the dense one's.

    Args:
        dense, cut ([`TaskScore`]): Of the same examples.

    Returns:
        `float` or `None`: `None` where the dense model is less than three standard errors above chance, or its standard error
        is not known: the ratio of two guesses says nothing.
    """
    if dense.accuracy is None or cut.accuracy is None or dense.accuracy_stderr is None:
        return None
    if dense.accuracy <= dense.chance or dense.accuracy < dense.chance + 3 * dense.accuracy_stderr:
        return None
    return cut.accuracy / dense.accuracy

"""Tasks of EleutherAI's lm-eval by their names; needs lm-eval, and is imported when one is named.

lm-eval reads the data, asks the questions, puts examples in front of them, filters answers and counts. What is ours: how a model is
asked ([`HarnessModel`]), that every model is asked the same (few-shot examples are drawn anew for each), that nothing of the
process is left changed, and which of a task's figures is its accuracy.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from lm_eval.api.group import Group
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ..configuration.stages import EvaluationConfig
from ..errors import CalibrationError, ConfigurationError
from ..forward.layer_major import Residence
from .harness_model import HarnessModel
from .harness_state import first_line, named_errors, seeded, silent
from .scores import Harness, TaskScore

# lm-eval's own, of its command line
_FEWSHOT_SEED = 1234
# draws of a standard error that has no formula (of a perplexity); shares have one
_DRAWS = 100
# what `datasets` reads by itself
_FORMATS = {"json", "csv", "text", "parquet", "arrow", "pandas", "sql", "xml"}
_REACH_SECONDS = 5.0


@dataclass(frozen=True)
class NamedTask:
    """A task of lm-eval, or a group of them with figures of its own.

    Args:
        name (`str`): lm-eval's.
        tasks (`Mapping[str, Any]`): Its tasks, lm-eval's objects, with their data.
        groups (`Mapping[str, Any]`): The groups that they are counted in; empty for a task.
        chat_template (`bool`): Put questions through the tokenizer's chat template.
    """

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    chat_template: bool = False

    def check(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Say before any work whether a model with this tokenizer can be asked.

        Raises:
            ConfigurationError: If there is to be a chat template, and the tokenizer has none.
        """
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            rule = f"the questions of {self.name} are to be put through the tokenizer's chat template, and it has none"
            raise ConfigurationError.of(
                "evaluation.apply_chat_template", True, rule, "Leave it out, or give a chat model"
            )

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
        """As [`~optimum_clp.evaluation.tasks.evaluate_task`], which has checked `limit`."""
        self.check(tokenizer)
        # a RuntimeError is the model's: out of memory, a shape that does not fit
        with silent() as stderr, seeded(), named_errors(self.name, passing=(RuntimeError,)):
            options: dict[str, Any] = {"batch_size": batch_size, "quiet": quiet, "stderr": stderr}
            options |= {"residence": residence}
            asked = HarnessModel(model, tokenizer, name=self.name, **options)
            for task in self.tasks.values():
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # the same examples for every model
            found = evaluate(
                lm=asked,
                task_dict={"tasks": dict(self.tasks), "groups": dict(self.groups), "group_map": {}},
                limit=limit,
                bootstrap_iters=_DRAWS,
                log_samples=False,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.chat_template,
            )
        return self._score(found)

    def _score(self, found: Mapping[str, Any]) -> TaskScore:
        """lm-eval's answer as a score."""
        figures = found["groups" if self.groups else "results"][self.name]
        metrics = {key: _number(value) for key, value in figures.items() if "," in key and key[0] != ","}
        metric, chosen = _headline(metrics)
        name, _, filters = metric.partition(",")
        higher = found["higher_is_better"].get(self.name, {}).get(name)
        value = metrics[metric]
        accuracy = value if value is not None and higher is not False and 0 <= value <= 1 else None
        harness = Harness(
            version=lm_eval.__version__,
            task_version=str(found["versions"].get(self.name)),
            metric=chosen,
            num_fewshot=max(found["n-shot"].get(task, 0) or 0 for task in self.tasks),
            chat_template=self.chat_template,
            **_dataset(list(self.tasks.values())),
        )
        return TaskScore(
            self.name,
            accuracy,
            metrics.get(f"{name}_stderr,{filters}") if accuracy is not None else None,
            metrics.get(f"acc,{filters}", accuracy) if accuracy is not None else None,
            self._chance() if name.startswith("acc") else 0.0,
            metrics.get(f"perplexity,{filters}", metrics.get(f"word_perplexity,{filters}")),
            sum(found["n-samples"][task]["effective"] for task in self.tasks),
            metrics,
            harness,
        )

    def _chance(self) -> float:
        """Accuracy of a random guess: one over the number of choices, 0 where there are none."""
        shares: list[float] = []
        for task in self.tasks.values():
            choices = Counter(request.doc_id for request in task.instances)
            # each choice is also asked for without its question
            twice = 2 if "acc_mutual_info" in task.higher_is_better() else 1
            is_choice = task.OUTPUT_TYPE == "multiple_choice"
            shares += [twice / count if is_choice else 0.0 for count in choices.values()]
        return sum(shares) / len(shares)


def load_named(names: Sequence[str], evaluation: EvaluationConfig) -> dict[str, list[NamedTask]]:
    """Find tasks and read their data.

    Args:
        names (`Sequence[str]`): Of tasks, groups and tags that lm-eval has, or that `evaluation.tasks_dir` defines.
        evaluation ([`EvaluationConfig`]): `num_fewshot`, `apply_chat_template` and `tasks_dir`.

    Returns:
        `dict[str, list[NamedTask]]`: For each name what it stands for: itself, or the tasks of a tag, or of a group that has no figures.

    Raises:
        ConfigurationError: If there is no such task, or no such folder.
        CalibrationError: If a task's data or its definition cannot be read; at once if they are on the Hub, which cannot be reached.
    """
    with silent(unless_watched=True), seeded():
        if evaluation.tasks_dir is None:
            _check_reachable(names[0])  # reading lm-eval's 14,000 definitions takes seconds
        manager = _manager(names, evaluation.tasks_dir)
        for name in names:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                near_ones = f"It has {', '.join(near)}; " if near else ""
                rule = f"lm-eval {lm_eval.__version__} has no task, group or tag of this name{_unread(evaluation.tasks_dir)}"
                remedy = (
                    f"{near_ones}`lm-eval ls tasks` lists them; for a task of your own give NAME=FILE or --tasks-dir"
                )
                raise ConfigurationError.of("task", name, rule, remedy)
            if evaluation.tasks_dir and any(map(_is_on_the_hub, _definitions(manager, name))):
                _check_reachable(name)
        return {name: _loaded(manager, name, evaluation) for name in names}


def _manager(names: Sequence[str], folder: str | None) -> TaskManager:
    if folder is None:
        return TaskManager()
    if not Path(folder).expanduser().is_dir():
        rule = "there is no such folder"
        raise ConfigurationError.of("evaluation.tasks_dir", folder, rule, "Give a folder with lm-eval's .yaml files")
    own = TaskManager(include_path=str(Path(folder).expanduser()), include_defaults=False)
    if all(part is not None for name in names for part in _definitions(own, name)):
        return own
    return TaskManager(include_path=str(Path(folder).expanduser()))


def _unread(folder: str | None) -> str:
    """What lm-eval passes over without a word: the first file of a folder that is not YAML, as the end of a sentence."""
    for file in [] if folder is None else sorted(Path(folder).expanduser().rglob("*.yaml")):
        try:
            content = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, OSError, RecursionError) as error:
            return f", and {file.name} in your folder cannot be read ({first_line(error)})"
        if not isinstance(content, yaml.MappingNode):
            return f", and {file.name} in your folder holds no settings"
    return ""


def _definitions(manager: TaskManager, name: Any) -> Iterator[Mapping[str, Any] | None]:
    """The definitions of all tasks that a name stands for; `None` for one that is not there."""
    if isinstance(name, Mapping):  # within a group: a task, and what is other than in its own definition
        yield from [name] if "dataset_path" in name else _definitions(manager, name.get("task"))
        return
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if entry is not None and name in manager.all_groups:
        parts = (entry.cfg or {}).get("task") or ()
        for part in [parts] if isinstance(parts, str) else parts:
            yield from _definitions(manager, part)
    elif entry is not None and name in manager.all_tags:
        yield from (other.cfg for other in manager.task_index.values() if name in other.tags)
    else:
        yield None if entry is None else entry.cfg


def _loaded(manager: TaskManager, name: str, evaluation: EvaluationConfig) -> list[NamedTask]:
    with named_errors(name):
        found = manager.load([name])
    tasks, groups = found["tasks"], found.get("groups") or {}
    for task in tasks.values():
        # a task that is zero-shot by its own definition stays so, as in lm-eval
        if evaluation.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    group = groups.get(name)
    if isinstance(group, Group) and group.aggregate_metric_list:
        return [NamedTask(name, tasks, groups, evaluation.apply_chat_template)]
    return [NamedTask(each, {each: task}, {}, evaluation.apply_chat_template) for each, task in tasks.items()]


def _is_on_the_hub(definition: Mapping[str, Any] | None) -> bool:
    path = (definition or {}).get("dataset_path")
    return path is None or not (path in _FORMATS or Path(path).exists())


def _check_reachable(name: str) -> None:
    """Fail at once where `datasets` would try for half a minute, for each dataset."""
    if constants.HF_HUB_OFFLINE:
        return  # what is in the cache is read, and what is not is refused at once
    try:
        get_session().head(constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # requests, httpx and proxies have classes of their own
        rule = f"its data is on the Hugging Face Hub, which could not be reached ({first_line(error)})"
        remedy = (
            "With HF_HUB_OFFLINE=1 a copy in the cache is read; for data of your own give NAME=FILE or --tasks-dir"
        )
        raise CalibrationError.of("task", name, rule, remedy) from error


def _headline(metrics: Mapping[str, float | None]) -> tuple[str, str]:
    """The figure that stands for a task: lm-eval's key, and the same without a filter that does nothing."""
    names = [key for key in metrics if "_stderr," not in key]
    ranks = {"acc_norm": 0, "acc": 1}
    first = min(names, key=lambda key: (ranks.get(key.partition(",")[0], 2), names.index(key)))
    return first, first.removesuffix(",none")


def _number(value: Any) -> float | None:
    # "N/A" is lm-eval's word for a standard error that it does not know
    return float(value) if isinstance(value, Real) else None


def _dataset(tasks: Sequence[Any]) -> dict[str, str | None]:
    """Where the data of a task comes from, as the Hub's tables name it."""
    found = {
        (task.config.dataset_path, task.config.dataset_name, task.config.test_split or task.config.validation_split)
        for task in tasks
    }
    path, name, split = found.pop() if len(found) == 1 else (None, None, None)
    if path is None or not _is_on_the_hub({"dataset_path": path}):
        return {"dataset": None, "dataset_config": None, "split": None}
    return {"dataset": path, "dataset_config": name, "split": split}

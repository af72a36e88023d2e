"""Whether what a run leaves can be used in place of the dense model: other texts, tasks, generation, verdicts, requirements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import context_limit, within_context
from ..attempts import Attempts
from ..calibration.rows import CalibrationData, tokenize_dataset
from ..calibration.sources import describe_text
from ..configuration.clp_config import CLPConfig
from ..forward.dense_outputs import DenseOutputs
from ..forward.layer_major import Residence
from ..report.section import Key
from .generation import GenerationOutcome, check_prompts, measure_generation
from .prompts import Prompt, load_prompts
from .scores import Harness, TaskScore, task_retention
from .tasks import Task, evaluate_task, load_tasks
from .tokens import evaluate_tokens
from .verdict import Verdict, verdict

if TYPE_CHECKING:
    from .named_tasks import NamedTask


@dataclass(frozen=True)
class TextRow:
    """A model or a file on another text."""

    name: Annotated[str, Key("As in the rows of `evaluation`.")]
    perplexity: Annotated[float, Key(minimum=0)]
    kl: Annotated[float | None, Key("KL(dense || this), nats per token.")]
    retention: Annotated[float | None, Key("Perplexity of the dense model over this one's.", minimum=0)]


@dataclass(frozen=True)
class TextFigures:
    """All models and files on another text, or on one kind of the test rows."""

    text: Annotated[str, Key("What it is.")]
    num_rows: Annotated[int, Key(minimum=1)]
    rows: tuple[TextRow, ...]


@dataclass(frozen=True)
class TaskRow:
    """A model's or a file's score on a task."""

    name: Annotated[str, Key("As in the rows of `evaluation`.")]
    accuracy: Annotated[
        float | None,
        Key(
            "Choices: `acc_norm`, the likelihood per character decides. Last words: `acc`. A task of lm-eval: what `lm_eval.metric` "
            "says; null where that is no share.",
            minimum=0,
            maximum=1,
        ),
    ]
    accuracy_stderr: float | None
    plain_accuracy: Annotated[float | None, Key("`acc`: the likelihood itself decides.", minimum=0, maximum=1)]
    retention: Annotated[
        float | None, Key("Accuracy over the dense model's; null where that is too near to chance.", minimum=0)
    ]
    metrics: Annotated[
        dict[str, float | None] | None, Key("All figures of a task of lm-eval, by its names.", sparse=True)
    ] = None


@dataclass(frozen=True)
class TaskFigures:
    """All models and files on a task."""

    task: str
    num_examples: Annotated[int, Key(minimum=1)]
    chance: Annotated[float, Key("Accuracy of a random guess.", minimum=0, maximum=1)]
    rows: tuple[TaskRow, ...]
    lm_eval: Annotated[Harness | None, Key("How lm-eval measured it, if it is one of its tasks.", sparse=True)] = None


@dataclass(frozen=True)
class Requirement:
    """Something that had to be reached, by the smaller model and each of its files."""

    name: Annotated[str, Key(choices=("retention", "generation"))]
    required: Annotated[float, Key(minimum=0, maximum=1, finite=True)]
    reached: Annotated[float | None, Key("The least of all of them; null if it could not be measured.")]
    row: Annotated[str | None, Key("Which of them has the least.")]
    met: bool


@dataclass(frozen=True)
class Deployment:
    """What was measured beside perplexity, KL and speed on the test rows."""

    texts: tuple[TextFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()
    generation: GenerationOutcome | None = None
    verdicts: tuple[Verdict, ...] = ()
    requirements: tuple[Requirement, ...] = ()


@dataclass
class DeploymentChecks:
    """What the recipe asks to measure, read and checked before any work.

    Args:
        config ([`CLPConfig`]): The recipe.
        tokenizer (`PreTrainedTokenizerBase` or `None`): The model's.
        model_config (`PretrainedConfig`): The dense model's.
        quiet (`bool`): No progress bars.

    Raises:
        CalibrationError: If a text or a task cannot be read.
        ConfigurationError: If the prompts cannot be read, or cannot be put to this model.
    """

    config: CLPConfig
    tokenizer: PreTrainedTokenizerBase | None
    model_config: PretrainedConfig
    quiet: bool = False
    texts: dict[str, Tensor] = field(default_factory=dict, init=False)
    tasks: "list[Task | NamedTask]" = field(default_factory=list, init=False)
    prompts: list[Prompt] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        evaluation, calibration = self.config.evaluation, self.config.calibration
        if evaluation.generation and evaluation.prompts is not None:
            self.prompts = load_prompts(evaluation.prompts)
            check_prompts(self.prompts, self.tokenizer, evaluation.num_prompts, context_limit(self.model_config))
        self.tasks = load_tasks(evaluation.tasks, evaluation)
        for task in self.tasks:
            task.check(self.tokenizer)
        length = within_context(calibration.sequence_length, self.model_config)
        for text in evaluation.texts:
            tokens = tokenize_dataset(
                text,
                self.tokenizer,
                sequence_length=length,
                num_sequences=calibration.test_sequences,
                text_column=calibration.text_column,
                name="evaluation.texts",
            )
            self.texts[describe_text(text, calibration.text_column)] = tokens

    def measure(
        self,
        models: Mapping[str, Callable[[], Any]],
        dense: PreTrainedModel | None,
        data: CalibrationData,
        attempts: Attempts,
        residence: Residence | None = None,
    ) -> Deployment:
        """Measure all of it, and judge.

        Args:
            models (`Mapping[str, Callable]`): For each row's name a function that gives its model, dense first.
            dense (`PreTrainedModel` or `None`): The dense model.
            data ([`CalibrationData`]): Its test rows give the kinds of text apart, and what a base model goes on with.
            attempts ([`Attempts`]): Texts, tasks and generation are stages of their own.
            residence ([`Residence`], *optional*): For models that memory does not hold: texts and tasks go through them layer by layer,
                and all prompts are answered at once.
        """
        found: dict[str, Any] = {}
        with attempts.stage("generation"):
            if self.config.evaluation.generation:
                found["generation"] = self._generation(models, dense, data.test, residence is not None)
        with attempts.stage("evaluation on other texts"):
            found["texts"] = self._texts(models, dense, {**_by_kind(data), **self.texts}, residence)
        with attempts.stage("tasks"):
            found["tasks"] = self._tasks(models, dense is not None and "dense" in models, residence)
        return Deployment(**found)

    def _texts(
        self,
        models: Mapping[str, Callable[[], Any]],
        dense: PreTrainedModel | None,
        texts: Mapping[str, Tensor],
        residence: Residence | None,
    ) -> tuple[TextFigures, ...]:
        passes: dict[str, Any] = {
            "batch_size": self.config.search.batch_size,
            "residence": residence,
            "quiet": self.quiet,
        }
        rows: dict[str, list[TextRow]] = {text: [] for text in texts}
        outputs = {
            text: None
            if dense is None
            else DenseOutputs(dense, tokens, description=f"Dense model on {text}", **passes)
            for text, tokens in texts.items()
        }
        for name, make in models.items() if texts else ():
            model = make()
            for text, tokens in texts.items():
                found = evaluate_tokens(model, tokens, reference=outputs[text], name=f"{name} on {text}", **passes)
                rows[text].append(TextRow(name, found.perplexity, found.kl, found.retention))
        return tuple(TextFigures(text, len(texts[text]), tuple(found)) for text, found in rows.items())

    def _tasks(
        self, models: Mapping[str, Callable[[], Any]], has_dense: bool, residence: Residence | None
    ) -> tuple[TaskFigures, ...]:
        scores: dict[str, dict[str, TaskScore]] = {task.name: {} for task in self.tasks}
        options: dict[str, Any] = {
            "batch_size": self.config.search.batch_size,
            "limit": self.config.evaluation.task_limit,
            "residence": residence,
            "quiet": self.quiet,
        }
        for name, make in models.items() if self.tasks else ():
            model = make()
            for task in self.tasks:
                scores[task.name][name] = evaluate_task(model, self.tokenizer, task, **options)
        return tuple(_task_figures(task, found, has_dense) for task, found in scores.items())

    def _generation(
        self, models: Mapping[str, Callable[[], Any]], dense: PreTrainedModel | None, rows: Tensor, at_once: bool
    ) -> GenerationOutcome:
        evaluation = self.config.evaluation
        # each token is a reading of the weights, for as many prompts as there are
        size = evaluation.num_prompts if at_once else self.config.calibration.generation_batch_size
        return measure_generation(
            {name: make for name, make in models.items() if dense is None or name != "dense"},
            dense,
            self.tokenizer,
            self.prompts,
            text_rows=rows,
            num_prompts=evaluation.num_prompts,
            max_new_tokens=evaluation.max_new_tokens,
            seed=self.config.seed,
            batch_size=size,
            quiet=self.quiet,
        )


def verdicts(generation: GenerationOutcome | None, retention: Mapping[str, float | None]) -> tuple[Verdict, ...]:
    """A verdict on each row but the dense model's; none without a dense model beside it.

    Args:
        generation ([`GenerationOutcome`] or `None`): The answers.
        retention (`Mapping[str, float | None]`): For each row's name dense perplexity over its own, on the test rows.
    """
    if generation is None or generation.rows[0].name != "dense":
        return ()
    dense, *others = generation.rows
    chat = generation.asked == "chat"
    return tuple(verdict(row, dense, retention.get(row.name), chat=chat) for row in others)


def requirements(
    config: CLPConfig, judged: Sequence[Verdict], retention: Mapping[str, float | None]
) -> tuple[Requirement, ...]:
    """What the recipe requires, and whether everything that is delivered reaches it: the smaller model and its files.

    Args:
        config ([`CLPConfig`]): The recipe.
        judged (`Sequence[Verdict]`): As [`verdicts`] gives them.
        retention (`Mapping[str, float | None]`): As for [`verdicts`].
    """
    # the untuned cut is measured to compare with, and is not delivered
    left_out = {"dense"} | ({"cut"} if "tuned" in retention else set())
    kept = {entry.name: entry.generation_kept.share for entry in judged}
    found = []
    for name, required, reached in (
        ("retention", config.evaluation.require_retention, retention),
        ("generation", config.evaluation.require_generation, kept),
    ):
        if required is not None:
            delivered = {row: value for row, value in reached.items() if row not in left_out and value is not None}
            worst = min(delivered, key=lambda row: delivered[row], default=None)
            least = None if worst is None else delivered[worst]
            found.append(Requirement(name, required, least, worst, least is not None and least >= required))
    return tuple(found)


def _by_kind(data: CalibrationData) -> dict[str, Tensor]:
    """The test rows of each kind, where there are several."""
    kinds = sorted(set(data.test_kinds))
    if len(kinds) < 2:
        return {}
    return {
        f"test rows: {kind}": data.test[[row for row, other in enumerate(data.test_kinds) if other == kind]]
        for kind in kinds
    }


def _task_figures(task: str, found: dict[str, TaskScore], has_dense: bool) -> TaskFigures:
    some = next(iter(found.values()))
    rows = tuple(
        TaskRow(
            name,
            score.accuracy,
            score.accuracy_stderr,
            score.plain_accuracy,
            task_retention(found["dense"], score) if has_dense else None,
            score.metrics,
        )
        for name, score in found.items()
    )
    return TaskFigures(task, some.num_examples, some.chance, rows, some.lm_eval)

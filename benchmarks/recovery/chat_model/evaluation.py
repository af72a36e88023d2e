"""What is measured of a healed model, by the package's own code: held-out text, recognition, generation.

The parts are independent: one that is missing from a record (another version could not measure it) is measured from the
kept weights alone.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.recovery.chat_model.text import Text
from optimum_clp.calibration.rows import tokenize_dataset
from optimum_clp.evaluation.tasks import Task, evaluate_task, load_task
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs

# kinds of text that the model did not write, and tasks, by their files in the data's folder; measured on only
OTHER_TEXTS = {"c4": "c4/test.jsonl", "wikitext": "wikitext-2/wiki.test.raw"}
TASKS = {"piqa": "tasks/piqa.jsonl", "arc_easy": "tasks/arc_easy.jsonl", "lambada": "tasks/lambada_openai.jsonl"}


@dataclass(frozen=True)
class Size:
    """How much is measured: rows of each text, examples of each task, prompts, new tokens of an answer."""

    rows: int = 24
    examples: int = 300
    prompts: int = 64
    new_tokens: int = 128


class Judge:
    """Measures models beside the dense one.

    Args:
        dense (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        own ([`Text`]): Held-out rows that it wrote.
        data (`Path`): Folder of the other texts and the tasks; what it does not have is left out.
        size ([`Size`]): How much.
        batch_size (`int`): Rows in a forward pass.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        own: Text,
        data: Path,
        size: Size,
        batch_size: int,
    ):
        self.dense, self.tokenizer, self.size, self.batch_size = dense, tokenizer, size, batch_size
        texts = {kind: own.of_kind(kind)[: size.rows] for kind in dict.fromkeys(own.kinds)}
        length = own.tokens.shape[1]
        for name, file in OTHER_TEXTS.items():
            if (data / file).is_file():
                texts[name] = tokenize_dataset(
                    str(data / file), tokenizer, sequence_length=length, num_sequences=size.rows
                )
        self._texts = texts
        self._references: dict[str, DenseOutputs] = {}
        self.tasks = [load_task(name, data / file) for name, file in TASKS.items() if (data / file).is_file()]

    def missing(self, found: dict[str, Any], model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
        """The parts that a record does not have yet, measured one by one."""
        parts = {"texts": self.measure_texts, "tasks": self.measure_tasks}
        if can_generate():
            parts["generation"] = self.measure_generation
        for part, measure in parts.items():
            if part not in found:
                yield part, measure(model)

    def measure_texts(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity and KL on each kind of text."""
        for name, tokens in self._texts.items():
            if name not in self._references:
                self._references[name] = DenseOutputs(self.dense, tokens, batch_size=self.batch_size)
        return {
            name: evaluate_tokens(model, reference.tokens, reference=reference, batch_size=self.batch_size).to_dict()
            for name, reference in self._references.items()
        }

    def measure_tasks(self, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracy on each task."""
        return {task.name: self._score(model, task) for task in self.tasks}

    def _score(self, model: PreTrainedModel, task: Task) -> dict[str, Any]:
        options = {"batch_size": 4 * self.batch_size, "limit": self.size.examples}
        return evaluate_task(model, self.tokenizer, task, **options).to_dict()

    def measure_generation(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the model's answers to prompts are like; of a model without a chat template, its continuations of text."""
        from optimum_clp.evaluation.generation import measure_generation

        outcome = measure_generation(
            {} if model is self.dense else {"healed": model},
            self.dense,
            self.tokenizer,
            text_rows=self._texts["plain"],
            num_prompts=self.size.prompts,
            max_new_tokens=self.size.new_tokens,
            seed=0,
            batch_size=8 * self.batch_size,
        )
        # the dense model comes first
        return asdict(outcome.rows[-1])


def is_complete(found: dict[str, Any]) -> bool:
    """Whether a record has all that can be measured now."""
    return {"texts", "tasks"} <= set(found) and ("generation" in found or not can_generate())


def can_generate() -> bool:
    """Whether the package measures generation."""
    return importlib.util.find_spec("optimum_clp.evaluation.generation") is not None

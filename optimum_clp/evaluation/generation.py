"""What models say when they are asked: loops, endings, the dense model's opinion, and whether answers are right.

Recognition (perplexity, multiple choice) comes back nearly whole after layers were removed while generation does not, so
it is measured apart; `docs/generation.md` gives the reasons and the sources.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import context_limit, text_config
from ..errors import ConfigurationError
from ..report.section import Key
from .answers import Answer, AnswerRules, end_tokens, write_answers
from .checks import is_right_number, parses_as_json
from .judging import JudgedAnswers, Sums, mean, token_mean
from .loops import has_loop, loop_begin
from .prompts import Prompt, load_prompts, spread_over_kinds
from .rendering import PromptTokens, beginnings, decoded, rendered_prompts, template_obstacle

# tokens of a greedy answer that are compared with the dense model's
AGREEMENT_TOKENS = 32
# as ShortOPD samples. At 1 the tail decides: the dense SmolLM2-135M-Instruct's loss on its own answers is then 2.5 nats
# per token, twice that of answers as a user gets them
TEMPERATURE = 0.8
# tokens that a prompt must leave for the answer
_LEAST_ROOM = 16
_EXAMPLES = 8
_EXAMPLE_CHARACTERS = 2000
_SHARE = {"minimum": 0, "maximum": 1}


@dataclass(frozen=True)
class GenerationRow:
    """How a model or a file answers; standard errors are over the prompts. A figure is `None` if it was not measured."""

    name: Annotated[str, Key("As in the rows of `evaluation`.")]
    loops: Annotated[float, Key("Share of greedy answers that have a loop.", **_SHARE, finite=True)]
    loops_error: float | None
    ended: Annotated[float, Key("Share of greedy answers that end by themselves.", **_SHARE, finite=True)]
    ended_error: float | None
    length: Annotated[float, Key("Mean tokens of a greedy answer.", minimum=1, finite=True)]
    length_error: float | None
    sampled_loops: Annotated[float, Key("Share of sampled answers that have a loop.", **_SHARE, finite=True)]
    sampled_ended: Annotated[float, Key("Share of sampled answers that end by themselves.", **_SHARE, finite=True)]
    sampled_length: Annotated[float, Key("Mean tokens of a sampled answer.", minimum=1, finite=True)]
    dense_loss: Annotated[float | None, Key("The dense model's loss on the sampled answers, nats per token.")] = None
    dense_loss_error: float | None = None
    kl: Annotated[float | None, Key("KL(dense || this) on the dense model's sampled answers, nats per token.")] = None
    kl_error: float | None = None
    agreement: Annotated[
        float | None, Key("Share of the first 32 greedy tokens that are the dense model's, place by place.", **_SHARE)
    ] = None
    agreement_error: float | None = None
    json_parses: Annotated[float | None, Key("Share of JSON prompts whose greedy answer parses.", **_SHARE)] = None
    json_parses_error: float | None = None
    arithmetic_right: Annotated[float | None, Key("Share of arithmetic prompts answered right.", **_SHARE)] = None
    arithmetic_right_error: float | None = None


@dataclass(frozen=True)
class AnswerNote:
    """How an answer went, whose words are an example."""

    num_tokens: Annotated[int, Key("The one that ends it included.", minimum=1)]
    ended: Annotated[bool, Key("Whether it ended by itself.")]
    whole: Annotated[bool, Key("Whether the example has all of its words.")]
    loop_at: Annotated[int | None, Key("Character at which its loop begins; null without a loop.", minimum=0)]


@dataclass(frozen=True)
class GenerationExample:
    """How a prompt was answered greedily."""

    prompt: Annotated[str, Key("Its last words.")]
    answers: Annotated[dict[str, str], Key("For each row's name the beginning of its answer.")]
    notes: Annotated[dict[str, AnswerNote], Key("For each row's name how its answer went.", added=True)]


@dataclass(frozen=True)
class GenerationOutcome:
    """The `generation` part of the report's `evaluation`: [`measure_generation`]'s result."""

    asked: Annotated[
        str, Key("Questions through the chat template, or beginnings of text.", choices=("chat", "prompts", "text"))
    ]
    note: Annotated[str | None, Key("Why there are no questions, or what else was done otherwise.")]
    num_prompts: Annotated[int, Key("Prompts that were answered.", minimum=1)]
    num_left_out: Annotated[int, Key("Prompts that are too long for the model.", minimum=0)]
    kinds: Annotated[dict[str, int], Key("Prompts of each kind.")]
    max_new_tokens: Annotated[int, Key("Tokens of an answer, at most.", minimum=1)]
    temperature: Annotated[float, Key("Of the sampled answers.", finite=True)]
    seed: Annotated[int, Key("Of the sampled answers.", minimum=0)]
    rows: tuple[GenerationRow, ...]
    examples: tuple[GenerationExample, ...]


def measure_generation(
    models: Mapping[str, Any],
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt] | None = None,
    *,
    text_rows: torch.Tensor | None = None,
    num_prompts: int = 32,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    quiet: bool = False,
) -> GenerationOutcome:
    """Let models answer the same prompts, greedily and sampled, and measure the answers; the dense model does so once.

    A model whose tokenizer has a chat template is asked questions through it. One without (or with one that raises) goes on
    with held-out text, and the same figures are taken; prompts that are given are then put to it as they are.

    Args:
        models (`Mapping[str, Any]`): For each row's name a model, called like a causal language model of transformers (of
            PyTorch, or an [`OnnxCausalLM`]); or a function that gives one, which is called when its turn comes and whose
            model is dropped after it. Not the dense one.
        dense (`PreTrainedModel` or `None`): The dense model; becomes the first row, `"dense"`. Without it there is no loss,
            no KL and no agreement.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Of all of them.
        prompts (`Sequence[Prompt]`, *optional*): What to ask, see [`load_prompts`]; ours if not given.
        text_rows (`torch.Tensor`, *optional*): Held-out rows, int64 `[rows, length]`, whose beginnings a model without a
            chat template goes on with.
        num_prompts (`int`): How many are used, as many of each kind as can be; at least 1.
        max_new_tokens (`int`): Tokens of an answer, at least 1; fewer where the context ends. Below 64 no loop is found.
        seed (`int`): Each prompt has a random stream of its own: the seed, and its place.
        batch_size (`int`): Prompts answered at once.
        quiet (`bool`): No progress bars.

    Returns:
        [`GenerationOutcome`]: `.rows` has one [`GenerationRow`] for each model, dense first.

    Raises:
        ConfigurationError: If there is neither a chat template nor a text nor a prompt to go on with, the template raises
            for a prompt, or all prompts are longer than the context; if there is no model.
        ModelError: If a model's logits are not finite.
    """
    if dense is None and not models:
        raise ConfigurationError.of("models", {}, "there is none to measure", "Give a model, or the dense one")
    first = dense if dense is not None else _made(next(iter(models.values())))
    limit = context_limit(first.config)
    asked, note, questions, left_out = _questions(prompts, tokenizer, text_rows, num_prompts, limit)
    size = getattr(text_config(first.config), "vocab_size", None) or len(tokenizer or ())
    rules = AnswerRules(
        end_tokens(first, tokenizer),
        size if tokenizer is None else min(size, len(tokenizer)),
        max_new_tokens,
        limit,
        seed=seed,
    )
    del first
    measurement = _Measurement(questions, tokenizer, rules, dense, batch_size, quiet)
    for name, model in models.items():
        measurement.add(name, _made(model))
    return GenerationOutcome(
        asked=asked,
        note=note,
        num_prompts=len(questions),
        num_left_out=left_out,
        kinds=dict(Counter(question.kind for question in questions if question.kind)),
        max_new_tokens=max_new_tokens,
        temperature=TEMPERATURE,
        seed=seed,
        rows=tuple(measurement.rows),
        examples=measurement.examples(),
    )


def check_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None, num_prompts: int, limit: int | None
) -> None:
    """Say before any work what [`measure_generation`] would say of given prompts.

    Args:
        prompts (`Sequence[Prompt]`): What to ask.
        tokenizer (`PreTrainedTokenizerBase` or `None`): The model's.
        num_prompts (`int`): How many are used.
        limit (`int` or `None`): Of the context, in tokens.

    Raises:
        ConfigurationError: If they cannot be put to this model.
    """
    _questions(prompts, tokenizer, None, num_prompts, limit)


def _made(model: Any) -> Any:
    return model if hasattr(model, "config") else model()


def _questions(
    prompts: Sequence[Prompt] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    text_rows: torch.Tensor | None,
    number: int,
    limit: int | None,
) -> tuple[str, str | None, list[PromptTokens], int]:
    """How it is asked, a note, the prompts' tokens, and how many were left out."""
    longest = None if limit is None else limit - _LEAST_ROOM
    obstacle = template_obstacle(tokenizer)
    if obstacle is not None and (prompts is None or tokenizer is None):
        if text_rows is None:
            remedy = "Give text_rows to go on with, or prompts and a tokenizer"
            raise ConfigurationError.of("prompts", None, obstacle, remedy)
        return "text", f"{obstacle}: it goes on with held-out text", beginnings(text_rows, number, tokenizer), 0
    assert tokenizer is not None
    chosen = spread_over_kinds(load_prompts() if prompts is None else prompts, number)
    questions = rendered_prompts(chosen, tokenizer, longest)
    return "chat" if obstacle is None else "prompts", obstacle, questions, len(chosen) - len(questions)


@dataclass
class _Measurement:
    """The rows so far, and the dense model's answers beside which they are set."""

    questions: list[PromptTokens]
    tokenizer: PreTrainedTokenizerBase | None
    rules: AnswerRules
    dense: PreTrainedModel | None
    batch_size: int
    quiet: bool
    rows: list[GenerationRow] = field(default_factory=list)
    greedy: dict[str, list[Answer]] = field(default_factory=dict)
    reference: JudgedAnswers | None = None

    def __post_init__(self) -> None:
        self.prompts = [question.ids for question in self.questions]
        if self.dense is not None:
            self.add("dense", self.dense)

    def add(self, name: str, model: Any) -> None:
        """Let a model answer, and measure its answers."""
        greedy, sampled = self._write(name, model, None), self._write(name, model, TEMPERATURE)
        self.greedy[name] = greedy
        figures: dict[str, Any] = _shape("", greedy) | _shape("sampled_", sampled) | self._checks(greedy)
        if self.dense is not None:
            figures |= self._beside_dense(name, model, greedy, sampled)
        known = GenerationRow.__dataclass_fields__
        self.rows.append(GenerationRow(name=name, **{key: value for key, value in figures.items() if key in known}))

    def examples(self) -> tuple[GenerationExample, ...]:
        """Some prompts, of kinds that are unlike, and the beginnings of all rows' answers."""
        kinds: dict[str, int] = {}
        for index, question in enumerate(self.questions):
            kinds.setdefault(question.kind or str(index), index)
        chosen = sorted(kinds.values())[:: max(1, len(kinds) // _EXAMPLES)][:_EXAMPLES] if self.tokenizer else []
        return tuple(self._example(index) for index in chosen)

    def _example(self, index: int) -> GenerationExample:
        said = {name: answers[index] for name, answers in self.greedy.items()}
        words = {name: self._words(answer) for name, answer in said.items()}
        notes = {name: self._note(answer, words[name]) for name, answer in said.items()}
        shown = {name: text[:_EXAMPLE_CHARACTERS] for name, text in words.items()}
        return GenerationExample(self.questions[index].shown, shown, notes)

    def _note(self, answer: Answer, words: str) -> AnswerNote:
        begin = loop_begin(answer.words)
        if begin is not None and self.tokenizer is not None:
            begin = len(decoded(self.tokenizer, answer.words[:begin]))
        return AnswerNote(len(answer.tokens), answer.ended, len(words) <= _EXAMPLE_CHARACTERS, begin)

    def _write(self, name: str, model: Any, temperature: float | None) -> list[Answer]:
        rules = AnswerRules(**{**vars(self.rules), "temperature": temperature})
        said = f"Answers, {name}, {'greedy' if temperature is None else 'sampled'}"
        return write_answers(model, self.prompts, rules, batch_size=self.batch_size, name=said, quiet=self.quiet)

    def _words(self, answer: Answer) -> str:
        return "" if self.tokenizer is None else decoded(self.tokenizer, answer.words)

    def _checks(self, greedy: list[Answer]) -> dict[str, float | None]:
        asked = list(zip(self.questions, greedy, strict=True))
        parsed = [float(parses_as_json(self._words(a))) for q, a in asked if q.kind == "json"]
        right = [
            float(is_right_number(self._words(a), q.answer))
            for q, a in asked
            if q.kind == "arithmetic" and q.answer is not None
        ]
        return _figure("json_parses", parsed) | _figure("arithmetic_right", right)

    def _beside_dense(
        self, name: str, model: Any, greedy: list[Answer], sampled: list[Answer]
    ) -> dict[str, float | None]:
        assert self.dense is not None
        judged = JudgedAnswers(self.dense, self.prompts, [answer.tokens for answer in sampled], quiet=self.quiet)
        if self.reference is None:
            self.reference = judged
        divergences: Sums = [(0.0, 1)] * len(sampled)
        if model is not self.dense:
            divergences = self.reference.divergences(model, name)
        same = [_agreement(ours, theirs) for ours, theirs in zip(greedy, self.greedy["dense"], strict=True)]
        loss, kl = token_mean(judged.losses()), token_mean(divergences)
        return {"dense_loss": loss[0], "dense_loss_error": loss[1], "kl": kl[0], "kl_error": kl[1]} | _figure(
            "agreement", same
        )


def _shape(prefix: str, answers: list[Answer]) -> dict[str, float | None]:
    return (
        _figure(f"{prefix}loops", [float(has_loop(answer.words)) for answer in answers])
        | _figure(f"{prefix}ended", [float(answer.ended) for answer in answers])
        | _figure(f"{prefix}length", [float(len(answer.tokens)) for answer in answers])
    )


def _figure(name: str, values: list[float]) -> dict[str, float | None]:
    """A mean and its standard error; none without a value."""
    if not values:
        return {}
    middle, error = mean(values)
    return {name: middle, f"{name}_error": error}


def _agreement(ours: Answer, theirs: Answer) -> float:
    """Share of the first places at which two answers have the same token; a place that only one of them has counts as not."""
    a, b = ours.tokens[:AGREEMENT_TOKENS], theirs.tokens[:AGREEMENT_TOKENS]
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b))

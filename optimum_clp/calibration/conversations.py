"""Conversations that a chat model writes itself, through its own template (Magpie, arXiv 2406.08464).

The template is given up to where the user's words begin; the model writes them; the template closes them and opens the
assistant's turn; the model answers. One to three turns are a conversation; another one follows until the row is full, as
documents do in plain text, so that no token is padding and a row begins where a conversation does.
"""

import hashlib
import itertools
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sample_cache import Sample
from .self_written import document_rules, named_tokens
from .summary import ConversationStatistics
from .templates import ChatTemplate, first_words, split_template
from .writing import Script, Wish, Writing, write_sample

TEMPLATE, USER, ASSISTANT = 0, 1, 2
MOST_TURNS = 3
# tokens that the user's words may have, as a share of a row: a row should hold the answer too
_QUESTION_SHARE = 0.25
# tokens of an answer that does not end by itself; longer rows go on with another conversation
_LONGEST_ANSWER = 1024
# between two prompts of a row; a prime, so that the rows' prompts are not the same few ones
_STRIDE = 7919
# tokens of a question by which it is told from others
_OPENING_TOKENS = 8


@dataclass(frozen=True)
class _Limits:
    """Tokens after which the template's end is forced."""

    question: int
    answer: int


def sample_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    grows: bool = True,
    openings: Sequence[str] = (),
    openings_share: float = 0.0,
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> Sample:
    """Let a chat model write rows of conversations.

    Args:
        model, num_sequences, sequence_length, seed, temperature, batch_size, grows: As in [`Writing`].
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        openings (`Sequence[str]`): First words of the user, which the model goes on from.
        openings_share (`float`): Of the conversations, in [0, 1]: those that begin with one of `openings`.
        cache_dir, fingerprint, quiet, dealt: As in [`Writing`].

    Returns:
        [`Sample`]: Its `roles` are 0 for the template's tokens, 1 for the user's and 2 for the assistant's; the token that
        ends a turn is its writer's, unless it was forced after too long a turn.

    Raises:
        CalibrationError: If the template cannot be taken apart ([`split_template`]), or logits are not finite.
    """
    words = first_words(tokenizer, openings if openings_share else ())
    template = model_template(model, tokenizer)
    limits = _limits(sequence_length)
    asked = {"openings": words, "openings_share": openings_share, "turns": MOST_TURNS}
    parameters = {"template": asdict(template), "limits": asdict(limits), **asked}

    def script(row: int, uniforms: Tensor) -> Script:
        return _Talk(template, limits, uniforms, words, openings_share).script()

    size = num_sequences, sequence_length, seed, temperature, batch_size, document_rules(model, tokenizer).vocabulary
    kept: dict[str, Any] = {"cache_dir": cache_dir, "fingerprint": fingerprint, "quiet": quiet, "dealt": dealt}
    writing = Writing(model, *size, grows, roles=True, **kept)
    return write_sample(writing, script, {**writing.parameters(), **parameters})


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> Sample:
    """Let a chat model answer prompts, one after the other in each row.

    Args:
        model, tokenizer: As in [`sample_conversations`].
        prompts (`Sequence[Sequence[int]]`): Tokens up to where the assistant begins to write. Each is answered about as often
            as the others.
        num_sequences, sequence_length, seed, temperature, batch_size: As in [`Writing`].
        cache_dir, fingerprint, quiet, dealt: As in [`Writing`].

    Returns:
        [`Sample`]: Its `roles` are 2 for the assistant's tokens and 0 for the others.

    Raises:
        CalibrationError: As [`sample_conversations`].
    """
    template, limits = model_template(model, tokenizer), _limits(sequence_length)
    asked = hashlib.sha256(repr([tuple(prompt) for prompt in prompts]).encode()).hexdigest()
    parameters = {"template": asdict(template), "limits": asdict(limits), "prompts": asked}

    def script(row: int, uniforms: Tensor) -> Script:
        return _Talk(template, limits, uniforms).answers(prompts, row)

    size = num_sequences, sequence_length, seed, temperature, batch_size, document_rules(model, tokenizer).vocabulary
    kept: dict[str, Any] = {"cache_dir": cache_dir, "fingerprint": fingerprint, "quiet": quiet, "dealt": dealt}
    writing = Writing(model, *size, roles=True, **kept)
    return write_sample(writing, script, {**writing.parameters(), **parameters})


def conversation_statistics(sample: Sample, template: ChatTemplate) -> ConversationStatistics:
    """How many kinds of questions a model has written, and how many of its answers end by themselves.

    Args:
        sample ([`Sample`]): With roles.
        template ([`ChatTemplate`]): Which it was written through.
    """
    assert sample.roles is not None
    openings, ended, whole = [], 0, 0
    for tokens, roles in zip(sample.tokens.tolist(), sample.roles.tolist(), strict=True):
        place = 0
        for role, run in itertools.groupby(roles):
            begin, place = place, place + len(list(run))
            if role == USER:
                openings.append(tuple(tokens[begin : min(place, begin + _OPENING_TOKENS)]))
            elif role == ASSISTANT:
                ends = tokens[place - 1] in template.answer_ends
                ended, whole = ended + ends, whole + (ends or place < len(tokens))
    return ConversationStatistics(
        questions=len(openings),
        distinct_openings_share=len(set(openings)) / max(len(openings), 1),
        answers=whole,
        ended_share=ended / max(whole, 1),
    )


def model_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate:
    """The tokenizer's template, with the tokens that end a text for the model.

    Raises:
        CalibrationError: As [`split_template`].
    """
    return split_template(tokenizer, named_tokens(model, tokenizer, "eos"))


def _limits(sequence_length: int) -> _Limits:
    return _Limits(max(1, int(_QUESTION_SHARE * sequence_length)), _LONGEST_ANSWER)


class _Talk:
    """One row of conversations, as a script.

    Args:
        template ([`ChatTemplate`]): The model's.
        limits ([`_Limits`]): Of a turn.
        uniforms (`Tensor`): float64 `[length]`: what is chosen beside the tokens is chosen by a number of a position where
            the template's token is forced.
        words (`Sequence[Sequence[int]]`): First words of the user, as tokens.
        share (`float`): Of the conversations: those that begin with one of `words`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        limits: _Limits,
        uniforms: Tensor,
        words: Sequence[Sequence[int]] = (),
        share: float = 0.0,
    ):
        self.template, self.limits, self.uniforms = template, limits, uniforms.tolist()
        self.words, self.share = words, share
        self.position = 0

    def script(self) -> Script:
        """One conversation after the other."""
        while True:
            yield from self._conversation()

    def answers(self, prompts: Sequence[Sequence[int]], row: int) -> Script:
        """Prompts with their answers: the one of the row's number first, and then others far from it."""
        closing = self.template.closing
        for number in itertools.count(row, _STRIDE):
            yield from self._forced(prompts[number % len(prompts)])
            end = yield from self._answered()
            if end is None or end == next(iter(closing), None):
                yield from self._forced(closing if end is None else closing[1:])

    def _conversation(self) -> Script:
        template = self.template
        turns, words = self._chosen()
        yield from self._forced(template.opening)
        yield from self._forced(words, USER)
        for turn in range(1, turns + 1):
            rest = yield from self._asked()
            if rest is None:
                return
            yield from self._forced(rest)
            after = template.closing if turn == turns or template.question is None else template.question
            end = yield from self._answered()
            if end is not None and end != next(iter(after), None):
                return
            yield from self._forced(after if end is None else after[1:])

    def _chosen(self) -> tuple[int, Sequence[int]]:
        """The number of turns, and the user's first words."""
        # the script is asked once more when the row is full
        number = self.uniforms[min(self.position, len(self.uniforms) - 1)] * MOST_TURNS
        turns, rest = 1 + int(number), number % 1
        words = self.words[int(rest / self.share * len(self.words))] if self.words and rest < self.share else ()
        return (turns if self.template.question is not None else 1), words

    def _asked(self) -> Generator[Wish, int, Sequence[int] | None]:
        """The user's words; what remains of the template's tokens behind them, or `None` if the text has ended."""
        end = self.template.question_end
        written: list[int] = []
        while len(written) < self.limits.question:
            written.append((yield from self._drawn(USER)))
            if tuple(written[-len(end) :]) == end:
                return self.template.answer_rest
            if written[-1] in self.template.ends:
                return None
        return self.template.answer

    def _answered(self) -> Generator[Wish, int, int | None]:
        """The assistant's words; the token that ended them, or `None` if they had to be ended."""
        for _ in range(self.limits.answer):
            token = yield from self._drawn(ASSISTANT)
            if token in self.template.answer_ends:
                return token
        return None

    def _drawn(self, role: int) -> Generator[Wish, int, int]:
        token = yield Wish(None, role)
        self.position += 1
        return token

    def _forced(self, tokens: Sequence[int], role: int = TEMPLATE) -> Script:
        for token in tokens:
            yield Wish(token, role)
            self.position += 1

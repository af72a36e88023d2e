"""Conversations that a chat model writes itself, through its own template (Magpie, arXiv 2406.08464).

The template is given up to where the user's words begin; the model writes them; the template closes them and opens the
assistant's turn; the model answers. One to three turns are a conversation; another one follows until the row is full, as
documents do in plain text, so that no token is padding and a row begins where a conversation does.
"""

import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sample_cache import Sample
from .self_written import document_rules, named_tokens
from .templates import ChatTemplate, split_template
from .writing import Script, Wish, Writing, write_sample

TEMPLATE, USER, ASSISTANT = 0, 1, 2
MOST_TURNS = 3
# tokens that the user's words may have, as a share of a row: a row should hold the answer too
_QUESTION_SHARE = 0.25
# tokens of an answer that does not end by itself; longer rows go on with another conversation
_LONGEST_ANSWER = 1024


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
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    quiet: bool = False,
) -> Sample:
    """Let a chat model write rows of conversations.

    Args:
        model, num_sequences, sequence_length, seed, temperature, batch_size: As in [`Writing`].
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        cache_dir, fingerprint, quiet: As in [`Writing`].

    Returns:
        [`Sample`]: Its `roles` are 0 for the template's tokens, 1 for the user's and 2 for the assistant's; the token that
        ends a turn is its writer's, unless it was forced after too long a turn.

    Raises:
        CalibrationError: If the template cannot be taken apart ([`split_template`]), or logits are not finite.
    """
    template = split_template(tokenizer, named_tokens(model, tokenizer, "eos"))
    limits = _Limits(max(1, int(_QUESTION_SHARE * sequence_length)), _LONGEST_ANSWER)
    writing = Writing(
        model,
        num_sequences,
        sequence_length,
        seed,
        temperature,
        batch_size,
        document_rules(model, tokenizer).vocabulary,
        roles=True,
        cache_dir=cache_dir,
        fingerprint=fingerprint,
        quiet=quiet,
    )
    parameters = {**writing.parameters(), "template": asdict(template), "limits": asdict(limits), "turns": MOST_TURNS}
    return write_sample(writing, lambda row, uniforms: _Talk(template, limits, uniforms).script(), parameters)


class _Talk:
    """One row of conversations, as a script.

    Args:
        template ([`ChatTemplate`]): The model's.
        limits ([`_Limits`]): Of a turn.
        uniforms (`Tensor`): float64 `[length]`: what is chosen beside the tokens is chosen by a number of a position where
            the template's token is forced.
    """

    def __init__(self, template: ChatTemplate, limits: _Limits, uniforms: Tensor):
        self.template, self.limits, self.uniforms = template, limits, uniforms.tolist()
        self.position = 0

    def script(self) -> Script:
        """One conversation after the other."""
        while True:
            yield from self._conversation()

    def _conversation(self) -> Generator[Wish, int, None]:
        template = self.template
        # the script is asked once more when the row is full
        number = self.uniforms[min(self.position, len(self.uniforms) - 1)]
        turns = 1 if template.question is None else 1 + int(number * MOST_TURNS)
        yield from self._forced(template.opening)
        for turn in range(1, turns + 1):
            said = yield from self._asked()
            if said is None:
                return
            yield from self._forced(template.answer[said:])
            after = template.closing if turn == turns or template.question is None else template.question
            end = yield from self._answered()
            if end is not None and end != next(iter(after), None):
                return
            yield from self._forced(after if end is None else after[1:])

    def _asked(self) -> Generator[Wish, int, int | None]:
        """The user's words; how many of the template's next tokens were written with them, or `None` if all has ended."""
        end, written = self.template.question_end, []
        while len(written) < self.limits.question:
            written.append((yield from self._drawn(USER)))
            if tuple(written[-len(end) :]) == end:
                return len(end)
            if written[-1] in self.template.ends:
                return None
        return 0

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

    def _forced(self, tokens: Sequence[int]) -> Generator[Wish, int, None]:
        for token in tokens:
            yield Wish(token, TEMPLATE)
            self.position += 1

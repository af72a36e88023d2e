"""Several models that answer at once, a token each in turn.

Each answer is transformers' own `generate()` in a thread of its own, which waits after every token until it is told to go on.
So only one model computes at a time, all answers grow side by side, and the speed that is shown is the model's own: its
time is taken while nobody else has the processor.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..evaluation.answers import end_tokens
from ..evaluation.loops import loop_begin
from ..evaluation.rendering import decoded
from .speakers import Speaker, Speakers

# what a decoder writes for the first bytes of a character
_UNFINISHED = "\ufffd"
# a loop is looked for once in so many tokens
_LOOK_EVERY = 8


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are written.

    Args:
        max_new_tokens (`int`): Tokens that one may have, at least 1.
        temperature (`float`): Of sampling, at least 0.001; or 0, at which the most likely token is taken.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0


class Answering:
    """An answer that is being written.

    Args:
        speakers ([`Speakers`]): For the tokenizer.
        speaker ([`Speaker`]): Who answers.
        ids (`Sequence[int]`): The prompt's tokens, at least one.
        settings ([`AnswerSettings`]): How.

    Attributes:
        text (`str`): What is written so far.
        tokens (`list[int]`): The same; with the one that ends it, if it has ended by itself.
        seconds (`float`): Time that it took so far.
        first_seconds (`float` or `None`): Of these, until the first token was there.
        loop (`int` or `None`): Token at which a loop begins.
        ended (`bool`): Whether it has ended by itself.
        error (`Exception` or `None`): What went wrong.
        done (`bool`): Whether no more will come.
    """

    def __init__(self, speakers: Speakers, speaker: Speaker, ids: Sequence[int], settings: AnswerSettings):
        self.name = speaker.name
        self.text, self.tokens, self.seconds = "", list[int](), 0.0
        self.first_seconds: float | None = None
        self.loop: int | None = None
        self.error: Exception | None = None
        self.ended = self.done = False
        self._tokenizer, self._ends = speakers.tokenizer, end_tokens(speaker.model, speakers.tokenizer)
        self._steps: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._go, self._stopped = threading.Semaphore(0), False
        arguments = (speaker.model, tuple(ids), settings)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def advance(self) -> str:
        """Let one more token be written.

        Returns:
            `str`: What was added to the text; empty where a character is not whole yet, or the answer is done.
        """
        if self.done:
            return ""
        begin = time.perf_counter()
        self._go.release()
        step = self._steps.get()
        self.seconds += time.perf_counter() - begin
        if step is None:
            self._thread.join()
            self.done = True
            self.ended = bool(self.tokens) and self.tokens[-1] in self._ends
            self.loop = loop_begin(self._words())
            return self._added(whole=True)
        if self.first_seconds is None:
            self.first_seconds = self.seconds
        self.tokens += step
        if len(self.tokens) % _LOOK_EVERY == 0:
            self.loop = loop_begin(self._words())
        return self._added()

    def stop(self) -> None:
        """Let it end after the token that is being written; may be called from another thread."""
        self._stopped = True

    def finish(self) -> None:
        """Stop it, and wait until its thread has ended."""
        self.stop()
        while not self.done:
            self.advance()

    @property
    def tokens_per_second(self) -> float | None:
        """Of all tokens after the first, which waits for the prompt; `None` before the second."""
        if self.first_seconds is None or len(self.tokens) < 2 or self.seconds <= self.first_seconds:
            return None
        return (len(self.tokens) - 1) / (self.seconds - self.first_seconds)

    def figures(self) -> dict[str, Any]:
        """How it goes, as JSON-ready values."""
        speed = self.tokens_per_second
        return {
            "tokens": len(self.tokens),
            "tokens_per_second": None if speed is None else round(speed, 2),
            "loops": self.loop is not None,
            "ended": self.ended,
            "done": self.done,
        }

    def _words(self) -> list[int]:
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in self._ends else self.tokens

    def _added(self, whole: bool = False) -> str:
        now = decoded(self._tokenizer, self._words())
        if not whole and now.endswith(_UNFINISHED):
            return ""
        # a tokenizer that takes back what it has shown is not followed
        added = now[len(self.text) :]
        self.text += added
        return added

    def _write(self, model: Any, ids: tuple[int, ...], settings: AnswerSettings) -> None:
        self._go.acquire()
        try:
            self._generate(model, torch.tensor([ids], device=getattr(model, "device", "cpu")), settings)
        except Exception as error:  # whatever a model raises is said in its column
            self.error = error
        finally:
            self._steps.put(None)

    def _generate(self, model: Any, prompt: torch.Tensor, settings: AnswerSettings) -> None:
        if self._stopped:
            return
        # the same rules for all: a checkpoint's own sampling defaults would make answers that cannot be compared
        sampled = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        rules = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
            **(sampled if settings.temperature > 0 else {"do_sample": False}),
        )
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=rules,
            streamer=_Steps(self._step),
            stopping_criteria=StoppingCriteriaList([_Stopped(lambda: self._stopped)]),
        )

    def _step(self, tokens: list[int]) -> None:
        self._steps.put(tokens)
        self._go.acquire()


def answer_in_turn(answers: Sequence[Answering]) -> Iterator[tuple[Answering, str]]:
    """Let each answer grow by a token in turn, until all are done.

    Args:
        answers (`Sequence[Answering]`): Fresh ones. All of them are stopped when the iteration ends, however it does.

    Yields:
        `tuple[Answering, str]`: An answer, and what was added to its text; once more when it is done.
    """
    with contextlib.ExitStack() as stack:
        for answer in answers:
            stack.callback(answer.finish)
        going = list(answers)
        while going:
            for answer in list(going):
                added = answer.advance()
                if answer.done:
                    going.remove(answer)
                yield answer, added


@dataclass
class _Steps(BaseStreamer):
    """Hands on the tokens of each step, but for the prompt, which comes first."""

    hand_on: Any
    _prompt: bool = field(default=True, init=False)

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.hand_on(value.reshape(-1).tolist())

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: Any):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)

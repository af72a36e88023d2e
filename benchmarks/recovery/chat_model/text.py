"""Text that a chat model writes, plain and as conversations, in files of rows that every method reads in the same order.

A file holds `tokens`, int32 `[rows, length]`, and `kinds`, uint8 `[rows]`: an index into `KINDS`.
"""

import hashlib
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_clp.calibration.self_written import sample_text
from optimum_clp.forward.decoding import cache_keyword, cache_of
from optimum_clp.forward.hooks import evaluation_mode
from optimum_clp.progress import progress_bar

KINDS = ("plain", "conversations")
# what stands where somebody's words would; no tokenizer has it as one token
USER, ASSISTANT = "@@u@@", "@@a@@"
# a turn that does not end by itself is ended, or one talk would be a whole row
QUESTION_TOKENS, ANSWER_TOKENS = 64, 160


@dataclass(frozen=True)
class Text:
    """Rows of tokens.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`.
        kinds (`tuple[str, ...]`): Of each row, from `KINDS`.
    """

    tokens: Tensor
    kinds: tuple[str, ...]

    def of_kind(self, kind: str) -> Tensor:
        return self.tokens[torch.tensor([k == kind for k in self.kinds], dtype=torch.bool)]

    def split(self, held_out: int) -> tuple["Text", "Text"]:
        """All but the last `held_out` rows of each kind, and these."""
        places = {kind: [i for i, k in enumerate(self.kinds) if k == kind][-held_out:] for kind in set(self.kinds)}
        last = sorted(i for rows in places.values() for i in rows)
        first = [i for i in range(len(self.kinds)) if i not in set(last)]
        return self.rows(first), self.rows(last)

    def rows(self, indices: list[int]) -> "Text":
        return Text(self.tokens[indices], tuple(self.kinds[i] for i in indices))


def load_text(file: Path) -> Text:
    stored = load_file(file)
    return Text(stored["tokens"].long(), tuple(KINDS[i] for i in stored["kinds"].tolist()))


def save_text(file: Path, text: Text) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = torch.tensor([KINDS.index(kind) for kind in text.kinds], dtype=torch.uint8)
    save_file({"tokens": text.tokens.int(), "kinds": kinds}, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)


def written_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    num_rows: int,
    length: int,
    seed: int,
    batch_size: int,
) -> Text:
    """Rows that the model wrote, half of them conversations, in an order drawn from the seed; written once.

    A model without a chat template writes plain text alone.
    """
    if file.is_file():
        return load_text(file)
    # the package keeps unfinished text there, batch by batch
    options = {"sequence_length": length, "seed": seed, "batch_size": batch_size, "cache_dir": file.parent}
    talks = num_rows // 2 if tokenizer.chat_template else 0
    plain = sample_text(model, num_sequences=num_rows - talks, tokenizer=tokenizer, **options).tokens
    kinds = ["plain"] * len(plain) + ["conversations"] * talks
    tokens = torch.cat([plain, _conversations(model, tokenizer, num_sequences=talks, **options)]) if talks else plain
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    text = Text(tokens, tuple(kinds)).rows(order)
    save_text(file, text)
    return text


@dataclass(frozen=True)
class Template:
    """A chat template's pieces, as tokens: before the first question, between the words of a talk, and behind the last."""

    opening: list[int]
    to_answer: list[int]
    to_question: list[int]
    closing: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        talk = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
        text = tokenizer.apply_chat_template(talk * 2, tokenize=False)
        places, pieces = (USER, ASSISTANT, USER, ASSISTANT), []
        for place in places:
            piece, _, text = text.partition(place)
            pieces.append(piece)
        opening, to_answer, to_question, _, closing = (
            tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (*pieces, text)
        )
        return cls(opening, to_answer, to_question, closing)

    def prompts(self, rows: Tensor) -> list[Tensor]:
        """Of rows of conversations the first question, up to where the answer begins."""
        found = []
        for row in rows.tolist():
            size = len(self.to_answer)
            place = next((i for i in range(len(row) - size) if row[i : i + size] == self.to_answer), None)
            if place is not None:
                found.append(torch.tensor(row[: place + size]))
        return found


@dataclass
class Talk:
    """Where one row is: what the template forces next, whose turn it is, how long it has been."""

    template: Template
    forced: list[int] = field(default_factory=list)
    answers: bool = False
    turns: int = 0
    spoken: int = 0

    def __post_init__(self):
        self.forced = list(self.template.opening)

    def next(self, drawn: int, more: bool) -> int:
        """The token that follows: the template's, or the drawn one; `more`: whether another question would follow."""
        if self.forced:
            return self.forced.pop(0)
        piece = self.template.to_question if self.answers else self.template.to_answer
        limit = ANSWER_TOKENS if self.answers else QUESTION_TOKENS
        if drawn == piece[0] or self.spoken == limit:
            self._turn(piece, more)
            return self.forced.pop(0)
        self.spoken += 1
        return drawn

    def _turn(self, piece: list[int], more: bool) -> None:
        self.forced = list(piece)
        self.turns += self.answers
        if self.answers and (self.turns == 3 or not more):
            self.forced, self.turns = [*self.template.closing, *self.template.opening], 0
        self.answers, self.spoken = not self.answers, 0


def _conversations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Tensor:
    """By the package where it writes conversations, else by the stand-in below."""
    if importlib.util.find_spec("optimum_clp.calibration.conversations") is not None:
        from optimum_clp.calibration.conversations import sample_conversations

        return sample_conversations(model, tokenizer, **options).tokens
    options.pop("cache_dir")
    return stand_in_conversations(model, tokenizer, **options)


@torch.no_grad()
def stand_in_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Conversations through the model's own template (Magpie, arXiv 2406.08464): it writes the questions, then the answers.

    A stand-in until the package writes them itself: plain sampling, one to three turns, talk after talk until a row is full.

    Returns:
        `Tensor`: int64 `[num_sequences, sequence_length]`.
    """
    template, keyword, batches = Template.of(tokenizer), cache_keyword(model), []
    with evaluation_mode(model), progress_bar(num_sequences * sequence_length, "Writing conversations") as bar:
        for first in range(0, num_sequences, batch_size):
            rows = range(first, min(first + batch_size, num_sequences))
            draws = torch.stack([_stream(seed, row, sequence_length) for row in rows])
            talks = [Talk(template) for _ in rows]
            current = [talk.next(-1, False) for talk in talks]
            columns, cache = [current], None
            for position in range(1, sequence_length):
                ids = torch.tensor(current, device=model.device)[:, None]
                output = model(input_ids=ids, use_cache=True, **{keyword: cache})
                cache = cache_of(output)
                total = output.logits[:, -1, : len(tokenizer)].float().softmax(-1).cumsum(-1, dtype=torch.float64)
                chosen = torch.searchsorted(total, draws[:, position, None].to(total) * total[:, -1:])
                more = draws[:, position - 1] < 0.5
                current = [t.next(d, m) for t, d, m in zip(talks, chosen[:, 0].tolist(), more.tolist(), strict=True)]
                columns.append(current)
                bar.update(len(rows))
            batches.append(torch.tensor(columns).T)
    return torch.cat(batches)


def _stream(seed: int, row: int, length: int) -> Tensor:
    digest = hashlib.sha256(f"talk:{seed}:{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(length, generator=generator, dtype=torch.float64)

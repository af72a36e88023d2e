"""Text that a chat model writes, plain and as conversations, in files of rows that every method reads in the same order.

A file holds `tokens`, int32 `[rows, length]`, and `kinds`, uint8 `[rows]`: an index into `KINDS`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_clp.calibration.conversations import sample_conversations
from optimum_clp.calibration.self_written import sample_text

KINDS = ("plain", "conversations")


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
    spoken = [sample_conversations(model, tokenizer, num_sequences=talks, **options).tokens] if talks else []
    tokens = torch.cat([plain, *spoken])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    text = Text(tokens, tuple(kinds)).rows(order)
    save_text(file, text)
    return text


def questions(rows: Tensor, answer: Sequence[int]) -> list[Tensor]:
    """Of rows of conversations the first question, up to where the assistant begins to write.

    Args:
        rows (`Tensor`): int64 `[rows, length]`.
        answer (`Sequence[int]`): What the chat template has between the user's and the assistant's words.
    """
    found, size = [], len(answer)
    for row in rows.tolist():
        place = next((i for i in range(len(row) - size) if tuple(row[i : i + size]) == tuple(answer)), None)
        if place is not None:
            found.append(torch.tensor(row[: place + size]))
    return found

"""Healing on what the cut model says itself: it writes, and the dense model says what it would have said there.

Given text shows the cut model only states that the dense model's text leads to. What it writes leads elsewhere, and errors
add up there. In rounds, as it writes something else when it has learnt (generalized knowledge distillation, arXiv
2306.13649); half of each round's rows are given ones, so that what was learnt from these is kept.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architecture.lookup import num_layers
from .calibration.practice import OWN, practice_rows
from .calibration.rows import CalibrationData
from .calibration.splits import GIVEN, TextRows, joined
from .evaluation.loops import LONGEST_PERIOD, loop_begin
from .processes import gathered
from .segments import endpoint_layers, kept_layers
from .session import Session
from .tuning.endpoints import tune_layers
from .tuning.result import OnPolicyRound

# validation rows of its own, as a share of those that it learns from
_VALIDATION_SHARE = 0.125


def practise(
    session: Session, data: CalibrationData, folder: Path | None, seconds_left: Callable[[], float] | None = None
) -> tuple[OnPolicyRound, ...]:
    """Run `tuning.on_policy_rounds` rounds on the session's cut model, as long as they help.

    A round that makes any kind of text worse, or its own, leaves the weights as they were, and is the last.

    Args:
        session ([`Session`]): With a healed cut model, which is changed.
        data ([`CalibrationData`]): What it was healed on.
        folder (`Path`, *optional*): For checkpoints.
        seconds_left (`Callable`, *optional*): Of a time budget: no round begins that would not end in time.

    Raises:
        TuningError: If a loss is not finite; the last good weights are in the model.
    """
    rounds: list[OnPolicyRound] = []
    for number in range(session.config.tuning.on_policy_rounds):
        # several processes go on as the first one does: their clocks differ
        enough = seconds_left is None or not rounds or seconds_left() >= rounds[-1].seconds
        if not gathered(enough)[0]:
            break
        rounds.append(_round(session, data, number, None if folder is None else folder / f"on-policy-{number}"))
        if not rounds[-1].improved:
            break
    return tuple(rounds)


def _round(session: Session, data: CalibrationData, number: int, folder: Path | None) -> OnPolicyRound:
    begin = time.perf_counter()
    config, dense, model, segments = session.config, session.dense(), session.cut_model(), session.segments or ()
    tuning, depth = config.tuning, num_layers(dense.config)
    size = tuning.on_policy_sequences
    asked: dict[str, Any] = {
        "batch_size": config.calibration.generation_batch_size,
        "cache_dir": config.calibration.cache_dir,
        "quiet": session.quiet,
        "dealt": True,
    }

    def own(rows: Tensor, count: int, seed: int) -> TextRows:
        return without_loops(practice_rows(model, session.tokenizer, rows, num_sequences=count, seed=seed, **asked))

    # plain text depends on the seed alone: with the same one, the rows that judge would be rows that are learnt
    seed = config.seed + 2 * number
    learnt = own(data.train, size, seed)
    judged = own(data.validation, max(1, round(_VALIDATION_SHARE * size)), seed + 1)
    # other given rows in every round
    chosen = (torch.arange(size) + number * size) % len(data.train)
    mask = None if data.train_mask is None else data.train_mask[chosen]
    train = joined([learnt, TextRows(data.train[chosen], (GIVEN,) * size, mask)])
    kinds = data.validation_kinds or (GIVEN,) * len(data.validation)
    validation = joined([judged, TextRows(data.validation, kinds, data.validation_mask)])
    result = tune_layers(
        model,
        dense,
        endpoint_layers(segments, depth, tuning.endpoint_width),
        train.tokens,
        validation.tokens,
        dataclasses.replace(tuning, loss="jsd", init="none", hidden_epochs=0, epochs=1, overparametrization="none"),
        kept=kept_layers(segments, depth),
        validation_kinds=validation.kinds,
        masks=(train.mask, validation.mask),
        seed=config.seed + number,
        folder=folder,
        quiet=session.quiet,
    )
    kept = next(step for step in result.history if step.step == result.best_step)
    before, after = result.history[0].by_kind or {}, kept.by_kind or {}
    return OnPolicyRound(
        num_tokens=int(learnt.tokens.numel() if learnt.mask is None else learnt.mask.sum()),
        own_loss_before=before[OWN],
        own_loss=after[OWN],
        improved=result.improved,
        seconds=time.perf_counter() - begin,
    )


def without_loops(rows: TextRows) -> TextRows:
    """The same rows; what the model says once it has come round in a loop does not count: there the dense model too
    expects the same again.

    Args:
        rows ([`TextRows`]): With a mask of what the model said, or all of it.
    """
    mask = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.mask is None else rows.mask.clone()
    for tokens, counted in zip(rows.tokens.tolist(), mask, strict=True):
        for first, last in _runs(counted.tolist()):
            begin = loop_begin(tokens[first:last])
            if begin is not None:
                counted[first + begin + LONGEST_PERIOD : last] = False
    return dataclasses.replace(rows, mask=mask)


def _runs(counted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where runs of true values begin, and where they have ended."""
    place = 0
    for value, run in itertools.groupby(counted):
        size = len(list(run))
        if value:
            yield place, place + size
        place += size

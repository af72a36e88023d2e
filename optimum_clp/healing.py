"""Healing within a time budget: short pilots say how long it takes and what more text brings; the rest of the time buys text.

Search, text and tuning share the budget. What comes after them (files, figures) is not counted: how long that takes does
not depend on how well a model is healed.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture.lookup import decoder_layers, num_layers
from .calibration.rows import CalibrationData
from .errors import TuningError
from .on_policy import practise
from .private_files import is_there, remove
from .processes import gathered, is_first
from .report.failures import TUNING
from .resume import Journal
from .segments import endpoint_layers
from .session import Session
from .surgery.cut import own_storage
from .tuning.forecast import Forecast, Pilot, RecoveryCurve
from .tuning.recipe import tune_by_recipe
from .tuning.result import TuningResult

logger = logging.getLogger(__name__)

# the pilots' rows, as long as their time allows: each is about twice as dear as the one before
PILOT_ROWS = (16, 32, 64, 128, 256, 512)
# share of the time that is left after the search that pilots may take; with less than three of them there is no forecast
_PILOTS_SHARE = 0.2
# what is planned on, of the time that is left after them
_PLANNED_SHARE = 0.96
# text is written in parts until the next one would be less than this share of it: how long writing takes is seen on the way
_SMALLEST_PART = 0.05
# a healing that has not twice the text of the last pilot brings less than that pilot's spread
_WORTH = 2
_MORE = 10
# of the time that is left after the search, for rounds on the model's own text, if there are any
_ON_POLICY_SHARE = 0.25
# the last so many pilots say what more text brings
_FORESEEING = 4


def heal(session: Session) -> TuningResult:
    """Tune the session's cut model as its recipe says: on a given amount of text, or on what a time budget buys.

    Args:
        session ([`Session`]): With a cut model; its clock runs if the recipe has a budget. Its report gets the result.

    Raises:
        TuningError: If the loss is not finite; the last good weights are in the model.
    """
    session.forget("tune")
    failure = None
    with session.stage("tuning"):
        try:
            result = _healed(session, session.tuning_folder())
        except TuningError as error:
            failure, result = error, error.result
    session.report.tuning = None if result is None else result.to_dict()
    if failure is not None:
        session.attempts.failed[TUNING] = str(failure)
        raise failure
    if is_first():
        before, after = result.initial_validation_loss, result.best_validation_loss
        logger.info(f"tuning: validation loss {before:.4f} -> {after:.4f} nats per token in {result.steps} steps")
    return result


def _healed(session: Session, folder: Path | None) -> TuningResult:
    config, dense, model, segments = session.config, session.dense(), session.cut_model(), session.segments or ()
    residence = session.residence("tuning", dense)

    def text(rows: int) -> CalibrationData:
        session.train_rows = rows
        return session.calibration()

    def tune(data: CalibrationData, folder: Path | None) -> TuningResult:
        options: dict[str, Any] = {"folder": folder, "residence": residence, "quiet": session.quiet}
        return tune_by_recipe(model, dense, segments, data, config, **options)

    if config.budget is None:
        result = tune(session.calibration(), folder)
        return _practised(session, result, folder)
    layers = endpoint_layers(segments, num_layers(dense.config), config.tuning.endpoint_width)
    healing = Healing(model, layers, text, tune, batch_size=config.tuning.batch_size, folder=folder)
    share = _ON_POLICY_SHARE if config.tuning.on_policy_rounds else 0.0
    try:
        result = healing.run(lambda: (1 - share) * session.seconds_left())
        return _practised(session, result, folder, session.seconds_left)
    finally:
        session.stop_clock()


def _practised(
    session: Session, result: TuningResult, folder: Path | None, seconds_left: Callable[[], float] | None = None
) -> TuningResult:
    """What tuning did, with the rounds on the cut model's own text that follow."""
    if not session.config.tuning.on_policy_rounds:
        return result
    try:
        rounds = practise(session, session.calibration(), folder, seconds_left)
    except TuningError as error:
        error.result = result  # of the whole tuning, whose weights are kept
        raise
    seconds = result.seconds + sum(each.seconds for each in rounds)
    return dataclasses.replace(result, on_policy=rounds, seconds=seconds)


Tune = Callable[[CalibrationData, Path | None], TuningResult]
"""Tunes the cut model on some text, with checkpoints in a folder."""


class Healing:
    """One healing within a time budget.

    Args:
        model (`PreTrainedModel`): The cut model.
        layers (`Sequence[int]`): Of it, that are trained. The pilots start from the weights that they have now, and so does
            what comes after them.
        text (`Callable`): Gives data with that many train rows; more rows begin with the fewer ones.
        tune (`Callable`): See `Tune`.
        batch_size (`int`): Rows of a step: the number of train rows is a multiple of it.
        folder (`Path`, *optional*): For checkpoints, and for what the pilots have said: an interrupted healing goes on with
            the plan that it had.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        text: Callable[[int], CalibrationData],
        tune: Tune,
        *,
        batch_size: int,
        folder: Path | None = None,
    ):
        self.layers = nn.ModuleList(decoder_layers(model)[index] for index in layers)
        # weights are put back in place, and they may be the dense model's
        own_storage(self.layers)
        self.text, self.tune, self.batch_size, self.folder = text, tune, batch_size, folder
        self.untuned = copy.deepcopy([layer.state_dict() for layer in self.layers])
        self.journal = Journal(None if folder is None else folder / "pilots.jsonl", writes=is_first())

    def run(self, seconds_left: Callable[[], float]) -> TuningResult:
        """Run the pilots, and tune on as much text as the rest of the time buys.

        Args:
            seconds_left (`Callable`): Of the budget, in seconds of wall-clock time.

        Returns:
            [`TuningResult`]: With a forecast, if there was time for three pilots. Of the last pilot, if the rest of the
            time does not buy twice its text.
        """
        # several processes plan as the first one does: their clocks differ
        budget = gathered(self.journal.recall("seconds", seconds_left))[0]
        if budget <= 0:
            logger.warning("budget: the search has used it up. One short try at healing follows, on time of its own.")
        found = self._pilots(budget)
        left = _PLANNED_SHARE * (budget - sum(each["seconds"] + each["writing"] for each in found))
        data = self.text(rows := self._write(left, found))
        forecast = _forecast(found, len(data.train))
        self._reset()
        result = self.tune(data, self._place(f"rows-{rows}"))
        return dataclasses.replace(result, forecast=forecast)

    def _pilots(self, budget: float) -> list[dict[str, Any]]:
        """What each pilot took and reached."""
        found: list[dict[str, Any]] = []
        for rows in PILOT_ROWS:
            spent = sum(each["seconds"] + each["writing"] for each in found)
            if found and spent + 2 * found[-1]["seconds"] > _PILOTS_SHARE * budget:
                break
            found.append(gathered(self.journal.recall(["pilot", rows], partial(self._pilot, rows)))[0])
        return found

    def _pilot(self, rows: int) -> dict[str, Any]:
        self._reset()
        began = time.perf_counter()
        data = self.text(rows)
        writing = time.perf_counter() - began
        result = self.tune(data, self._place(f"rows-{rows}"))
        return {
            # a given text may have fewer
            "rows": len(data.train),
            "tokens": data.train.numel(),
            "loss": result.best_validation_loss,
            "writing": writing,
            "pass": result.cache_seconds,
            "seconds": time.perf_counter() - began - writing,
        }

    def _write(self, left: float, found: Sequence[dict[str, Any]]) -> int:
        """Write text for as long as there is time to tune on it; how many rows."""
        last, pace = found[-1], Pace.of(found)
        # their text may have been at hand already: writing takes at least as long as a pass over what is written
        each_row = max(sum(each["writing"] for each in found), last["pass"]) / last["rows"]

        def more() -> float:
            return (left - pace.seconds(rows)) / (each_row + pace.each_row)

        rows = last["rows"]
        if rows + more() < _WORTH * rows:
            logger.warning(
                f"budget: {max(left, 0):.0f} s of it are left, too little for more text: what a first try on {rows} rows ({last['seconds']:.0f} s) "
                "has reached is kept, which is next to nothing where rows are few. A longer budget heals more."
            )
            return rows
        # half of what fits, as how long that takes says how much the other half is
        while (part := self._whole_batches(more() / 2) or self._whole_batches(more())) > _SMALLEST_PART * rows:
            rows += part
            written = gathered(self.journal.recall(["text", rows], partial(self._written, rows)))[0]
            left -= written["seconds"]
            if written["rows"] < rows:  # a given text has come to its end
                return max(last["rows"], self._whole_batches(min(written["rows"], pace.rows(left))))
            each_row = max(written["seconds"] / part, last["pass"] / last["rows"])
        return max(last["rows"], min(rows, self._whole_batches(pace.rows(left))))

    def _written(self, rows: int) -> dict[str, Any]:
        began = time.perf_counter()
        data = self.text(rows)
        return {"seconds": time.perf_counter() - began, "rows": len(data.train)}

    def _whole_batches(self, rows: float) -> int:
        return max(0, int(rows)) // self.batch_size * self.batch_size

    def _reset(self) -> None:
        for layer, weights in zip(self.layers, self.untuned, strict=True):
            layer.load_state_dict(weights)

    def _place(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        place = self.folder / name
        if is_there(place) and (place.is_symlink() or not place.is_dir()):
            remove(place)
        return place


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a tuning takes: `once + each_row * rows` seconds.

    Args:
        once (`float`): What every tuning does, whatever its text: it judges weights, and compiles.
        each_row (`float`): A pass of the dense model over a row, and all steps on it.
    """

    once: float
    each_row: float

    @classmethod
    def of(cls, found: Sequence[Mapping[str, Any]]) -> "Pace":
        """From pilots with their `rows` and `seconds`: a line of least relative errors, neither of its numbers below 0."""
        points = torch.tensor([(each["rows"], each["seconds"]) for each in found], dtype=torch.float64)
        rows, taken = points.T
        if len(found) > 1:
            once, each_row = (
                torch.linalg.lstsq(
                    torch.stack([1 / taken, rows / taken], 1), torch.ones(len(found), 1, dtype=torch.float64)
                )
                .solution[:, 0]
                .tolist()
            )
            if once >= 0 and each_row > 0:
                return cls(once, each_row)
        return cls(0.0, float(taken[-1] / rows[-1]))

    def seconds(self, rows: int) -> float:
        """That a tuning on so many rows takes."""
        return self.once + self.each_row * rows

    def rows(self, seconds: float) -> float:
        """On which a tuning takes so long."""
        return (seconds - self.once) / self.each_row


def _forecast(found: Sequence[dict[str, Any]], rows: int) -> Forecast | None:
    """What the planned text will bring, and ten times as much; `None` with fewer than three pilots."""
    if len(found) < 3:
        return None
    # the first ones have few steps, and fall faster than what comes (docs/recovery_lab_notes.md)
    near = found[-_FORESEEING:]
    curve = RecoveryCurve([each["tokens"] for each in near], [each["loss"] for each in near])
    planned = rows * found[0]["tokens"] // found[0]["rows"]
    pilots = tuple(Pilot(each["tokens"], each["loss"], each["seconds"]) for each in found)
    return Forecast(pilots, tuple(curve.at(tokens) for tokens in (planned, _MORE * planned)))

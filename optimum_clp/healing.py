"""Healing within a time budget: short pilots say how long it takes and what more text brings; the rest of the time buys text.

Search, text and tuning share the budget. What comes after them (files, figures) is not counted: how long that takes does
not depend on how well a model is healed.
"""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architecture.lookup import decoder_layers, num_layers
from .calibration.rows import CalibrationData
from .errors import TuningError
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

# the pilots' rows, as long as their time allows: each is about twice as dear as the one before
PILOT_ROWS = (16, 32, 64, 128)
# share of the time that is left after the search that pilots may take; with less than three of them there is no forecast
_PILOTS_SHARE = 0.2
# what is planned on, of the time that is left after them: pilots are short, and long runs are a little dearer for a row
_PLANNED_SHARE = 0.92
# a healing that has not twice the text of the last pilot brings less than that pilot's spread
_WORTH = 2
_MORE = 10


def heal(session: Session) -> TuningResult:
    """Tune the session's cut model as its recipe says: on a given amount of text, or on what a time budget buys.

    Args:
        session ([`Session`]): With a cut model; its clock runs if the recipe has a budget. Its report gets the result.

    Raises:
        TuningError: If the loss is not finite; the last good weights are in the model.
    """
    session.forget("tune")
    failure = None
    with session.caches.run():
        try:
            result = _healed(session, session.tuning_folder())
        except TuningError as error:
            failure, result = error, error.result
    session.report.tuning = None if result is None else result.to_dict()
    if failure is not None:
        session.attempts.failed[TUNING] = str(failure)
        raise failure
    return result


def _healed(session: Session, folder: Path | None) -> TuningResult:
    config, dense, model, segments = session.config, session.dense(), session.cut_model(), session.segments or ()

    def text(rows: int) -> CalibrationData:
        session.train_rows = rows
        return session.calibration()

    def tune(data: CalibrationData, folder: Path | None) -> TuningResult:
        return tune_by_recipe(model, dense, segments, data, config, folder=folder, quiet=session.quiet)

    if config.budget is None:
        return tune(session.calibration(), folder)
    layers = endpoint_layers(segments, num_layers(dense.config), config.tuning.endpoint_width)
    healing = Healing(model, layers, text, tune, batch_size=config.tuning.batch_size, folder=folder)
    try:
        return healing.run(session.seconds_left)
    finally:
        session.stop_clock()


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
        found = self._pilots(budget)
        last = found[-1]
        left = budget - sum(each["seconds"] + each["writing"] for each in found)
        rows = self._affordable(left, found)
        if rows < _WORTH * last["rows"]:
            warnings.warn(
                f"budget: {max(left, 0):.0f} s are left after short pilots, and twice the text of the last one (its "
                f"{last['rows']} rows took {last['seconds']:.0f} s) would not fit: what it reached is kept. Give more time.",
                stacklevel=3,
            )
            rows = last["rows"]
        forecast = _forecast(found, rows)
        self._reset()
        result = self.tune(self.text(rows), self._place(f"rows-{rows}"))
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
            "rows": rows,
            "tokens": rows * data.sequence_length,
            "loss": result.best_validation_loss,
            "writing": writing,
            "pass": result.cache_seconds,
            "seconds": time.perf_counter() - began - writing,
        }

    def _affordable(self, left: float, found: Sequence[dict[str, Any]]) -> int:
        """Rows that are written, passed over and tuned on in so many seconds, at the last pilot's pace."""
        last = found[-1]
        # their text may have been at hand already: writing takes at least as long as a pass over what is written
        writing = max(sum(each["writing"] for each in found), last["pass"]) / last["rows"]
        rows = _PLANNED_SHARE * left / (writing + last["seconds"] / last["rows"])
        return max(0, int(rows) // self.batch_size * self.batch_size)

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


def _forecast(found: Sequence[dict[str, Any]], rows: int) -> Forecast | None:
    """What the planned text will bring, and ten times as much; `None` with fewer than three pilots."""
    if len(found) < 3:
        return None
    curve = RecoveryCurve([each["tokens"] for each in found], [each["loss"] for each in found])
    planned = rows * found[0]["tokens"] // found[0]["rows"]
    pilots = tuple(Pilot(each["tokens"], each["loss"], each["seconds"]) for each in found)
    return Forecast(pilots, tuple(curve.at(tokens) for tokens in (planned, _MORE * planned)))

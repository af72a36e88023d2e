"""What the report says of the text."""

from dataclasses import dataclass
from typing import Annotated, TypedDict

from ..report.section import Key


class TextStatistics(TypedDict):
    """Of the training rows that the dense model wrote."""

    distinct_4gram_share: Annotated[float, Key("Distinct 4-grams over all 4-grams.", minimum=0, maximum=1)]
    dense_perplexity: Annotated[float, Key(minimum=0)]
    seed: Annotated[int, Key(minimum=0)]
    temperature: Annotated[float, Key("Of the sampling.", exclusive_minimum=0, finite=True)]


@dataclass(frozen=True)
class CalibrationSummary:
    """The `calibration` section of the report."""

    source: Annotated[str, Key("Where the text came from.")]
    sequence_length: Annotated[int, Key("Tokens in a row.", minimum=1)]
    train_sequences: Annotated[int, Key(minimum=1)]
    validation_sequences: Annotated[int, Key(minimum=1)]
    test_sequences: Annotated[int, Key(minimum=1)]
    statistics: Annotated[TextStatistics | None, Key("Only for text that the dense model wrote.")]

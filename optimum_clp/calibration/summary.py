"""What the report says of the text."""

from dataclasses import dataclass
from typing import Annotated, TypedDict

from ..report.section import Key


class ConversationStatistics(TypedDict):
    """Of the conversations that the dense model wrote to train on."""

    questions: Annotated[int, Key("The user's turns, begun or whole.", minimum=0)]
    distinct_openings_share: Annotated[
        float, Key("Distinct first 8 tokens of the questions over all questions.", minimum=0, maximum=1)
    ]
    answers: Annotated[int, Key("The assistant's turns that the end of a row has not cut off.", minimum=0)]
    ended_share: Annotated[
        float, Key("Of these, the share that ended by itself; the others were ended.", minimum=0, maximum=1)
    ]


class TextStatistics(TypedDict):
    """Of the training rows that the dense model wrote."""

    distinct_4gram_share: Annotated[float, Key("Distinct 4-grams over all 4-grams.", minimum=0, maximum=1)]
    dense_perplexity: Annotated[float, Key(minimum=0)]
    seed: Annotated[int, Key(minimum=0)]
    temperature: Annotated[float, Key("Of the sampling.", exclusive_minimum=0, finite=True)]
    conversations: Annotated[
        ConversationStatistics | None, Key("Null if it wrote none through a chat template.", added=True)
    ]


@dataclass(frozen=True)
class CalibrationSummary:
    """The `calibration` section of the report."""

    source: Annotated[str, Key("Where the text came from.")]
    sequence_length: Annotated[int, Key("Tokens in a row.", minimum=1)]
    train_sequences: Annotated[int, Key(minimum=1)]
    validation_sequences: Annotated[int, Key(minimum=1)]
    test_sequences: Annotated[int, Key(minimum=1)]
    statistics: Annotated[TextStatistics | None, Key("Only for text that the dense model wrote.")]
    train_kinds: Annotated[dict[str, int], Key("Rows of each kind: given, plain, conversations.", added=True)]
    validation_kinds: Annotated[dict[str, int], Key("The same of the rows that choose the weights.", added=True)]
    test_kinds: Annotated[dict[str, int], Key("The same of the rows that are measured on.", added=True)]
    mask: Annotated[str, Key("Tokens that are learnt.", choices=("all", "assistant"), added=True)] = "all"
    dataset: Annotated[str | None, Key("Hub id of the dataset that was read.", sparse=True)] = None

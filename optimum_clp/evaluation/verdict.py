"""How far a smaller model can stand in for the dense one: from stated bounds, in one sentence.

Bounds are for *losses* against the dense model. A figure is beyond a bound if it is so by more than its standard error, so
that one answer of 32 that went otherwise decides nothing. A measure that was not taken has no say; where generation was not
measured there is no verdict.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from ..report.section import Key
from .generation import GenerationRow

# From here on one of ten answers is useless to whoever reads it, whatever the others say
WORST_LOOPS = 0.10
# A reader sees the dense model's own habit again up to about this share of answers
LEAST_LOOPS = 0.02
# An answer that does not end runs into the limit every time: time, money, and text that goes on behind the answer
WORST_ENDED, LEAST_ENDED = 0.60, 0.95
# e^1 = 2.7: the dense model finds each token of the answers nearly three times as unlikely as of its own. A tenth of a nat
# is a perplexity of a tenth more, which is what `max_perplexity_increase` has as its example
WORST_LOSS, LEAST_LOSS = 1.0, 0.10
# dense perplexity over this one's: below a half the model is as unsure as if every word had one rival more
WORST_RETENTION, LEAST_RETENTION = 0.50, 0.95
# The dense model must itself end so many answers, or the share of it says nothing (base models go on for ever)
DENSE_ENDS = 0.2
LEVELS = ("like dense", "usable", "do not deploy")
# How much is lost of what is usable, by the share of quality that is left. From a tenth on a reader meets it. Measured with
# SmolLM2-135M-Instruct (docs/generation.md): at 0.61 one of five right sums is left and two thirds of the last words; at 0.35
# to 0.50 no sum and half of the last words; below 0.3 no sum and a fifth to two fifths of the last words
DEGREES = ((0.90, "small"), (0.70, "clear"), (0.0, "large"))


@dataclass(frozen=True)
class GenerationKept:
    """What is left of the dense model's generation, and what it is made of; each part is in [0, 1], 1 is everything.

    Args:
        share (`float`): The least of the parts: an answer that fails in one way is not saved by being right in another.
        loops (`float`): Share of answers that do not loop although the dense model's do not.
        ended (`float` or `None`): Share of answers that end by themselves, as a share of the dense model's; `None` where
            that ends too few itself.
        likelihood (`float`): Dense perplexity over the sampled answers' by the dense model's own reading: retention, of
            what is said instead of what is read.
    """

    share: Annotated[float, Key("The least of the parts.", minimum=0, maximum=1, finite=True)]
    loops: Annotated[float, Key("1 - points of loops above dense.", minimum=0, maximum=1, finite=True)]
    ended: Annotated[float | None, Key("Answers that end, share of dense.", minimum=0, maximum=1)]
    likelihood: Annotated[
        float, Key("exp(-(the dense model's loss on the answers, above dense)).", minimum=0, maximum=1, finite=True)
    ]


@dataclass(frozen=True)
class Verdict:
    """What can be done with a model or a file."""

    name: Annotated[str, Key("As in the rows of `evaluation`.")]
    level: Annotated[str, Key("From good to bad.", choices=LEVELS)]
    text: Annotated[str, Key("The verdict, a sentence without final stop.")]
    losses: Annotated[tuple[str, ...], Key("What is lost, one clause each.")]
    generation_kept: GenerationKept
    retention: Annotated[float | None, Key("Dense perplexity over this one's.", minimum=0)]
    quality: Annotated[
        float | None,
        Key(
            "What is left of the dense model: the least of generation kept and retention.",
            minimum=0,
            maximum=1,
            added=True,
        ),
    ] = None


def generation_kept(row: GenerationRow, dense: GenerationRow) -> GenerationKept:
    """One number for how much of the dense model's generation is left, see [`GenerationKept`].

    JSON and arithmetic have no part: of a kind there are at most eight prompts, so one answer would move it by an eighth.
    KL on the dense model's answers has none: it is what tuning makes small, and can be small where answers loop.

    Args:
        row, dense ([`GenerationRow`]): On the same prompts, both beside the dense model.
    """
    loops = min(1.0, 1 - max(0.0, row.loops - dense.loops))
    ended = min(1.0, row.ended / dense.ended) if dense.ended >= DENSE_ENDS else None
    excess, _ = _excess_loss(row, dense)
    likelihood = min(1.0, math.exp(-excess)) if math.isfinite(excess) else 0.0
    share = min(part for part in (loops, ended, likelihood) if part is not None)
    return GenerationKept(share, loops, ended, likelihood)


def verdict(row: GenerationRow, dense: GenerationRow, retention: float | None, *, chat: bool) -> Verdict:
    """Judge a model or a file.

    Args:
        row, dense ([`GenerationRow`]): On the same prompts, both beside the dense model.
        retention (`float` or `None`): Dense perplexity over this one's, on held-out text.
        chat (`bool`): Whether it was asked questions; else it went on with a text.
    """
    findings = list(_findings(row, dense, retention, chat))
    worst = [said for is_worst, said in findings if is_worst]
    losses = tuple(said for _, said in findings)
    level = LEVELS[2] if worst else LEVELS[1] if losses else LEVELS[0]
    kept = generation_kept(row, dense)
    quality = min(kept.share, 1.0 if retention is None else retention)
    degree = next(words for least, words in DEGREES if quality >= least)
    does, use = ("talks", "as a chat model") if chat else ("writes", "for text that goes on")
    left = f"about {quality:.0%} of the dense model's quality is left"
    text = {
        LEVELS[0]: f"{does} like the dense model",
        LEVELS[1]: f"usable with {degree} losses, {left}: {'; '.join(losses)}",
        LEVELS[2]: f"do not deploy {use}, {left}: {'; '.join(worst)}",
    }[level]
    return Verdict(row.name, level, text, losses, kept, retention, quality)


def _findings(
    row: GenerationRow, dense: GenerationRow, retention: float | None, chat: bool
) -> Iterable[tuple[bool, str]]:
    """What is lost: whether that alone forbids the model, and the words for it."""
    answers = "answers" if chat else "texts"
    loops, error = row.loops - dense.loops, row.loops_error or 0.0
    if loops - error > LEAST_LOOPS:
        yield loops - error > WORST_LOOPS, f"{row.loops:.0%} of its {answers} loop{_beside(dense.loops)}"
    if dense.ended >= DENSE_ENDS:
        share, error = row.ended / dense.ended, (row.ended_error or 0.0) / dense.ended
        if share + error < LEAST_ENDED:
            said = f"{row.ended:.0%} of its {answers} end by themselves{_beside(dense.ended)}"
            yield share + error < WORST_ENDED, said
    excess, error = _excess_loss(row, dense)
    if excess - error > LEAST_LOSS:
        said = (
            f"the dense model finds its words {math.exp(min(excess, 50.0)):.2g} times as unlikely as words of its own"
        )
        yield excess - error > WORST_LOSS, said
    if retention is not None and retention < LEAST_RETENTION:
        yield retention < WORST_RETENTION, f"it foresees held-out text less well (retention {retention:.2f})"


def _excess_loss(row: GenerationRow, dense: GenerationRow) -> tuple[float, float]:
    """The dense model's loss on the answers above that on its own, in nats per token, and its standard error."""
    if row.dense_loss is None or dense.dense_loss is None:
        return 0.0, 0.0
    excess = row.dense_loss - dense.dense_loss
    return (math.inf if math.isnan(excess) else excess), math.hypot(
        row.dense_loss_error or 0, dense.dense_loss_error or 0
    )


def _beside(dense: float) -> str:
    return f" (dense: {dense:.0%})"

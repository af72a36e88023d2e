"""What the columns of tables mean, in a few words: below them on a terminal and on the card, at their heads on the page."""

from collections.abc import Iterable

GLOSSARY = "https://github.com/optimum-clp/optimum-clp/blob/main/docs/glossary.md"
WORDS = {
    "perplexity": "between how many next tokens a model wavers, lower is better",
    "KL to dense": "how far its guesses of the next token are from the dense model's, in nats per token, 0 is the same",
    "same first choice": "share of places where its likeliest next token is the dense model's",
    "prefill tok/s": "tokens of a prompt read in a second",
    "decode tok/s": "tokens written in a second",
    "RAM": "most memory that a process took to load the file alone and read a prompt",
    "retention": "what is left of the dense model's perplexity or accuracy, 1 is all of it",
    "accuracy": "share of right answers; of a choice, likelihood per character decides",
    "plain": "the same, where the likelihood itself decides",
    "chance": "accuracy of a guess",
    "shots": "solved examples in front of each question",
    "loops": "answers of which 64 tokens or more repeat at most 10 of them; shorter loops do not count",
    "end by themselves": "answers that stop before the limit",
    "tokens": "mean length of an answer",
    "dense loss on samples": "how unlikely the dense model finds what it says; the dense row has what to expect",
    "KL on dense answers": "KL along the dense model's own answers",
    "first 32 as dense": "of the first 32 tokens those that the dense model writes in the same place",
    "JSON parses": "answers that are JSON, where it was asked for",
    "arithmetic right": "right results of sums",
    "prompt tokens/s": "tokens of a prompt read in a second",
    "written tokens/s": "tokens written in a second",
    "behind": "by how much its KL is above the marked cut's",
    "perplexity added": "by rounding the weights, beside the same model in floats",
    "worst logit": (
        "the one logit of a check that is furthest from PyTorch's, as a share of the largest; it finds broken files and "
        "says little of quality, and what is usual for the format stands beside it"
    ),
}
"""For the title of a column what it means; a title that needs no words has none."""


def meaning(title: str) -> str:
    """What a column means, by its title, with or without a unit in parentheses; empty if that needs no words."""
    return WORDS.get(title) or WORDS.get(title.partition(" (")[0], "")


def legend(titles: Iterable[str], *, markdown: bool = False, linked: bool = False) -> str:
    """The meanings of a table's columns: a line for each, or in Markdown a paragraph; empty if none of them needs words.

    Args:
        titles (`Iterable[str]`): The heads of the columns that are shown.
        markdown (`bool`): For a Markdown file, not for a terminal.
        linked (`bool`): The glossary's address follows.
    """
    known = [(title, meaning(title)) for title in titles if meaning(title)]
    if not known:
        return ""
    if markdown:
        said = "; ".join(f"*{title}*: {words}" for title, words in known)
        return f"{said}. All words: [glossary]({GLOSSARY})." if linked else f"{said}."
    lines = [f"  {title}: {words}" for title, words in known]
    return "\n".join([*lines, f"  all words: {GLOSSARY}"] if linked else lines)

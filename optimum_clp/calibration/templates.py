"""A chat template taken apart: the tokens before, between and after the words of the user and of the assistant.

The template is rendered with words of ours, and what stands around them is what it adds. Tokens are compared, not texts:
a piece has the tokens that it has whatever the words next to it are, so a space that a tokenizer glues to a word is the
word's, and is written by who writes the word.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError

# words that begin and end differently, so that what their tokens share is the template's
_WORDS = ("Kiwi", "seven plums", "Qat 42")
# tokens that tell the end of the user's words, where the template has no special token there
_LONGEST_END = 4
_NAME = "chat_template"
_REMEDY = "Give the tokenizer a chat template in which the user's and the assistant's words can be told apart"


@dataclass(frozen=True)
class ChatTemplate:
    """The tokens that a template puts around what is said.

    Args:
        opening (`tuple[int, ...]`): Before the user's first words: BOS, the template's own system prompt, the header.
        answer (`tuple[int, ...]`): From the user's words to where the assistant begins to write.
        question (`tuple[int, ...]` or `None`): From the assistant's words to the user's next ones; `None` if a
            conversation cannot go on after what the assistant wrote, as where the template takes its thoughts out.
        closing (`tuple[int, ...]`): After the assistant's last words.
        question_end (`tuple[int, ...]`): Tokens of `answer`: who writes them has ended the user's words. Its first special
            token alone, if there is one: what stands before it may melt into the words.
        answer_rest (`tuple[int, ...]`): What then remains of `answer`.
        answer_ends (`tuple[int, ...]`): Each of these tokens ends what the assistant writes.
        ends (`tuple[int, ...]`): Those of the model that end any text.
    """

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    question: tuple[int, ...] | None
    closing: tuple[int, ...]
    question_end: tuple[int, ...]
    answer_rest: tuple[int, ...]
    answer_ends: tuple[int, ...]
    ends: tuple[int, ...]


def split_template(tokenizer: PreTrainedTokenizerBase | None, ends: Sequence[int] = ()) -> ChatTemplate:
    """Take the tokenizer's chat template apart.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        ends (`Sequence[int]`): The model's own tokens that end a text; the tokenizer's is added.

    Raises:
        CalibrationError: If there is no template, it raises, it changes what is said, or it does not say where the
            assistant begins.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        rule = "the model has no chat template, so there are no conversations"
        raise CalibrationError.of(_NAME, None, rule, _REMEDY)
    rendered = _Rendered(tokenizer)
    texts, ids = rendered.texts, rendered.tokens
    start = _shared_start([ids(texts.opening + word) for word in _WORDS])
    answer = rendered.between(lambda said: texts.opening + said + texts.answer)
    question = None
    if texts.question is not None:
        so_far = texts.opening + _WORDS[0] + texts.answer
        question = rendered.between(lambda said: so_far + said + (texts.question or ""))
    closing = _shared_end([ids(texts.opening + _WORDS[0] + texts.answer + word + texts.closing) for word in _WORDS])
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    own = tokenizer.eos_token_id
    all_ends = tuple(sorted({*ends, *([] if own is None else [own])}))
    # where the tokens begin and end that tell the end of the question
    begin = next((i for i, token in enumerate(answer) if token in special), None)
    begin, end = (0, _LONGEST_END) if begin is None else (begin, begin + 1)
    return ChatTemplate(
        opening=tuple(start),
        answer=tuple(answer),
        question=None if question is None else tuple(question),
        closing=tuple(closing),
        question_end=tuple(answer[begin:end]),
        answer_rest=tuple(answer[end:]),
        answer_ends=tuple(sorted({*all_ends, *(token for token in closing[:1] if token in special)})),
        ends=all_ends,
    )


def first_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each of some first words of the user, as they are behind the template's opening.

    Raises:
        CalibrationError: As [`split_template`].
    """
    rendered = _Rendered(tokenizer)
    opening = rendered.texts.opening
    before = len(_shared_start([rendered.tokens(opening + word) for word in _WORDS]))
    return [tuple(rendered.tokens(opening + said)[before:]) for said in words]


@dataclass(frozen=True)
class _Texts:
    """The template's pieces as text; `question` is `None` where a conversation has one turn."""

    opening: str
    answer: str
    question: str | None
    closing: str


class _Rendered:
    """A template's pieces as text, and as tokens of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.texts = self._pieces()

    def tokens(self, text: str) -> list[int]:
        """As the template's own text is tokenized: it brings its special tokens itself."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def between(self, text: Callable[[str], str]) -> list[int]:
        """The tokens of what `text` puts after some words and before others, whatever these are."""
        befores = [_shared_start([self.tokens(text(said) + word) for word in _WORDS]) for said in _WORDS]
        piece = _shared_end(befores)
        if not piece or len(piece) == min(map(len, befores)):
            rule = "what it puts between the user's and the assistant's words cannot be told from words"
            raise CalibrationError.of(_NAME, self._shown(), rule, _REMEDY)
        return piece

    def _pieces(self) -> _Texts:
        user, assistant = _WORDS[0], _WORDS[1]
        asked = self._render([("user", user)], True)
        whole = self._render([("user", user), ("assistant", assistant)], False)
        opening, after = self._parted(asked, user)
        before, closing = self._parted(whole, assistant)
        shown = before.removeprefix(opening + user)
        if asked == self._render([("user", user)], False) and shown.rstrip() != after.rstrip():
            rule = "it has no generation prompt: nothing says where the assistant begins"
            raise CalibrationError.of(_NAME, self._shown(), rule, _REMEDY)
        # what is put before a past answer is not always what the model is asked to go on from
        question = self._next_question(opening, after) if shown.rstrip(" ") == after.rstrip(" ") else None
        return _Texts(opening, after, question, closing)

    def _next_question(self, opening: str, answer: str) -> str | None:
        """What stands between an answer and the next question, or `None` if the template changes what was said."""
        said = _WORDS[0], _WORDS[1], _WORDS[2]
        thought = f"<think>\n{said[1]}\n</think>\n\n{said[1]}"
        try:
            roles = ("user", "assistant", "user")
            text = self._render(list(zip(roles, said, strict=True)), True)
            thinking = self._render(list(zip(roles, (said[0], thought, said[2]), strict=True)), True)
        except CalibrationError:
            return None
        start = opening + said[0] + answer.rstrip(" ")
        for rendered, words in ((text, said[1]), (thinking, thought)):
            if not rendered.startswith(start) or not rendered.removeprefix(start).lstrip(" ").startswith(words):
                return None
        rest = text.removeprefix(start).lstrip(" ").removeprefix(said[1])
        between, found, last = rest.partition(said[2])
        return between if found and last == answer else None

    def _parted(self, text: str, word: str) -> tuple[str, str]:
        if text.count(word) != 1:
            rule = f"it changes what is said: {word!r} stands {text.count(word)} times in what it makes of it"
            raise CalibrationError.of(_NAME, self._shown(), rule, _REMEDY)
        before, after = text.split(word)
        return before, after

    def _render(self, said: Sequence[tuple[str, str]], prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in said]
        return render(self.tokenizer, messages, prompt)

    def _shown(self) -> str:
        return shown_template(self.tokenizer)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
    """Messages as the template writes them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        messages (`Sequence[dict]`): With `role` and `content`.
        prompt (`bool`): Up to where the assistant begins to write.

    Raises:
        CalibrationError: If the template raises.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    # a template may raise whatever it likes
    except Exception as error:
        rule = f"it cannot be rendered ({type(error).__name__}: {error})"
        raise CalibrationError.of(_NAME, shown_template(tokenizer), rule, _REMEDY) from error


def shown_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of the template, for a message."""
    text = str(tokenizer.chat_template)
    return text if len(text) <= 60 else text[:60] + "..."


def _shared_start(sequences: Sequence[list[int]]) -> list[int]:
    shared = []
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


def _shared_end(sequences: Sequence[list[int]]) -> list[int]:
    return _shared_start([tokens[::-1] for tokens in sequences])[::-1]

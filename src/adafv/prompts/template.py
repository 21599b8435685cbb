"""What a chat template writes around the user's words, and so which words are the user's."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adafv.errors import OptionError
from adafv.prompts.letters import IMAGE, LINE_BREAK, Marker, Pieces, Text, common_end, encoded

_TIME = re.compile(r"<\d+(\.\d+)?seconds>")
"""Qwen3-VL's processor writes its time in front of every frame of a video: not the user's words."""

_PROBES = ("zalpha", "Qwerty", "kiwano", "Bulgur", "xerox")
_ROLES = ("user", "assistant", "system", "model")
_HEADER_TOKENS = 3
"""Taken for the start of a message where a template writes only one."""
_NO_END = "the chat template does not show where the user's words end; use text='turn' or 'after'"


@dataclass(frozen=True)
class _Message:
    """The words of one user message, as places of letters."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChatTemplate:
    """What a chat template puts around the user's words, learned by rendering it.

    A tokenizer joins what the template writes with what the user or the model does ("?" with a line break, a blank with the
    answer's first word), and other things in every turn. So markers are looked for in the text, blanks aside, and the
    letters that are found lead back to their tokens.
    """

    before_words: tuple[int, ...]
    """Tokens that begin a user's message, as they stand in front of a word; empty if the template puts images first."""
    after_image: tuple[int, ...]
    """Tokens between an image and a word after it, such as a newline."""
    after_words: tuple[int, ...]
    """Tokens from the end of a word to the start of the answer."""
    headers: tuple[Marker, ...]
    """What begins a user's message; empty if the template tells no roles apart."""
    replies: tuple[Marker, ...]
    """What stands between a user's words and the answer; more than one where an answer that is to be written begins
    otherwise than one that was written. Empty if it is a line break and no more."""
    enders: tuple[Marker, ...]
    """What stands between the words of two user messages in a row; empty if the template takes none, or joins them."""
    opening: Marker
    """What stands in front of the user's words in the first message."""
    before_picture: Marker
    """What the template writes in a message in front of an image, such as "Picture:"."""
    after_picture: Marker
    """What it writes between an image and the words after it."""
    pieces: Pieces = field(repr=False, compare=False)

    @classmethod
    def of(cls, processor: Any) -> "ChatTemplate":
        """Learn from a processor with a chat template and a tokenizer.

        Raises:
            OptionError: the processor has no chat template, or not one that shows where the user's words begin.
        """
        if getattr(processor, "chat_template", None) is None:
            raise OptionError("text='question' needs a processor with a chat template; use text='turn' or 'after'")
        if not hasattr(processor, "tokenizer"):
            raise OptionError(
                f"text='question' needs the processor, and a {type(processor).__name__} is a tokenizer alone; pass what "
                "AutoProcessor loads"
            )
        renderer = _Renderer.of(processor)
        shown = renderer.written("image user")
        if shown is None or IMAGE not in shown.text.letters:
            raise OptionError("the chat template does not show images; use text='turn' or 'after'")
        text, picture = shown.text, shown.text.letters.index(IMAGE)
        end = shown.behind_words()
        if end is None or shown.words[0][0] < picture or not (end.letters or text.trailing == LINE_BREAK):
            raise OptionError(_NO_END)

        # Not every template takes all of these: Gemma's wants the roles to alternate.
        once, twice = renderer.written("user"), renderer.written("user", "user")
        chat, turned = renderer.written("user", "assistant", "user"), renderer.written("user image")
        opening = (once.front() if once else None) or Marker.of(text, 0, picture)
        user_user = twice.between(0) if twice else None
        user_answer, answer_user = (chat.between(0), chat.between(1)) if chat else (None, None)
        if once is None or not once.words:
            once = shown
        headers = _headers(opening, answer_user, user_user, once, renderer.pieces)
        in_front = [stop for header in headers for _, stop in header.places(text) if stop <= picture]
        if not in_front and text.letters.startswith(opening.letters):
            in_front = [len(opening.letters)]
        return cls(
            before_words=turned.header_tokens(headers) if turned else (),
            after_image=shown.tokens_between_image_and_word(),
            after_words=shown.tokens_behind_words(),
            headers=headers,
            replies=_shortest(end, user_answer),
            enders=_shortest(user_user),
            opening=opening,
            before_picture=Marker.of(text, min(max(in_front, default=picture), picture), picture),
            after_picture=Marker.of(text, picture + 1, shown.words[0][0]),
            pieces=renderer.pieces,
        )

    def words(
        self,
        tokens: Sequence[int],
        image: tuple[int, int],
        visual: Sequence[bool],
        nobodys: Sequence[bool],
        turn_ends: Sequence[bool],
        attended: Sequence[bool] | None = None,
    ) -> list[int]:
        """Columns of the user's words that go with an image, blanks left out, ascending; none if there are none.

        They are those of the image's own message, on both sides of it. Where it has none, those of the nearest message that
        the user sent with no answer in between, later ones first; else those of the nearest message after the answer. So
        later turns change nothing about what was found in an earlier one.

        A token that holds words and something else (a "?" joined with a line break, or with the "[" of a marker) counts:
        without it, a word or sign of the user would be lost.

        Args:
            tokens: of one prompt.
            image: first and last column of the image.
            visual, nobodys, turn_ends, attended: per column, whether it is a placeholder, is nobody's word, ends a turn,
                and is read at all.
        """
        # Special tokens of the tokenizer are nobody's words either: markers that no config names, words that it lacks.
        nobodys = [nobody or token in self.pieces.special for nobody, token in zip(nobodys, tokens, strict=True)]
        text = Text.of(self.pieces, tokens, visual, attended)
        place, behind = text.places[image[0]], text.places[image[1]] + 1
        counts = self._could_be_words(text, nobodys)
        ends = [text.places[column] for column, is_end in enumerate(turn_ends) if is_end]
        replied = [start for marker in self.replies for start, _ in marker.places(text)]
        headers = sorted({found for marker in self.headers for found in marker.places(text)})
        ended = {found for marker in self.enders for found in marker.places(text)}
        stops = sorted({*replied, *ends, *(start for start, _ in [*headers, *ended]), len(text.letters)})

        def message(start: int, behind: int) -> _Message:
            stop = next(stop for stop in stops if stop >= behind)
            if not self.replies:
                spoken = next((letter for letter in range(behind, stop) if counts[letter]), stop)
                stop = next((at for at in range(spoken + 1, stop) if text.gaps[at] == LINE_BREAK), stop)
            return _Message(start, stop)

        def unanswered(first: _Message, second: _Message) -> bool:
            # Some templates write the marker of an answer behind every message of the user, answered or not.
            return (first.stop, second.start) in ended or not any(first.stop <= at < second.start for at in replied)

        messages = [message(stop, stop) for _, stop in headers]
        own = next((each for each in messages if each.start <= place < each.stop), None)
        if own is None:
            own = message(self._start(text, place, ends, replied), behind)
        later = [own, *(each for each in messages if each.start >= max(own.stop, behind))]
        earlier = [own, *(each for each in reversed(messages) if each.stop <= own.start)]
        joined_later = list(itertools.takewhile(lambda pair: unanswered(*pair), itertools.pairwise(later)))
        joined_earlier = itertools.takewhile(lambda pair: unanswered(*reversed(pair)), itertools.pairwise(earlier))
        for each in (own, *(pair[1] for pair in [*joined_later, *joined_earlier]), *later):
            found = {text.columns[at] for at in range(each.start, each.stop) if counts[at]}
            if found:
                return sorted(found)
        return []

    def _start(self, text: Text, place: int, ends: list[int], replied: list[int]) -> int:
        """Where a message without a header begins that holds the image at `place`."""
        if self.headers:
            return place  # the template puts images in front of the header
        last_end = max((end for end in ends if end < place), default=-1)
        if any(last_end < start < place for start in replied):
            return place  # nothing tells where the answer ends and the next question begins
        if last_end < 0 and text.letters.startswith(self.opening.letters) and len(self.opening.letters) <= place:
            return len(self.opening.letters)
        return last_end + 1

    def _could_be_words(self, text: Text, nobodys: Sequence[bool]) -> list[bool]:
        """Per letter, whether it is somebody's, and not what a template or a processor writes beside an image."""
        counts = [
            letter != IMAGE and not nobodys[column] for letter, column in zip(text.letters, text.columns, strict=True)
        ]

        def strike(start: int, stop: int) -> None:
            counts[start:stop] = [False] * (stop - start)

        before, after = self.before_picture.letters, self.after_picture.letters
        for picture in (place for place, letter in enumerate(text.letters) if letter == IMAGE):
            # Some processors put markers around an image that the template does not show.
            front, behind = picture, picture + 1
            while front > 0 and nobodys[text.columns[front - 1]] and not text.letters.endswith(before, 0, front):
                front -= 1
            while behind < len(counts) and nobodys[text.columns[behind]] and not text.letters.startswith(after, behind):
                behind += 1
            if text.letters.endswith(before, 0, front):
                strike(front - len(before), front)
            if text.letters.startswith(after, behind):
                strike(behind, behind + len(after))
        for time in _TIME.finditer(text.letters):
            picture = text.letters.find(IMAGE, time.end())
            if picture >= 0 and all(nobodys[column] for column in text.columns[time.end() : picture]):
                strike(*time.span())
        return counts


@dataclass(frozen=True)
class _Rendered:
    """A conversation of probe words, as a template and a tokenizer write it."""

    text: Text
    tokens: list[int]
    words: list[tuple[int, int]]
    """Where the probe words stand, as (start, stop); empty if they are not all there."""

    def front(self) -> Marker | None:
        """What stands in front of the first word."""
        return Marker.of(self.text, 0, self.words[0][0]) if self.words else None

    def between(self, first: int) -> Marker | None:
        """What stands between a word and the next."""
        return Marker.of(self.text, self.words[first][1], self.words[first + 1][0]) if self.words else None

    def behind_words(self) -> Marker | None:
        return Marker.of(self.text, self.words[-1][1], len(self.text.letters)) if self.words else None

    def header_tokens(self, headers: Sequence[Marker]) -> tuple[int, ...]:
        """Of the last header in front of a word and an image behind it."""
        if not self.words or self.text.letters.find(IMAGE) < self.words[0][0]:
            return ()
        word = self.words[0][0]
        starts = [start for header in headers for start, stop in header.places(self.text) if stop <= word]
        return tuple(self.tokens[self.text.columns[max(starts)] : self.text.columns[word]]) if starts else ()

    def tokens_between_image_and_word(self) -> tuple[int, ...]:
        image, word = (self.text.columns[place] for place in (self.text.letters.index(IMAGE), self.words[0][0]))
        placeholder = self.tokens[image]
        return tuple(token for token in self.tokens[image + 1 : word] if token != placeholder)

    def tokens_behind_words(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.text.columns[self.words[-1][1] - 1] + 1 :])


@dataclass(frozen=True)
class _Renderer:
    """Writes conversations of probe words."""

    processor: Any
    pieces: Pieces
    probes: tuple[str, str]
    """What the user says, and what the assistant does."""

    @classmethod
    def of(cls, processor: Any) -> "_Renderer":
        probes = _two_words(processor.tokenizer, str(processor.chat_template))
        return cls(processor, Pieces(processor.tokenizer), probes)

    def written(self, *messages: str) -> _Rendered | None:
        """Each message is "user" or "assistant", for a word of theirs, with "image" in front of it or behind.

        None if the template does not take such a conversation.
        """
        roles = ["assistant" if message == "assistant" else "user" for message in messages]
        rendered = None
        for as_text in (False, True):  # templates take a text, a list of parts, or both
            if as_text and any("image" in message for message in messages):
                break
            chat = [
                {"role": role, "content": self._probe(role) if as_text else self._parts(role, message)}
                for role, message in zip(roles, messages, strict=True)
            ]
            try:
                written = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            except Exception:  # templates raise errors of many kinds about what they do not take
                continue
            rendered = self._read(written, roles)
            if rendered.words:
                break
        return rendered

    def _probe(self, role: str) -> str:
        return self.probes[role == "assistant"]

    def _parts(self, role: str, message: str) -> list[dict[str, str]]:
        image = {"type": "image"}
        return [image if part == "image" else {"type": "text", "text": self._probe(role)} for part in message.split()]

    def _read(self, written: str, roles: list[str]) -> _Rendered:
        tokenizer, token = self.processor.tokenizer, _image_token(self.processor)
        placeholder = tokenizer.convert_tokens_to_ids(token)
        tokens: list[int] = tokenizer(written.replace(image_text(self.processor), token)).input_ids
        text = Text.of(self.pieces, tokens, [each == placeholder for each in tokens])
        words, behind = [], 0
        for role in roles:
            ids = encoded(tokenizer, self._probe(role))
            letters = Text.of(self.pieces, ids, [False] * len(ids)).letters
            start = text.letters.find(letters, behind)
            if start < 0:
                return _Rendered(text, tokens, [])
            behind = start + len(letters)
            words.append((start, behind))
        return _Rendered(text, tokens, words)


def _headers(
    opening: Marker, answer_user: Marker | None, user_user: Marker | None, first: _Rendered, pieces: Pieces
) -> tuple[Marker, ...]:
    """What begins a user's message: what the opening and the later ones have in common, else each as it is.

    Args:
        opening: in front of the first words of `first`.
        answer_user, user_user: between an answer, or a user's words, and the next words; None where not known.
    """
    later = answer_user or user_user
    if later is None:
        end = first.text.columns[len(opening.letters)]
        opening = opening.without(first.text.places[max(0, end - _HEADER_TOKENS)])
    begin = pieces.begin.letters
    if begin and opening.letters.startswith(begin):
        opening = opening.without(len(begin))
    if later is None:
        return (opening,) if opening.says_something else ()
    if not later.says_something:
        return ()  # what stands in front of the first message alone does not show where one begins
    common = common_end([opening, later])
    if not common.says_something:
        return tuple(each for each in (opening, later) if each.says_something)
    if user_user is not None:
        shorter = common_end([common, user_user])
        common = shorter if shorter.says_something else common
    return (common,)


def _shortest(*markers: Marker | None) -> tuple[Marker, ...]:
    """Those that are found wherever one of them is: no empty ones, and none that begins as another does."""
    found: list[Marker] = []
    for marker in sorted((each for each in markers if each is not None), key=lambda each: len(each.letters)):
        if marker.letters and not any(marker.letters.startswith(other.letters) for other in found):
            found.append(marker)
    return tuple(found)


def image_text(processor: Any) -> str:
    """What stands for one image in a prompt before the processor sees it.

    Mostly the token that is repeated for every visual token. Gemma writes the one that begins an image, and the processor
    puts the others behind it. Qianfan-OCR writes a word that need not be a token, and the processor replaces it.
    """
    word = getattr(processor, "image_placeholder_token", None)
    if word is not None:
        return str(word)
    template = str(getattr(processor, "chat_template", None) or "")
    begin = getattr(processor, "boi_token", None)
    return str(begin) if begin is not None and str(begin) in template else str(processor.image_token)


def _image_token(processor: Any) -> str:
    """The token by which an image is found in what a template writes."""
    written = image_text(processor)
    return written if getattr(processor, "image_placeholder_token", None) is None else str(processor.image_token)


def _two_words(tokenizer: Any, template: str) -> tuple[str, str]:
    """Two words that the template does not hold and whose letters differ at both ends.

    To a closed vocabulary all words that it lacks are the same token, so there the two are taken from it.
    """
    unknown, held = getattr(tokenizer, "unk_token_id", None), template.lower()
    words: Sequence[str] = [word for word in _PROBES if word.lower() not in held]
    if unknown is not None and any(unknown in encoded(tokenizer, word) for word in words):
        whole = [
            token
            for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: (-len(entry[0]), entry[0]))
            if token.isalpha()
            and token.lower() not in held
            and token.lower() not in _ROLES
            and encoded(tokenizer, token) == [number]
        ]
        words = whole or words
    first = words[0] if words else _PROBES[0]
    others = [word for word in words if word[0] != first[0] and word[-1] != first[-1]]
    return first, next(iter([*others, *words[1:]]), _PROBES[1])

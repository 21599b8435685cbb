"""The user's words are found in what tokenizers and chat templates of many kinds make of them, in every turn of a chat."""

from dataclasses import replace

import pytest
import torch
from chats import IMAGE, LETTERS, TEMPLATES, TOKENIZERS, Chat, found, learned, tokenizer, write
from drawn import examples
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from adafv.errors import PromptError
from adafv.prompts.prompt import Prompt
from adafv.prompts.text import text_columns

QUESTION = "Is the dog (left) brown?"
ANSWER, SECOND = "Yes, it is.", "Sure? [twice] USER ASSISTANT"
ONE = [("user", [IMAGE, QUESTION])]
TWO = [*ONE, ("assistant", [ANSWER]), ("user", [SECOND])]
EVERY = [(kind, template) for kind in TOKENIZERS for template in TEMPLATES]
NO_ROLES = ("answer",)
"""Nothing tells where an answer ends and the next question begins."""
ALTERNATE = ("gemma",)


def test_the_tokenizers_join_what_they_are_to_join() -> None:
    assert len(tokenizer("bytes").encode("?\n")) == len(tokenizer("bytes").encode(" Yes")) == 1
    assert len(tokenizer("anything").encode("?[")) == 1
    assert len(tokenizer("words").encode("a Yes")) == 3  # "▁", "a", "▁Yes"
    assert tokenizer("words").decode(tokenizer("words").encode(" Yes")[-1:]) == "Yes"


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_words_of_both_turns(kind: str, template: str) -> None:
    for chat in (ONE, TWO, [*TWO, ("assistant", ["No, it is not."])]):
        written = write(kind, template, chat)
        assert found(kind, template, written) == written.expected((0, 1))


@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_the_question_in_the_next_message(kind: str, template: str) -> None:
    if template in NO_ROLES:
        written = write(kind, template, [("user", [IMAGE]), ("assistant", [ANSWER]), ("user", [QUESTION])])
        with pytest.raises(PromptError, match="no text from the user"):
            found(kind, template, written)
        return
    chat: Chat = [("user", [IMAGE]), ("assistant", [ANSWER]), ("user", [QUESTION])]
    for after in ([], [("assistant", [ANSWER]), ("user", [SECOND])]):
        written = write(kind, template, [*chat, *after])
        assert found(kind, template, written) == written.expected((2, 0))
    if template in ALTERNATE:
        return
    chat = [("user", [IMAGE]), ("user", [QUESTION])]
    for after in ([], [("assistant", [ANSWER]), ("user", [SECOND])]):
        written = write(kind, template, [*chat, *after])
        assert found(kind, template, written) == written.expected((1, 0))
        # its own words come first
        written = write(kind, template, [("user", [IMAGE, SECOND]), *chat[1:], *after])
        assert found(kind, template, written) == written.expected((0, 1))


@pytest.mark.parametrize(("kind", "template"), [each for each in EVERY if each[1] not in (*NO_ROLES, *ALTERNATE)])
def test_the_question_in_the_message_before(kind: str, template: str) -> None:
    """Only if the answer to it was not written yet; and what is asked later changes nothing."""
    chat: Chat = [("user", [QUESTION]), ("user", [IMAGE])]
    for after in ([], [("assistant", [ANSWER]), ("user", [SECOND])]):
        written = write(kind, template, [*chat, *after])
        assert found(kind, template, written) == written.expected((0, 0))
    written = write(kind, template, [("user", [SECOND]), ("assistant", [ANSWER]), ("user", [IMAGE])])
    with pytest.raises(PromptError, match="no text from the user"):
        found(kind, template, written)


@pytest.mark.parametrize(("kind", "template"), [each for each in EVERY if each[1] not in NO_ROLES])
def test_every_image_has_the_words_of_its_own_message(kind: str, template: str) -> None:
    chat: Chat = [("user", [IMAGE, "Look."]), ("assistant", ["I do."]), ("user", [IMAGE, IMAGE, QUESTION])]
    written = write(kind, template, [*chat, ("assistant", [ANSWER]), ("user", [SECOND])])
    assert found(kind, template, written, 0) == written.expected((0, 1))
    assert found(kind, template, written, 1) == found(kind, template, written, 2) == written.expected((2, 2))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "question", ["What DNA: is this?", "Is MYANSWER: here?", "SUPERUSER: who?", "no\nDNAAnswer: x", "user: it?"]
)
def test_markers_are_no_parts_of_words(kind: str, question: str) -> None:
    short = TEMPLATES["lines"].replace("USER:", "Q:").replace("ASSISTANT:", "A:")
    for template in ("answer", "llava-1.5", "vicuna", short):
        written = write(kind, template, [("user", [IMAGE, question]), *TWO[1:]])
        assert found(kind, template, written) == written.expected((0, 1))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_line_that_only_looks_like_the_end_is_a_word(kind: str) -> None:
    """The template writes its marker on a line of its own."""
    question = "Give the Answer: now?"
    written = write(kind, "answer", [("user", [IMAGE, question])])
    assert found(kind, "answer", written) == written.expected((0, 1))


@pytest.mark.parametrize("template", TEMPLATES)
def test_blanks_are_no_words(template: str) -> None:
    for nothing in ("", "  ", "\n", " \n\n "):
        with pytest.raises(PromptError, match="no text from the user"):
            found("bytes", template, write("bytes", template, [("user", [IMAGE, nothing])]))


def test_a_token_of_words_and_a_marker_counts() -> None:
    """Were it left out, the sign that makes it a question would be lost."""
    written = write("anything", "tight", ONE)
    columns = found("anything", "tight", written)
    assert columns == written.expected((0, 1))
    assert "?[" in tokenizer("anything").decode(written.prompt.tokens[0, columns[-1:]])


def test_what_is_learned() -> None:
    _, chatml = learned("bytes", "chatml")
    assert len(chatml.headers) == len(chatml.replies) == 1
    assert learned("bytes", "gemma")[1].enders == ()  # its roles must alternate
    assert len(learned("bytes", "gemma")[1].headers) == 1
    assert learned("bytes", "answer")[1].headers == ()  # no roles
    assert [marker.letters for marker in learned("words", "vicuna")[1].replies] == ["ASSISTANT:"]
    assert [marker.letters for marker in learned("words", "vicuna")[1].headers] == ["USER:"]
    assert learned("bytes", "mistral")[1].headers[0].letters == "[INST]"  # and not the end of </s> or <s>
    assert learned("bytes", "thinking")[1].replies == learned("bytes", "thinking")[1].replies[:1]


words = st.text(st.sampled_from(LETTERS + " é狗  aeio??"), min_size=1, max_size=24).map(str.strip).filter(bool)
layouts = st.sampled_from(
    [("image", "words"), ("words", "image"), ("words", "image", "words"), ("image", "words", "image"), ("image",) * 2]
)


@given(st.sampled_from(EVERY), layouts, st.lists(words, min_size=4, max_size=4), st.integers(0, 3), st.booleans())
@examples(600, suppress_health_check=[HealthCheck.too_slow])
def test_the_columns_are_those_of_the_users_words(
    way: tuple[str, str], layout: tuple[str, ...], said: list[str], padding: int, later: bool
) -> None:
    kind, template = way
    signs = ("<", "[INST]", "[/INST]", "###", "\nAnswer:", "Answer:", "Question:", "USER:", "ASSISTANT:")
    assume(not any(sign in word for word in said for sign in signs))
    answer, other, *rest = said
    unread = iter(rest)
    parts = [IMAGE if part == "image" else next(unread) for part in layout]
    if "words" not in layout:
        parts.append(rest[0])
    before: Chat = [("user", [other]), ("assistant", [answer])] if later and template not in NO_ROLES else []
    own = ("user", parts)
    for after in ([], [("assistant", [answer]), ("user", [other])]):
        written = write(kind, template, [*before, own, *after], padding=padding)
        expected = written.expected(*((len(before), n) for n, part in enumerate(parts) if part is not IMAGE))
        for image in range(len(written.images)):
            columns = found(kind, template, written, image)
            assert columns == expected
        if kind == "bytes" and template != "tight":  # where no token holds both, what is found reads as what was said
            text = tokenizer(kind).decode(written.prompt.tokens[0, columns])
            assert "".join(text.split()) == "".join("".join(part for part in parts if part is not IMAGE).split())


# ------------------------------------------------------------------------------------------------ packed prompts


def packed(*prompts: Prompt) -> Prompt:
    """Side by side in one row."""
    tokens, attended, ends, special = (
        torch.cat([getattr(prompt, name) for prompt in prompts], 1)
        for name in ("tokens", "attended", "turn_ends", "special")
    )
    visual = torch.cat([prompt.placeholders["image"] for prompt in prompts], 1)
    numbers = torch.cat([torch.full_like(prompt.tokens, number) for number, prompt in enumerate(prompts)], 1)
    return Prompt(tokens, attended, {"image": visual}, ends, special, numbers)


@pytest.mark.parametrize("scope", ["question", "turn", "after"])
@pytest.mark.parametrize(("kind", "template"), EVERY)
def test_packed_prompts_do_not_read_each_other(kind: str, template: str, scope: str) -> None:
    chats: list[Chat] = [TWO, [("user", ["What is it? ", IMAGE, "Tell."])], [("user", [SECOND])], ONE]
    alone = [write(kind, template, chat) for chat in chats]
    row = packed(*(each.prompt for each in alone))
    start, (_, template_learned) = 0, learned(kind, template)
    for each in alone:
        for image in each.images:
            moved = replace(image, columns=image.columns + start)
            expected = text_columns(each.prompt, image, scope, template_learned) + start
            assert torch.equal(text_columns(row, moved, scope, template_learned), expected)
            behind = replace(moved, columns=moved.columns - 1)
            if start == 0:
                continue
            later = text_columns(row.after(1), behind, scope, template_learned)
            assert torch.equal(later, expected - 1)
        start += each.prompt.length


def test_a_packed_picture_without_a_question_does_not_take_its_neighbours() -> None:
    alone = [write("bytes", "llava-1.5", chat) for chat in ([("user", [IMAGE])], ONE)]
    row = packed(*(each.prompt for each in alone))
    _, template = learned("bytes", "llava-1.5")
    with pytest.raises(PromptError, match="no text from the user"):
        text_columns(row, alone[0].images[0], "question", template)

"""Which text counts, with the chat templates that checkpoints really have."""

import threading
import warnings
from typing import Any

import pytest
import torch
from processors import chat, photo, processor, speaking_model
from transformers import TextIteratorStreamer, pipeline

from adafv import AdaFV
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import OptionError, PromptError, UnsupportedCallError
from adafv.prompts.prompt import place_images
from adafv.prompts.text import ChatTemplate, resolve_scope, text_columns

FAMILIES = ["llava", "llava-next"]
TEMPLATES = ["chatml", "vicuna", "mistral"]
QUESTION = "Is the dog (left) brown?"


def counted(
    template: str, scope: str, messages: list[dict[str, Any]], images: int = 1, prompt: bool = True
) -> list[str]:
    """The text that counts for each image, decoded."""
    made, model = processor("llava", template), speaking_model("llava", template)
    text = made.apply_chat_template(messages, add_generation_prompt=prompt)
    inputs = made(images=[photo(number) for number in range(images)], text=text, return_tensors="pt")
    family = family_of(model)
    read = read_prompt(model, family, inputs)
    layouts = family.layouts(model, "image", inputs, read.runs("image"))
    placed = place_images("image", read.placeholders["image"], layouts)
    scope, learned = resolve_scope(scope, made)
    return [
        made.tokenizer.decode(read.tokens[0, text_columns(read, image, scope, learned)].tolist()) for image in placed
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_question_is_the_users_words(template: str) -> None:
    [found] = counted(template, "question", chat(QUESTION))
    assert found == QUESTION.replace(" ", "")  # blanks are no words


@pytest.mark.parametrize("template", TEMPLATES)
def test_question_is_stable_over_turns(template: str) -> None:
    one = counted(template, "question", chat(QUESTION))
    assert counted(template, "question", chat(QUESTION, "Yes.", "Sure? [twice] USER ASSISTANT")) == one
    assert counted(template, "question", chat(QUESTION, "Yes.", "Sure?", "Quite."), prompt=False) == one


def test_turn_is_stable_where_turns_end() -> None:
    one = counted("chatml", "turn", chat(QUESTION))
    assert one == counted("chatml", "turn", chat(QUESTION, "Yes.", "Sure?"))
    assert QUESTION in one[0]
    assert "assistant" not in one[0]


def test_after_is_everything_after() -> None:
    [found] = counted("chatml", "after", chat(QUESTION, "Yes.", "Sure?"))
    assert found.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")
    assert found.startswith(f"\n{QUESTION}")
    assert "user" in found


def test_words_in_front_of_the_image_count() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this? "}, {"type": "image"}]}]
    assert "What is this?" in counted("chatml", "turn", messages)[0]
    assert counted("chatml", "question", messages)[0].strip() == "Whatisthis?"
    assert "What is this?" not in counted("chatml", "after", messages)[0]


def test_two_images_of_one_turn_share_its_text() -> None:
    messages = chat("Which is darker?")
    messages[0]["content"].insert(1, {"type": "image"})
    first, second = counted("chatml", "question", messages, images=2)
    assert first == second == "Whichisdarker?"


def test_an_image_in_turn_two_has_its_own_text() -> None:
    messages = chat("Look.", "I do.", QUESTION)
    messages[2]["content"].insert(0, {"type": "image"})
    first, second = counted("chatml", "question", messages, images=2)
    assert (first, second) == ("Look.", QUESTION.replace(" ", ""))


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_only_inside_the_template_is_refused(template: str) -> None:
    for nothing in ("", "  ", "\n"):
        with pytest.raises(PromptError, match="outside the chat template"):
            counted(template, "question", chat(nothing))


def test_learned_template() -> None:
    made = processor("llava", "chatml")
    learned = ChatTemplate.of(made)
    decode = made.tokenizer.decode
    assert decode(list(learned.after_image)) == "\n"
    assert decode(list(learned.after_words)) == "<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate.of(processor("llava", "vicuna")).before_words == ()


def test_processors_without_a_usable_template() -> None:
    """Who asks for the question is told that it cannot be; who asks for nothing gets the turn, and is told why."""
    made = processor("llava")
    for template, reason in (
        (None, "with a chat template"),
        ("{{ messages[0]['content'][0]['type'] }}", "does not show images"),
        ("<image>", "words end"),
    ):
        made.chat_template = template
        with pytest.raises(OptionError, match=reason):
            AdaFV(keep=0.1, processor=made, text="question")
        with pytest.warns(UserWarning, match=f"{reason}.*text='turn'"):
            assert AdaFV(keep=0.1, processor=made).settings.scope == "turn"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert AdaFV(keep=0.1, processor=made, text="turn").settings.scope == "turn"
            assert AdaFV(keep=0.1, processor=made, variant="published").settings.scope == "after"
    alone = made.tokenizer
    alone.chat_template = made.chat_template
    with pytest.raises(OptionError, match="AutoProcessor"):
        AdaFV(keep=0.1, processor=alone, text="question")
    with pytest.warns(UserWarning, match="a tokenizer alone.*text='turn'"):
        assert AdaFV(keep=0.1, processor=alone).settings.scope == "turn"


def test_the_default_scope() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_scope(None, None) == ("turn", None)
        scope, template = resolve_scope(None, processor("llava"))
        assert (scope, template is None) == ("question", False)
        for explicit in ("turn", "after"):
            assert resolve_scope(explicit, processor("llava")) == (explicit, None)
    with pytest.raises(OptionError, match="needs the processor"):
        resolve_scope("question", None)
    with pytest.raises(OptionError, match="known are: question, turn, after"):
        resolve_scope("all", None)


def test_question_needs_tokens() -> None:
    made, model = processor("llava"), speaking_model("llava")
    text = made.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    inputs = made(images=photo(), text=text, return_tensors="pt")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with AdaFV(keep=3, processor=made)(model), pytest.raises(UnsupportedCallError, match="input_ids"):
        model.generate(**inputs, inputs_embeds=embeds, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline(family: str) -> None:
    made, model = processor(family), speaking_model(family)
    messages = chat(QUESTION)
    messages[0]["content"][0] = {"type": "image", "image": photo()}
    inputs = made.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ask = pipeline("image-text-to-text", model=model, processor=made)
    before = ask(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)
    with AdaFV(keep=3, processor=made)(model) as adafv:
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answer = ask(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)
        batch = ask(text=[messages, messages], max_new_tokens=5, do_sample=False, return_full_text=False)
        inside = pipeline("image-text-to-text", model=model, processor=made)
        assert inside(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False) == answer
    assert adafv.last.tokens_after == [3]
    assert answer[0]["generated_text"] == made.decode(expected[0], skip_special_tokens=True)
    assert [one[0]["generated_text"] for one in batch] == [answer[0]["generated_text"]] * 2
    assert ask(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_snippet(family: str) -> None:
    made, model = processor(family), speaking_model(family)
    text = made.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    inputs = made(images=photo(), text=text, return_tensors="pt")
    with AdaFV(keep=0.1, processor=made)(model) as adafv:
        output = model.generate(**inputs, max_new_tokens=5)
    assert output[0, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"][0].tolist()
    [kept], [before] = adafv.last.kept, adafv.last.tokens_before
    assert len(kept) == max(1, round(before * 0.1))
    assert torch.equal(kept, kept.sort().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_from_another_thread(family: str) -> None:
    """As chat servers do it: generate in a thread, read pieces of text in this one."""
    made, model = processor(family), speaking_model(family)
    text = made.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    inputs = made(images=photo(), text=text, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False}
    with AdaFV(keep=0.1, processor=made)(model) as adafv:
        expected = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        for skip_prompt in (True, False):
            streamer = TextIteratorStreamer(made.tokenizer, skip_prompt=skip_prompt, timeout=60)
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
            thread.start()
            pieces = "".join(streamer)
            thread.join()
            prompt = "" if skip_prompt else made.decode(inputs["input_ids"][0])
            assert pieces == prompt + made.decode(expected)
    assert adafv.last is not None

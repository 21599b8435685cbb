"""adafv inside lmms-eval gives what adafv itself gives, question by question."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from drawn_tasks import Drawn
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager

from adafv import AdaFV, Pruner
from adafv.asking.session import Session

BUDGETS = ("8", "0.25", "all")


@pytest.fixture(scope="module")
def run(drawn: Drawn) -> Any:
    """Run a task by the name of the model, as lmms-eval's own command does; the samples of it, and its numbers."""

    @cache
    def with_arguments(
        task: str, arguments: str, batch: int = 1, simple: bool = False
    ) -> tuple[list[dict[str, Any]], Any]:
        found = simple_evaluate(
            model="adafv",
            model_args=f"pretrained=bundled,{arguments}",
            tasks=[task],
            task_manager=TaskManager(
                "ERROR", include_path=str(drawn.folder), include_defaults=False, model_name="adafv"
            ),
            batch_size=batch,
            device="cpu",
            force_simple=simple,
        )
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        return samples, found["results"][task]

    return with_arguments


def inputs_of(session: Session, drawn: Drawn, number: int) -> Any:
    """A question as the processor alone writes it."""
    content = [*({"type": "image"} for _ in drawn.pictures[number]), {"type": "text", "text": drawn.questions[number]}]
    prompt = session.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = {"images": drawn.pictures[number]} if drawn.pictures[number] else {}
    return session.processor(**images, text=prompt, return_tensors="pt")


def answer(session: Session, inputs: Any, tokens: int = 12) -> str:
    output = session.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return session.processor.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def own_answers(session: Session, drawn: Drawn, pruner: Pruner | None) -> list[str]:
    """One question at a time."""
    every = [inputs_of(session, drawn, number) for number in range(len(drawn.questions))]
    if pruner is None:
        return [answer(session, inputs) for inputs in every]
    with pruner(session.model):
        return [answer(session, inputs) for inputs in every]


def pruner_for(session: Session, keep: str) -> Pruner | None:
    return None if keep == "all" else AdaFV(keep, processor=session.processor)


def test_the_entry_point_registers_both_ways_of_asking() -> None:
    manifest = get_model_manifest("adafv")
    assert manifest.model_id == "adafv"
    assert not get_model("adafv").is_simple
    assert get_model("adafv", force_simple=True).is_simple


class TestGeneration:
    @pytest.mark.parametrize("keep", BUDGETS)
    def test_answers_are_adafvs_own(self, run: Any, session: Session, drawn: Drawn, keep: str) -> None:
        expected = own_answers(session, drawn, pruner_for(session, keep))
        samples, results = run("drawn_generate", f"keep={keep}", 1)
        assert [sample["filtered_resps"] for sample in samples] == [[answer] for answer in expected]
        right = sum(one == other for one, other in zip(expected, drawn.answers, strict=True))
        assert results["exact_match,none"] == pytest.approx(right / len(expected))
        assert len(set(expected)) > 3

    def test_budgets_differ(self, run: Any) -> None:
        few, all_of_them = (
            [each["filtered_resps"] for each in run("drawn_generate", f"keep={keep}", 1)[0]] for keep in ("1", "all")
        )
        assert few != all_of_them

    @pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
    def test_batches_change_nothing(self, run: Any, simple: bool) -> None:
        alone, _ = run("drawn_generate", "keep=8", 1)
        together, _ = run("drawn_generate", "keep=8", 6, simple)
        assert [each["resps"] for each in together] == [each["resps"] for each in alone]
        assert [each["token_counts"] for each in together] == [each["token_counts"] for each in alone]

    def test_methods_and_their_options(self, run: Any, session: Session, drawn: Drawn) -> None:
        samples, _ = run("drawn_generate", "keep=6,method=random,seed=3,positions=original", 4)
        pruner = Pruner("random", 6, seed=3, positions="original", processor=session.processor)
        assert [sample["filtered_resps"] for sample in samples] == [
            [answer] for answer in own_answers(session, drawn, pruner)
        ]

    def test_until(self, run: Any) -> None:
        whole, _ = run("drawn_generate", "keep=8", 6)
        cut, _ = run("drawn_until", "keep=8", 6)
        texts = [each["filtered_resps"][0] for each in whole]
        assert [each["filtered_resps"][0] for each in cut] == [text.partition("e")[0].strip() for text in texts]
        assert any("e" in text for text in texts)

    def test_no_sampling_where_the_task_says_so(self, run: Any) -> None:
        greedy, _ = run("drawn_generate", "keep=8", 6)
        told, _ = run("drawn_told_not_to_sample", "keep=8", 6)
        assert [each["resps"] for each in told] == [each["resps"] for each in greedy]


def own_likelihood(session: Session, drawn: Drawn, number: int, text: str, pruner: Pruner | None) -> tuple[float, bool]:
    """(mean negative log-probability, greedy) by one forward pass over the question with the answer behind it."""
    inputs = inputs_of(session, drawn, number)
    given = session.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs = dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], given], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(given)], 1),
    }
    with torch.no_grad():
        if pruner is None:
            logits = session.model(**inputs).logits
        else:
            with pruner(session.model):
                logits = session.model(**inputs).logits
    predicted = logits[0, -given.shape[1] - 1 : -1].log_softmax(-1)
    greedy = bool((predicted.argmax(-1) == given[0]).all())
    return -predicted.gather(1, given[0].unsqueeze(1)).mean().item(), greedy


class TestLikelihoods:
    @pytest.mark.parametrize("keep", BUDGETS)
    def test_are_those_of_a_forward_pass(self, run: Any, session: Session, drawn: Drawn, keep: str) -> None:
        samples, results = run("drawn_choose", f"keep={keep}", 6, True)
        pruner = pruner_for(session, keep)
        right = 0
        for number, sample in enumerate(samples):
            texts = [f" {choice}" for choice in drawn.choices[number]]
            expected = [own_likelihood(session, drawn, number, text, pruner) for text in texts]
            found = [tuple(each) for each in sample["filtered_resps"]]
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=2e-5)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            losses = [loss for loss, _ in expected]
            right += drawn.choices[number][losses.index(min(losses))] == drawn.answers[number]
        assert results["acc,none"] == pytest.approx(right / len(samples))
        assert results["acc,none"] > 0.5

    def test_one_answer(self, run: Any, session: Session, drawn: Drawn) -> None:
        samples, results = run("drawn_weigh", "keep=8", 4, True)
        pruner = pruner_for(session, "8")
        expected = [own_likelihood(session, drawn, n, f" {drawn.answers[n]}", pruner) for n in range(len(samples))]
        assert results["acc,none"] == pytest.approx(sum(greedy for _, greedy in expected) / len(expected))

    def test_chat_models_are_not_asked(self, run: Any) -> None:
        """lmms-eval's own rule; here is what it means for whoever leaves --force_simple out."""
        with pytest.raises(AssertionError, match="generation only"):
            run("drawn_choose", "keep=8", 6, False)


class TestRefused:
    def test_settings_that_are_not_known(self, run: Any) -> None:
        with pytest.raises(Exception, match="do_the_dishes"):
            run("drawn_unknown", "keep=8", 1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("method=adafv", "budget"),
            ("keep=0", "keep"),
            ("keep=8,method=adaf", "did you mean adafv"),
            ("keep=8,objektive=split", "objective"),
        ],
    )
    def test_arguments(self, run: Any, arguments: str, message: str) -> None:
        with pytest.raises(Exception, match=message):
            run("drawn_generate", arguments, 1)

    def test_batches_of_unknown_size(self, run: Any) -> None:
        with pytest.raises(Exception, match="batch_size"):
            run("drawn_generate", "keep=8", "auto")


def test_the_numbers_can_be_written(run: Any) -> None:
    _, results = run("drawn_generate", "keep=8", 1)
    json.dumps(results)

"""Fine-tuning through pruned tokens with transformers' `Trainer`, inside `with AdaFV(...)(model):`."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, IMAGE, PAD, FamilyRow, make_inputs
from oracle import masked_inputs
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from adafv import AdaFV, compress
from adafv.bundled import bundled_model
from adafv.evaluation.world.questions import a, colour
from adafv.evaluation.world.scenes import render, sample_scene

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

KEEP = 0.3
IGNORED = -100
rows = pytest.mark.parametrize(
    "row", [row for row in FAMILIES if row.name in ("llava", "llava-next")], ids=lambda row: row.name
)
before_or_inside = pytest.mark.parametrize("made", ["before", "inside"])


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "optim": "sgd",  # Adam would blow differences in the last bit up to the learning rate
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def examples(row: FamilyRow, count: int = 6) -> list[dict[str, Any]]:
    """Prompts of different lengths as a processor makes them, with a column that no model takes."""
    model, found = row.build(), []
    for number in range(count):
        inputs = make_inputs(row, model, [1] if number % 2 else [0, 1], seed=number)
        example = {name: value[-1] for name, value in inputs.items()}
        ids = example["input_ids"]
        labels = ids.masked_fill((ids == PAD) | (ids == IMAGE) | (ids.roll(1) == IMAGE), IGNORED)
        found.append({**example, "labels": labels, "scene": number})
    return found


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator: prompts padded on the left, crops of images filled up."""
    assert all("scene" not in row for row in rows)
    fills = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED, "position_ids": 0}
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        longest = max(len(value) for value in values)
        if name in fills:
            values = [torch.cat((value.new_full((longest - len(value),), fills[name]), value)) for value in values]
        elif name == "pixel_values" and values[0].dim() == 4:
            values = [torch.cat((v, v.new_zeros(longest - len(v), *v.shape[1:]))) for v in values]
        batch[name] = torch.stack(values)
    return batch


def as_masked(stock: Any, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples under which the stock model sees the tokens that stay: by the oracle."""
    masked = []
    for example in data:
        inputs = {name: value[None] for name, value in example.items() if name not in ("scene", "labels")}
        masks = masked_inputs(inputs, compress(stock, inputs, keep=KEEP).record.keep_mask)
        masked.append({**example, **{name: masks[name][0] for name in ("attention_mask", "position_ids")}})
    return masked


def language_model_only(model: Any) -> Any:
    """What is trained here leaves the choice of tokens alone, so that each step can be compared with the oracle's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model.layers" in name)
    return model


@rows
@before_or_inside
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not-reentrant", "reentrant"])
def test_training_is_that_of_the_masked_stock_model(
    row: FamilyRow, made: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    """Every logged loss, the evaluation and the weights afterwards: by the oracle, over several steps of Trainer."""
    data = examples(row)
    options: dict[str, Any] = {}
    if checkpointing is not None:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    given = {"args": arguments(tmp_path, **options), "data_collator": padded}

    model = language_model_only(row.build())
    if checkpointing:
        model.enable_input_require_grads()  # reentrant checkpointing wants it wherever the embeddings are frozen
    trainer = Trainer(model, train_dataset=data, eval_dataset=data, **given) if made == "before" else None
    with AdaFV(keep=KEEP)(model) as adafv:
        trainer = trainer or Trainer(model, train_dataset=data, eval_dataset=data, **given)
        assert trainer.label_names == ["labels"]
        assert trainer.model is model
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        last = trainer.evaluate()["eval_loss"]
        assert adafv.last.prompt_length_after < adafv.last.prompt_length_before

    stock = language_model_only(row.build())
    if checkpointing:
        stock.enable_input_require_grads()
    masked = as_masked(stock, data)
    other = Trainer(stock, train_dataset=masked, eval_dataset=masked, **given)
    assert first == pytest.approx(other.evaluate()["eval_loss"], abs=1e-5)
    other.train()
    assert last == pytest.approx(other.evaluate()["eval_loss"], abs=1e-4)
    mine, theirs = ([log["loss"] for log in each.state.log_history if "loss" in log] for each in (trainer, other))
    assert len(mine) == 3
    assert mine == pytest.approx(theirs, abs=1e-4)
    for (name, one), two in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3, msg=name)
    start = language_model_only(row.build())
    changed = {name for name, value in start.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert changed == {name for name, value in start.named_parameters() if value.requires_grad}


BESIDE_LOGITS = ["cache", "past_key_values", "image_outputs", "image_hidden_states"]
"""What stock outputs hold too, and Trainer cannot gather in every release."""


def loss_on_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As a `compute_loss_func` of the user's own."""
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def right_answers(prediction: Any) -> dict[str, float]:
    """As a `compute_metrics` of the user's own, which knows its labels and nothing of pruning."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    said, labels = logits[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    counted = labels != IGNORED
    scores = logits[:, :-1][counted]
    assert not np.isnan(scores).any()
    return {"right": float((said == labels)[counted].mean()), "mean": float(scores.mean())}


@rows
@pytest.mark.parametrize("outside", ["label_smoothing", "compute_loss_func"])
def test_losses_and_metrics_outside_the_model(row: FamilyRow, outside: str, tmp_path: Path) -> None:
    """Trainer then takes the labels away from the model, and compares logits with them by their columns."""
    data = examples(row)
    for example in data:  # what padding predicts means nothing
        example["labels"] = example["labels"].masked_fill(example["attention_mask"].cumsum(0) == 1, IGNORED)
    options = {"label_smoothing_factor": 0.1} if outside == "label_smoothing" else {}
    given: dict[str, Any] = {
        "args": arguments(tmp_path, **options),
        "data_collator": padded,
        "compute_metrics": right_answers,
        "compute_loss_func": loss_on_logits if outside == "compute_loss_func" else None,
    }
    model, stock = language_model_only(row.build()), language_model_only(row.build())
    with AdaFV(keep=KEEP)(model):
        trainer = Trainer(model, train_dataset=data, eval_dataset=data, **given)
        trainer.train()
        mine = trainer.evaluate(ignore_keys=BESIDE_LOGITS)
    masked = as_masked(stock, data)
    other = Trainer(stock, train_dataset=masked, eval_dataset=masked, **given)
    other.train()
    theirs = other.evaluate(ignore_keys=BESIDE_LOGITS)
    for name in ("eval_loss", "eval_right", "eval_mean"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-4)
    for (name, one), two in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3, msg=name)


@rows
@before_or_inside
def test_mixed_precision(row: FamilyRow, made: str, tmp_path: Path) -> None:
    """For bf16, accelerate replaces `forward` on the model, and leaves it so; pruning must end with the block anyway."""
    data, model = examples(row), row.build()
    given = {"args": arguments(tmp_path, bf16=True), "train_dataset": data, "eval_dataset": data}
    trainer = Trainer(model, **given, data_collator=padded) if made == "before" else None
    with AdaFV(keep=KEEP)(model) as adafv:
        trainer = trainer or Trainer(model, **given, data_collator=padded)
        trainer.evaluate()
        trainer.train()
        assert adafv.last.prompt_length_after < adafv.last.prompt_length_before
        inputs = make_inputs(row, row.build(), [1])
        assert adafv.last.prompt_length_after < adafv.last.prompt_length_before
        with torch.no_grad():
            assert model(**inputs).logits.isnan().any()
    assert type(model) is type(row.build())
    whole = inputs["input_ids"].shape[1]
    assert model(**inputs).logits.shape[1] == whole
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= whole + 2
    with AdaFV(keep=KEEP)(model):
        with torch.no_grad():
            assert model(**inputs).logits.isnan().any()
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


@rows
def test_checkpoints_of_trainer(row: FamilyRow, tmp_path: Path) -> None:
    """What Trainer saves is the stock class and its weights, and training goes on from it."""
    data = examples(row)

    def run(steps: int, resume: bool = False) -> Trainer:
        model = language_model_only(row.build())
        options = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        with AdaFV(keep=KEEP)(model):
            trainer = Trainer(model, args=options, train_dataset=data, data_collator=padded)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    trained = run(2).model
    saved, report = type(trained).from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not any(report.values()), report
    assert type(saved) is type(row.build())
    assert saved.config.architectures == [type(saved).__name__]
    assert saved.state_dict().keys() == row.build().state_dict().keys()
    for mine, theirs in zip(saved.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert run(4, resume=True).state.global_step == 4


@rows
def test_an_adapter_under_trainer(row: FamilyRow, tmp_path: Path) -> None:
    model = row.build()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    adapted = peft.get_peft_model(model, config)
    data = examples(row)
    options = arguments(tmp_path, gradient_checkpointing=True, save_strategy="steps", save_steps=3)
    with AdaFV(keep=KEEP)(model) as adafv:
        trainer = Trainer(adapted, args=options, train_dataset=data, eval_dataset=data, data_collator=padded)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        assert adafv.last.prompt_length_after < adafv.last.prompt_length_before
    again = peft.PeftModel.from_pretrained(row.build(), tmp_path / "checkpoint-3").eval()
    inputs = make_inputs(row, row.build(), [1])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted.eval()(**inputs).logits)


# ------------------------------------------------------------------------- the bundled model learns something


def asked(split: str, count: int) -> list[dict[str, Any]]:
    """Colour questions, to be answered in a form that the bundled model was never taught: "a red key." for "red"."""
    random, found = Random(f"fine-tuning, {split}"), []
    for number in range(count):
        scene = sample_scene(split, number, photos=False)
        question = colour(scene, random)
        if question is not None:
            answer = a(f"{question.answer} {question.things[0].kind}") + "."
            picture = render(scene, 144)[0]
            found.append({"picture": picture, "question": question.text, "answer": answer})
    return found


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pictures and chats to a padded batch, with labels on the answer alone."""
    assistant = processor.tokenizer.convert_tokens_to_ids("<assistant>")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        chats = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
                {"role": "assistant", "content": row["answer"]},
            ]
            for row in rows
        ]
        texts = [processor.apply_chat_template(chat) for chat in chats]
        batch = processor(images=[row["picture"] for row in rows], text=texts, padding=True, return_tensors="pt")
        before_answer = (batch["input_ids"] == assistant).long().flip(1).cumsum(1).flip(1) > 0
        batch["labels"] = batch["input_ids"].masked_fill(before_answer | (batch["attention_mask"] == 0), IGNORED)
        return batch

    return collate


def losses(model: Any, collate: Any, data: list[dict[str, Any]]) -> Tensor:
    """Of every example by itself."""
    with torch.no_grad():
        return torch.stack([model.eval()(**collate([example])).loss for example in data])


@pytest.mark.slow
def test_the_bundled_model_learns_a_new_form_of_answer(tmp_path: Path) -> None:
    """LoRA and the projector, from a quarter of the tokens: the loss falls on every held-out scene, and by looking."""
    model = AutoModelForImageTextToText.from_pretrained(bundled_model())
    processor = AutoProcessor.from_pretrained(bundled_model())
    collate = collator(processor)
    train, held_out = asked("train", 260), asked("test", 40)
    # The same questions and answers, each with the picture of the next one.
    pictures = [example["picture"] for example in held_out]
    blind = [{**one, "picture": other} for one, other in zip(held_out, pictures[1:] + pictures[:1], strict=True)]
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*language_model.*_proj",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = peft.get_peft_model(model, config)
    options = arguments(
        tmp_path,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        max_steps=40,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=5,
        gradient_checkpointing=True,
        remove_unused_columns=False,  # pictures become columns in the collator
        logging_steps=10,
    )
    with AdaFV(keep=0.25, processor=processor)(model) as adafv:
        trainer = Trainer(adapted, args=options, train_dataset=train, eval_dataset=held_out, data_collator=collate)
        before, loss_before = losses(adapted, collate, held_out), trainer.evaluate()["eval_loss"]
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        after, loss_after = losses(adapted, collate, held_out), trainer.evaluate()["eval_loss"]
        unseen = losses(adapted, collate, blind)
        assert adafv.last.tokens_after[0] == 36
    whole = losses(adapted, collate, held_out)
    print(
        f"loss {loss_before:.2f} -> {loss_after:.2f} ({whole.mean():.2f} with all tokens, {unseen.mean():.2f} with the "
        f"wrong picture), {seconds:.0f} s of processor time"
    )
    assert before.mean() == pytest.approx(loss_before, rel=0.05)
    assert loss_after < 0.15 * loss_before
    assert (after < before).all()
    assert after.mean() < 0.5 * unseen.mean()

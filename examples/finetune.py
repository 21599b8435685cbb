"""Fine-tune a language model through pruned visual tokens: a few steps on captions, in a plain loop.

    python finetune.py                                       the bundled model
    python finetune.py --model llava-hf/llava-1.5-7b-hf      a model of your own; docs/training.md has LoRA and Trainer

Memory and time of a step are those of the shorter prompt. Gradients pass through the tokens that are kept; which ones
are kept is not learned.
"""

import argparse
import json

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv import AdaFV
from adafv.bundled import bundled_model, sample_pictures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=bundled_model(), help="folder, or id on the Hugging Face Hub")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--keep", type=float, default=0.25, help="share of each picture's visual tokens")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(options.model).to(device).train()
processor = AutoProcessor.from_pretrained(options.model)
tokenizer = processor.tokenizer

pictures = sample_pictures()
captions = [entry["caption"] for entry in json.loads(pictures[0].with_name("samples.json").read_text())]
answers = [caption + tokenizer.eos_token for caption in captions]
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
batch = processor(
    images=[Image.open(picture) for picture in pictures],
    text=[prompt + answer for answer in answers],
    padding=True,
    padding_side="left",
    return_tensors="pt",
).to(device, model.dtype)
batch["labels"] = torch.full_like(batch["input_ids"], -100)
for row, answer in enumerate(answers):  # only the answer, at the end of its row, is learned
    length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    batch["labels"][row, -length:] = batch["input_ids"][row, -length:]

optimizer = torch.optim.AdamW(model.get_decoder().parameters(), lr=3e-4)
with AdaFV(keep=options.keep, processor=processor)(model) as adafv:
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
print(f"trained through {adafv.last.tokens_after[0]} of {adafv.last.tokens_before[0]} visual tokens a picture")

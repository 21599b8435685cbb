"""Two methods on one picture: what each keeps, and what the model then answers.

How to call it:

    python compare.py                                                      the bundled model and a sample picture
    python compare.py --model llava-hf/llava-1.5-7b-hf photo.jpg "What is the man holding?"
    python compare.py --methods adafv uniform --keep 0.1                   `adafv methods` lists all methods
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv import Pruner
from adafv.bundled import bundled_model, sample_pictures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", nargs="?", default=sample_pictures()[0])
parser.add_argument("question", nargs="?", default="What color is the banana?")
parser.add_argument("--model", default=bundled_model(), help="folder, or id on the Hugging Face Hub")
parser.add_argument("--keep", type=float, default=0.05, help="share of the photo's visual tokens")
parser.add_argument("--methods", nargs=2, default=["adafv", "saliency"])
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(options.model).to(device)
processor = AutoProcessor.from_pretrained(options.model)

chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open(options.photo).convert("RGB"), text=prompt, return_tensors="pt")
inputs = inputs.to(device, model.dtype)

kept = []
for method in options.methods:
    with Pruner(method, keep=options.keep, processor=processor)(model) as pruner:
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    record = pruner.last
    kept.append(set(record.kept[0].tolist()))
    print(f"{method} keeps {record.tokens_after[0]} of {record.tokens_before[0]} visual tokens: {answer}")

    # The patches of the first crop, which is the whole picture, or a thumbnail of it.
    layout = record.layouts[0]
    patches = torch.zeros(layout.rows, layout.columns, dtype=torch.bool)
    shown = record.crop[0] == 0
    patches[record.row[0][shown].cpu(), record.column[0][shown].cpu()] = True
    for row in patches.tolist():
        print("    " + " ".join("#" if patch else "." for patch in row))
print(f"both keep {len(kept[0] & kept[1])} tokens")

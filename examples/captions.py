"""Captions for a batch of photos, from a quarter of their visual tokens.

How to call it:

    python captions.py                                                     the bundled model and its sample pictures
    python captions.py --model llava-hf/llava-1.5-7b-hf a.jpg b.jpg c.jpg  a model and photos of your own
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv import AdaFV
from adafv.bundled import bundled_model, sample_pictures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos", nargs="*", default=sample_pictures())
parser.add_argument("--model", default=bundled_model(), help="folder, or id on the Hugging Face Hub")
parser.add_argument("--keep", type=float, default=0.25, help="share of each photo's visual tokens")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(options.model).to(device)
processor = AutoProcessor.from_pretrained(options.model)

chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(
    images=[Image.open(photo).convert("RGB") for photo in options.photos],
    text=[prompt] * len(options.photos),
    padding=True,
    padding_side="left",  # as `generate` asks for
    return_tensors="pt",
).to(device, model.dtype)

with AdaFV(keep=options.keep, processor=processor)(model) as adafv:
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)

# The whole prompt comes back in front of the answer, as from the stock model.
captions = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
record = adafv.last
for photo, caption, before, after in zip(
    options.photos, captions, record.tokens_before, record.tokens_after, strict=True
):
    print(f"{Path(photo).name} ({after} of {before} visual tokens): {caption.strip()}")

"""A chat about one picture: later turns go on with the pruned key/value cache of the first.

How to call it:

    python chat.py                                                      the bundled model and a sample picture
    python chat.py --model llava-hf/llava-1.5-7b-hf photo.jpg "What is the man holding?" "What colour is it?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from adafv import AdaFV
from adafv.bundled import bundled_model, sample_pictures

QUESTIONS = ["What color is the banana?", "Is there a bottle?", "How many cars are there?"]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", nargs="?", default=sample_pictures()[0])
parser.add_argument("questions", nargs="*", default=QUESTIONS)
parser.add_argument("--model", default=bundled_model(), help="folder, or id on the Hugging Face Hub")
parser.add_argument("--keep", type=float, default=0.25, help="share of the photo's visual tokens")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(options.model).to(device)
processor = AutoProcessor.from_pretrained(options.model)
photo = Image.open(options.photo).convert("RGB")

chat: list[dict] = []
cache = DynamicCache(config=model.config)
# One block around all turns: outside of it, nobody knows which tokens the cache lacks.
with AdaFV(keep=options.keep, processor=processor)(model) as adafv:
    for question in options.questions:
        content = [{"type": "text", "text": question}]
        chat.append({"role": "user", "content": content if chat else [{"type": "image"}, *content]})
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=photo, text=prompt, return_tensors="pt").to(device, model.dtype)
        if cache.get_seq_length() > 0:
            del inputs["pixel_values"]  # the picture is in the cache
        output = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
        length = inputs["input_ids"].shape[1]
        answer = processor.decode(output[0, length:], skip_special_tokens=True).strip()
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        print(f"{question} {answer} (prompt: {length} tokens, cache: {cache.get_seq_length()})")
print(f"kept {adafv.last.tokens_after[0]} of {adafv.last.tokens_before[0]} visual tokens")

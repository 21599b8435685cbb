"""How far the searches are from the best set of tokens, by their own certificate: `python -m benchmarks.search`.

Certificates themselves are held against brute force in `tests/test_core.py`. Scores are heavy-tailed random ones, and with
`--testbed` those of photographs under a real checkpoint.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from adafv import compress
from adafv.core import joint_search, split_search
from adafv.evaluation.speed.report import table

BUDGETS, BUDGETS_OF = (29, 58, 144), 576
QUESTIONS = ("Is there a person in the image?", "What colour is the largest object?", "Describe the image briefly.")
Scores = tuple[Tensor, Tensor]
"""t and s, [cases, N] each."""


def heavy_tailed(cases: int, tokens: int) -> Scores:
    """Log-normal, normalised; independent, related and closely related by turns."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, cases, tokens, generator=generator)
    related = torch.tensor([0.0, 0.5, 0.9]).repeat(cases // 3 + 1)[:cases].unsqueeze(-1)
    second = related * first + (1 - related.square()).sqrt() * second
    return (2 * first).softmax(-1), (2 * second).softmax(-1)


def of_photographs(checkpoint: str, photos: Path, limit: int) -> list[Scores]:
    """Of a real checkpoint, [1, N] each, without tokens that show no patch."""
    from PIL import Image

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    found = []
    for number, path in enumerate(sorted(photos.glob("*.jpg"))[:limit]):
        question = QUESTIONS[number % len(QUESTIONS)]
        prompt = f"USER: {processor.image_token}\n{question} ASSISTANT:"
        if getattr(processor, "chat_template", None):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        with Image.open(path) as photo:
            inputs = processor(images=photo.convert("RGB"), text=prompt, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        record = compress(model, inputs, keep=0.1).record
        assert record is not None
        text_attention, saliency = record.text_attention[0], record.saliency[0]
        assert text_attention is not None
        assert saliency is not None
        shown = ~text_attention.isnan()
        found.append((text_attention[shown].unsqueeze(0), saliency[shown].unsqueeze(0)))
    if not found:
        raise SystemExit(f"{photos} holds no jpg files")
    return found


def rows(name: str, scores: Sequence[Scores]) -> list[list[str]]:
    """A row per budget."""
    found = []
    for budget in BUDGETS:
        certificates, ratios = [], []
        for text_attention, saliency in scores:
            keep = max(1, round(budget * text_attention.shape[-1] / BUDGETS_OF))
            joint = joint_search(text_attention, saliency, keep)
            split = split_search(text_attention, saliency, keep)
            certificates += (100 * joint.certificate).tolist()
            ratios += (split.objective / joint.objective).tolist()
        rank = torch.quantile(torch.tensor(certificates), torch.tensor([0.5, 0.95])).tolist()
        below = sum(ratio > 1.0 + 1e-6 for ratio in ratios)
        shown = [f"{rank[0]:.3g}", f"{rank[1]:.3g}", f"{statistics.fmean(ratios):.4f}", str(below)]
        found.append([name, f"{budget / BUDGETS_OF:.1%}", str(len(ratios)), *shown])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where the search misses what is promised: a certificate below 1 % in the median, and never below `split`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=300, help="random pairs of scores")
    parser.add_argument("--testbed", help="folder of a checkpoint")
    parser.add_argument("--photos", type=Path, help="folder of jpg files")
    options = parser.parse_args(arguments)
    if (options.testbed is None) != (options.photos is None):
        parser.error("--testbed and --photos go together")
    found = rows("random", [heavy_tailed(options.cases, BUDGETS_OF)])
    if options.testbed:
        found += rows(Path(options.testbed).name, of_photographs(options.testbed, options.photos, 64))
    heads = ("scores", "keep", "cases", "certificate, %, median", "95th percentile", "split / joint", "joint < split")
    print(table(heads, found))
    return int(any(float(row[3]) >= 1.0 or row[-1] != "0" for row in found))


if __name__ == "__main__":
    raise SystemExit(main())

"""Numbers that papers give, to stand beside what is measured; none of them was measured here.

They were read by hand. Every paper has its own prompts, scripts and unpruned baseline, so points of one table say nothing
beside points of another: compare shares of the unpruned model, and those with care.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a paper's table."""

    method: str
    budget: str
    """As the paper says it."""
    mean: float
    """Mean share of the unpruned model, percent, over the table's own benchmarks."""
    scores: Mapping[str, float]
    """By lmms-eval's name of the task; empty where the mean alone was read."""


@dataclass(frozen=True)
class Table:
    """What a paper says of one model."""

    model: str
    """Id on the Hub of the checkpoint in the form of transformers."""
    source: str
    harness: str
    """What measured it."""
    rows: tuple[Row, ...]


TASKS = {
    "gqa": ("GQA", "exact_match", 100.0),
    "scienceqa_img": ("SQA", "exact_match", 100.0),
    "textvqa_val": ("TextVQA", "exact_match", 100.0),
    "pope": ("POPE", "pope_f1_score", 100.0),
    "mme": ("MME-P", "mme_perception_score", 1.0),
    "mmbench_en_dev": ("MMB", "gpt_eval_score", 1.0),
    "mmvet": ("MMVet", "gpt_eval_score", 1.0),
}
"""lmms-eval's name of a task -> (what papers call it, the metric that they give, its factor)."""

JUDGED = ("mmvet",)
"""Tasks of which every answer is scored by a judge model behind an API."""

_ORDER = tuple(TASKS)


def _row(method: str, budget: str, mean: float, *scores: float) -> Row:
    return Row(method, budget, mean, dict(zip(_ORDER, scores, strict=False)))


PUBLISHED = (
    Table(
        model="llava-hf/llava-v1.6-vicuna-7b-hf",
        source="arXiv 2501.09532 (AdaFV; AdaV in ACL Findings 2025), LLaVA-NeXT-7B, 2,880 tokens, mean of seven tasks",
        harness="the authors' scripts, not lmms-eval",
        rows=(
            _row("unpruned", "2,880", 100.0, 62.93, 69.66, 59.59, 86.32, 1513.8, 67.70, 42.6),
            _row("AdaV", "75 % pruned, 720", 98.49, 62.04, 69.31, 58.37, 87.20, 1509.4, 67.35, 39.7),
            _row("AdaV", "90 % pruned, 288", 96.00, 60.65, 68.57, 57.09, 85.98, 1503.3, 66.32, 36.0),
            _row("AdaV", "95 % pruned, 144", 94.35, 58.53, 68.91, 55.11, 85.25, 1452.9, 65.20, 36.2),
            _row("FasterVLM", "75 % pruned, 720", 98.14),
            _row("FasterVLM", "90 % pruned, 288", 92.47),
            _row("FasterVLM", "95 % pruned, 144", 87.06),
            _row("FastV", "75 % pruned, 720", 97.35),
            _row("FastV", "90 % pruned, 288", 84.81),
            _row("FastV", "95 % pruned, 144", 75.46),
            _row("SparseVLM", "75 % pruned, 720", 93.19),
            _row("SparseVLM", "90 % pruned, 288", 82.08),
        ),
    ),
    Table(
        model="llava-hf/llava-v1.6-vicuna-7b-hf",
        source="arXiv 2608.30263 (Cen-Prune), LLaVA-NeXT-7B, up to so many tokens, mean of ten tasks, others than these",
        harness="lmms-eval and each method's own code",
        rows=(
            _row("VisionZip", "640", 97.2),
            _row("VisionZip", "320", 93.0),
            _row("VisionZip", "160", 87.8),
            _row("VisPruner", "640", 96.3),
            _row("VisPruner", "320", 92.5),
            _row("VisPruner", "160", 87.7),
            _row("DivPrune", "640", 95.3),
            _row("DivPrune", "320", 92.5),
            _row("DivPrune", "160", 89.9),
            _row("CDPruner", "640", 97.0),
            _row("CDPruner", "320", 94.4),
            _row("CDPruner", "160", 92.1),
        ),
    ),
)


def published_for(model: str) -> list[Table]:
    """The tables about a model, by its id on the Hub or a folder of that name."""
    name = model.rstrip("/").rpartition("/")[2]
    return [table for table in PUBLISHED if table.model.rpartition("/")[2] == name]

"""Checkpoints on disk, as vLLM wants them."""

import json
import shutil
from pathlib import Path

from engines import BUNDLED
from safetensors.torch import load_file, save_file


def bundled(name: str, folder: Path) -> Path:
    """The trained model that comes with adafv, "llava" or "llava-next", in a folder of its own.

    vLLM reads no weights from beside a checkpoint's folder, where the second has most of its own.
    """
    if name == "llava":
        return BUNDLED / name
    target = folder / name
    if not target.exists():
        shutil.copytree(BUNDLED / name, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        # One file: transformers, without an index, reads no other than this.
        weights = load_file(BUNDLED / "llava/model.safetensors") | load_file(BUNDLED / name / "newline.safetensors")
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def with_siglip(name: str, folder: Path) -> Path:
    """A small "llava-onevision" or "llava-siglip" (LLaVA-1.5 with a SigLIP tower, read one layer before its last).

    The bundled language model behind a tower and a projector with random weights. LLaVA-OneVision cuts images into up to
    16 crops of 6 x 6 patches, so that large ones are scaled down to what nine crops would have.
    """
    import torch
    import transformers

    target = folder / name
    if target.exists():
        return target
    trained = transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED / "llava")
    tokens = transformers.AutoProcessor.from_pretrained(BUNDLED / "llava")
    side, patch = 72, 12
    size = {"height": side, "width": side}
    shared = {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
            "vision_use_head": False,
        },
        "text_config": trained.config.text_config,
        "image_token_index": trained.config.image_token_id,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
    }
    strategy = {"vision_feature_select_strategy": "full", "chat_template": tokens.chat_template}
    if name == "llava-siglip":
        config = transformers.LlavaConfig(**shared, vision_feature_layer=-2)
        model = transformers.LlavaForConditionalGeneration(config)
        processor = transformers.LlavaProcessor(
            image_processor=transformers.SiglipImageProcessor(size=size),
            tokenizer=tokens.tokenizer,
            patch_size=patch,
            num_additional_image_tokens=0,
            **strategy,
        )
    else:
        pinpoints = [[side * rows, side * columns] for rows in range(1, 5) for columns in range(1, 5)]
        config = transformers.LlavaOnevisionConfig(
            **shared,
            vision_feature_layer=-1,
            image_grid_pinpoints=pinpoints,
            video_token_index=tokens.tokenizer.unk_token_id,
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
        processor = transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
            tokenizer=tokens.tokenizer,
            num_image_tokens=(side // patch) ** 2,
            **strategy,
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
            if parameter.dim() > 1:  # as lively as trained ones, so that no two patches are alike
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        if name == "llava-onevision":
            newline = model.model.image_newline
            newline.copy_(0.1 * torch.randn(newline.shape, generator=generator))
    model.model.language_model.load_state_dict(trained.model.language_model.state_dict())
    model.generation_config = trained.generation_config
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


def reading_layer(layer: int, checkpoint: Path, folder: Path) -> Path:
    """A copy whose projector reads another layer of the tower; released models read the one before the last."""
    target = folder / f"{checkpoint.name}-layer{layer}"
    if not target.exists():
        shutil.copytree(checkpoint, target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"vision_feature_layer": layer}))
    return target


def for_stock_vllm(checkpoint: Path, folder: Path) -> Path:
    """A copy whose tower is named as vLLM's own loader (0.31, 0.32) expects it; adafv's loader does so by itself."""
    target = folder / f"stock-{checkpoint.name}"
    if not target.exists():
        shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        weights = load_file(checkpoint / "model.safetensors")
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): kept for name, kept in weights.items()}
        save_file(renamed, target / "model.safetensors", {"format": "pt"})
    return target

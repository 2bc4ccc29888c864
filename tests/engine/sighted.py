"""Tiny vision-language models, one builder each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import Tensor

WORDS = 900
_TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDS = {
    "vision_start_token_id": WORDS,
    "vision_end_token_id": WORDS + 1,
    "image_token_id": WORDS + 2,
    "video_token_id": WORDS + 3,
}


@dataclass(frozen=True)
class Sight:
    """One architecture.

    Attributes:
        config: of a tiny model.
        files: what `save_pretrained` of its processor would write, by name.
        hub: a part of the names of transformers 5, and what stands there in checkpoints on the
            Hub, where vLLM knows only the latter.
        named: tokens that the processor asks its tokenizer for.
        special: what it knows by fixed names; at the same places in the vocabulary.

    """

    config: Callable[[], transformers.PreTrainedConfig]
    files: dict[str, dict[str, Any]]
    hub: tuple[str, str] | None = None
    named: dict[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = SPECIAL

    def as_on_the_hub(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights by names that vLLM takes."""
        if self.hub is None:
            return weights
        new, old = self.hub
        return {n if old in n else n.replace(new, old): t for n, t in weights.items()}


def _seeing(
    kind: type[transformers.PreTrainedConfig], vision: dict[str, Any], rope: dict[str, Any]
) -> transformers.PreTrainedConfig:
    """Whose text has three coordinates a token, and a head of its own."""
    return kind(
        text_config={**_TEXT, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
        **_IDS,
    )


def _qwen25() -> transformers.PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 108,  # no multiple of 16: few kernels of 8 bits hold it
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": _TEXT["hidden_size"],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return _seeing(transformers.Qwen2_5_VLConfig, vision, rope)


def _qwen3() -> transformers.PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_heads": 2,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": _TEXT["hidden_size"],
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 12, 12],
        "mrope_interleaved": True,
    }
    return _seeing(transformers.Qwen3VLConfig, vision, rope)


def _llava() -> transformers.PreTrainedConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_TEXT, "tie_word_embeddings": False},
        vision_config=vision,
        image_token_index=_IDS["image_token_id"],
        video_token_index=_IDS["video_token_id"],
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _llava_files() -> dict[str, dict[str, Any]]:
    looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}}
    return {
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": SPECIAL[2],
            "video_token": SPECIAL[3],
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]],
            **looks,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            **looks,
        },
    }


def _gemma3() -> transformers.PreTrainedConfig:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    layers = ["sliding_attention", "full_attention"]
    window = {"query_pre_attn_scalar": 64, "sliding_window": 64, "layer_types": layers}
    return transformers.Gemma3Config(
        text_config={**_TEXT, **window},  # its head is tied
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=_IDS["image_token_id"],  # where an image goes, in a prompt
        eoi_token_index=_IDS["vision_end_token_id"],
        image_token_index=_IDS["video_token_id"],
    )


def _gemma3_files() -> dict[str, dict[str, Any]]:
    kind = {"processor_class": "Gemma3Processor"}
    looks = {"size": {"height": 56, "width": 56}, "image_seq_length": 4}
    image = {"image_processor_type": "Gemma3ImageProcessor", **kind, **looks}
    return {
        "preprocessor_config.json": image,
        "processor_config.json": {**kind, "image_seq_length": 4},
    }


def _files(
    processor: str, video: str, patch: int, image: str = "Qwen2VLImageProcessor"
) -> dict[str, dict[str, Any]]:
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    area = {"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": (2 * patch) ** 2 * 16}
    looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": area}
    return {
        "preprocessor_config.json": {
            "image_processor_type": image,
            "processor_class": processor,
            **sizes,
            **looks,
        },
        "video_preprocessor_config.json": {"video_processor_type": video, **sizes, **looks},
    }


def _qwen2() -> transformers.PreTrainedConfig:
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": _TEXT["hidden_size"],
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return _seeing(transformers.Qwen2VLConfig, vision, rope)


def _glm() -> transformers.PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "out_hidden_size": _TEXT["hidden_size"],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_theta": 10000.0, "mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5}
    return transformers.Glm4vConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", **rope},
            "tie_word_embeddings": False,
        },
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=_IDS["image_token_id"],
        image_start_token_id=_IDS["vision_start_token_id"],
        image_end_token_id=_IDS["vision_end_token_id"],
        video_token_id=_IDS["video_token_id"],
        video_start_token_id=WORDS + len(SPECIAL),
        video_end_token_id=WORDS + len(SPECIAL) + 1,
    )


def _idefics3() -> transformers.PreTrainedConfig:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return transformers.Idefics3Config(
        text_config={"model_type": "llama", **_TEXT, "tie_word_embeddings": False},
        vision_config=vision,
        scale_factor=2,
        image_token_id=_IDS["image_token_id"],
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def _idefics3_files() -> dict[str, dict[str, Any]]:
    kind = {"processor_class": "Idefics3Processor"}
    edge = {"longest_edge": 56}  # an image is not cut up
    looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": edge, "max_image_size": edge}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor",
            **kind,
            **looks,
        },
        "processor_config.json": {**kind, "image_seq_len": 4},
    }


SIGHTS = {
    "qwen2.5-vl": Sight(
        _qwen25,
        _files("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
    ),
    "qwen3-vl": Sight(
        _qwen3,
        _files("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
    ),
    "llava-onevision": Sight(
        _llava, _llava_files(), hub=("vision_tower.", "vision_tower.vision_model.")
    ),
    "gemma3-vl": Sight(
        _gemma3,
        _gemma3_files(),
        hub=("vision_tower.", "vision_tower.vision_model."),
        named={"boi_token": SPECIAL[2], "eoi_token": SPECIAL[1], "image_token": SPECIAL[3]},
    ),
}

# Picked afterwards, to see whether something of them is new. `make test` leaves them out.
FURTHER = {
    "qwen2-vl": Sight(_qwen2, _files("Qwen2VLProcessor", "Qwen2VLVideoProcessor", 14)),
    "glm-4.1v": Sight(
        _glm,
        _files("Glm4vProcessor", "Glm4vVideoProcessor", 14, image="Glm4vImageProcessor"),
        named={"image_token": SPECIAL[2], "video_token": SPECIAL[3]},
        special=(
            *SPECIAL,
            *(
                f"<|{which}_of_{what}|>"
                for what in ("video", "image")
                for which in ("begin", "end")
            ),
            "<|video|>",
            "<|image|>",
        ),
    ),
    # vLLM serves SmolVLM by the same code.
    "idefics3": Sight(
        _idefics3,
        _idefics3_files(),
        special=("<fake_token_around_image>", "<global-img>", "<image>", "<|video_pad|>"),
    ),
}

"""Tiny vision-language models, one builder each, and what they are shown."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from flashquant.plan import stored_names
from tests.support import vision
from tests.support.gpu import SHARE

vision.make_ready()

_WORDS = 900
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
_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # vLLM looks for Gemma's
_SHOWN = (_WORDS, _WORDS + 2, _WORDS + 1)  # an image in a prompt
_IDS = {
    "vision_start_token_id": _WORDS,
    "vision_end_token_id": _WORDS + 1,
    "image_token_id": _WORDS + 2,
    "video_token_id": _WORDS + 3,
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

    """

    config: Callable[[], transformers.PreTrainedConfig]
    files: dict[str, dict[str, Any]]
    hub: tuple[str, str] | None = None
    named: dict[str, str] = field(default_factory=dict)

    def as_on_the_hub(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights by names that vLLM takes."""
        if self.hub is None:
            return weights
        new, old = self.hub
        return {n if old in n else n.replace(new, old): t for n, t in weights.items()}


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
    return transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
        **_IDS,
    )


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
    return transformers.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
        **_IDS,
    )


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
            "image_token": _SPECIAL[2],
            "video_token": _SPECIAL[3],
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


def _files(processor: str, video: str, patch: int) -> dict[str, dict[str, Any]]:
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    area = {"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": (2 * patch) ** 2 * 16}
    looks = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": area}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": processor,
            **sizes,
            **looks,
        },
        "video_preprocessor_config.json": {"video_processor_type": video, **sizes, **looks},
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
        named={"boi_token": _SPECIAL[2], "eoi_token": _SPECIAL[1], "image_token": _SPECIAL[3]},
    ),
}


def options(**more: Any) -> dict[str, Any]:
    """Of an engine."""
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 << 20,
        **SHARE,
        "max_model_len": 256,
        "max_num_batched_tokens": 512,
        "dtype": "bfloat16",
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        **more,
    }


def in_tower(name: str) -> bool:
    """Whether a weight is one of what turns images into embeddings."""
    return re.search(r"\b(visual|vision_tower|vision_model)\.", name) is not None


def missing() -> str:
    """Why no architecture can be shown an image here, or nothing."""
    return "" if vision.is_there() else "image processors want torchvision, which is not here"


@contextmanager
def understood() -> Iterator[None]:
    """Let vLLM look at a class of models here, not in a process that is not ready for it."""
    from vllm.model_executor.models import registry

    with mock.patch.object(registry, "_run_in_subprocess", lambda ask: ask()):
        yield


def make(name: str, path: Path, seed: int) -> Path:
    """Write a random bf16 checkpoint of an architecture."""
    sight = SIGHTS[name]
    config = sight.config()
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for leaf, parameter in model.named_parameters():
        dice = torch.Generator().manual_seed(zlib.crc32(f"{seed} {leaf}".encode()))
        values = torch.randn(parameter.shape, generator=dice) * 0.06
        if "norm" in leaf and leaf.endswith("weight"):
            values += parameter.float().mean().round()
        with torch.no_grad():
            parameter.copy_(values)
    model.save_pretrained(path)
    if sight.hub is not None:
        saved = sight.as_on_the_hub(load_file(path / "model.safetensors"))
        save_file(saved, path / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{number}": number for number in range(_WORDS)}
    words |= {word: _WORDS + number for number, word in enumerate((*_SPECIAL, *_NEWLINES))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w0",
        pad_token="w1",
        additional_special_tokens=list(_SPECIAL),
        **({"extra_special_tokens": sight.named} if sight.named else {}),
    ).save_pretrained(path)
    for file, said in sight.files.items():
        (path / file).write_text(json.dumps(said))
    return path


def live(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint as a trainer's model holds them, by the names it has there.

    Where vLLM does not take those, with the part of them that it knows from the Hub.
    """
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    weights = dict(model.state_dict())
    for sight in SIGHTS.values():
        if sight.hub is not None and any(sight.hub[1] in name for name in stored_names(path)):
            weights = sight.as_on_the_hub(weights)
    return weights


def prompt() -> dict[str, Any]:
    """A few words, an image of noise, and a few words more."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return {
        "prompt_token_ids": [*range(5, 9), *_SHOWN, *range(9, 29)],
        "multi_modal_data": {"image": Image.fromarray(noise)},
    }


def words() -> dict[str, Any]:
    """A prompt without any."""
    return {"prompt_token_ids": list(range(5, 45))}

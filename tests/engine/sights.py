"""Tiny vision-language models, as checkpoints, and what they are shown."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.engine.sighted import FURTHER, WORDS
from tests.engine.sighted import SIGHTS as TESTED
from tests.support import vision
from tests.support.gpu import SHARE

vision.make_ready()

SIGHTS = {**TESTED, **FURTHER}

_NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # vLLM looks for Gemma's
_SHOWN = (WORDS, WORDS + 2, WORDS + 1)  # an image in a prompt


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
    words = {f"w{number}": number for number in range(WORDS)}
    words |= {word: WORDS + number for number, word in enumerate((*sight.special, *_NEWLINES))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w0",
        pad_token="w1",
        additional_special_tokens=list(sight.special),
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

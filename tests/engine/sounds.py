"""A tiny multimodal model: what it hears passes an encoder, whose embeddings vLLM keeps.

Sounds rather than images: every image processor wants torchvision, which PyPI has for CUDA only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

SAMPLING_RATE = 16000
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    "max_model_len": 1024,  # a sound of 30 s, by which vLLM measures, is 750 tokens
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": {"audio": 1},
}
_WORDS = 997
_SPECIAL = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


def make(path: Path, *, policy: int, tower: int) -> Path:
    """Write a random bf16 checkpoint: one seed for the language model, one for its ears."""
    config = transformers.Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": 1000,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
        },
        audio_token_index=_WORDS + 1,
        dtype=torch.bfloat16,
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        heard = "audio_tower" in name or "multi_modal_projector" in name
        dice = torch.Generator().manual_seed(1000 * (tower if heard else policy) + number)
        values = torch.randn(parameter.shape, generator=dice) * 0.06
        parameter.data = values + (1 if "norm" in name else 0)
    model.bfloat16().save_pretrained(path)
    _add_processor(path)
    return path


def _add_processor(path: Path) -> None:
    words = {f"w{number}": number for number in range(_WORDS)}
    words |= {word: _WORDS + number for number, word in enumerate(_SPECIAL)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(feature_size=128, sampling_rate=SAMPLING_RATE),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="w0",
            pad_token="w1",
            additional_special_tokens=list(_SPECIAL),
        ),
    ).save_pretrained(path)


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name in the file."""
    return load_file(path / "model.safetensors")


def prompt(seed: int = 0) -> dict[str, Any]:
    """A few words, a second of noise, and a few words more."""
    noise = np.random.default_rng(seed).standard_normal(SAMPLING_RATE).astype(np.float32)
    return {
        "prompt_token_ids": [*range(5, 9), *range(_WORDS, _WORDS + 3), *range(9, 13)],
        "multi_modal_data": {"audio": (noise, SAMPLING_RATE)},
    }

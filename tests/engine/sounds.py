"""A tiny multimodal model: what it hears passes an encoder, whose embeddings vLLM keeps.

Sounds rather than images: most image processors want torchvision, which PyPI has for CUDA only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.support.gpu import SHARE

SAMPLING_RATE = 16000
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    **SHARE,
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
    with torch.device("meta"):
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    weights = {}
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        heard = "audio_tower" in name or "multi_modal_projector" in name
        dice = torch.Generator().manual_seed(1000 * (tower if heard else policy) + number)
        values = torch.randn(parameter.shape, generator=dice) * 0.06
        weights[_published(name)] = (values + (1 if "norm" in name else 0)).bfloat16()
    path.mkdir(parents=True)
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _add_processor(path)
    return path


def _published(name: str) -> str:
    """As the checkpoints of this architecture call it, from before transformers had moved it."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


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


def prompt(seed: int = 0) -> dict[str, Any]:
    """A few words, a second of noise, and a few words more."""
    noise = np.random.default_rng(seed).standard_normal(SAMPLING_RATE).astype(np.float32)
    return {
        "prompt_token_ids": [*range(5, 9), *range(_WORDS, _WORDS + 3), *range(9, 13)],
        "multi_modal_data": {"audio": (noise, SAMPLING_RATE)},
    }

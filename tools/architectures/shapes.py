"""The numbers that all tiny models share.

Every width is a multiple of 128, for blocks of 128 by 128; the vocabulary is not one
of 64, so that vLLM pads it, and padding has to survive a reload.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, LENGTH = 256, 512, 4, 2, 64, 2, 1000, 512

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
# No token may end an answer, or be one that a tiny vocabulary does not have.
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def shaped(kind: type[PreTrainedConfig], **own: Any) -> PreTrainedConfig:
    """A configuration in the common shape, except for what is the architecture's `own`."""
    return kind(**{**_SHAPE, **_NO_TOKENS, **own})


def alone(kind: type[PreTrainedConfig], **own: Any) -> PreTrainedConfig:
    """One that has words of its own for every number."""
    return kind(**{**_NO_TOKENS, "vocab_size": VOCAB, "tie_word_embeddings": False, **own})

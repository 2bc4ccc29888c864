"""Tiny models that vLLM lays out for a GPU, with and without flashquant.

The road is vLLM's own from engine arguments to processed weights; only the engine around the
model, which would run it, is missing.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

import flashquant
from flashquant.patches.layers import kernel_state
from flashquant.patches.seams import engine_args
from tests.support.groups import make_experts_group
from tools.layouts.machine import Machine, pretending


def configured(checkpoint: Path, scheme: str | None, **options: Any) -> VllmConfig:
    """What an engine on this checkpoint would be configured with; by flashquant, in a scheme."""
    flashquant.patch()
    environment = {} if scheme is None else {"FLASHRL_CONFIG": scheme}
    has_kernels = mock.patch.object(engine_args, "asks_to_emulate", return_value=False)
    with mock.patch.dict(os.environ, environment), has_kernels:
        return EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=128,
            kv_cache_memory_bytes=16 << 20,
            **options,
        ).create_engine_config()


def load(machine: Machine, config: VllmConfig) -> nn.Module:
    """Create, load and process the model."""
    with pretending(machine), set_current_vllm_config(config):
        _be_the_only_worker()
        model: nn.Module = get_model(vllm_config=config)
        return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a kernel would read, by full name."""
    return {
        f"{name}.{path}": leaf
        for name, module in model.named_modules()
        if not name.endswith(".attn")
        for path, leaf in kernel_state.tensors(module)
        if path != "weight_shape"  # of a checkpoint of packed codes; no kernel reads it
    }


def _be_the_only_worker() -> None:
    """The groups of one worker; an engine of this process may have made those it needs itself."""
    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
    make_experts_group()

"""What the engines have in common: one bracket an update, and tensors for the model.

Before vLLM 0.25 the worker itself opened and closed the bracket, and named the model's loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine

# How the worker of vLLM before 0.25 names `model.load_weights`.
Load = Callable[[Iterable[tuple[str, Tensor]]], Any]


class Bracketed(WeightTransferEngine):  # type: ignore[misc]  # vLLM is not typed for us
    """A worker's end: a subclass says where the tensors of one chunk come from."""

    def start_weight_update(self) -> None:
        # Looked up now: this is the name that flashquant's points replace.
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    @staticmethod
    def trainer_send_weights(*args: Any, **kwargs: Any) -> None:
        """vLLM up to 0.27 wants one of every engine; the trainer's end is a class of its own."""
        raise NotImplementedError("send with WeightTransferTrainerFactory.trainer_init(...)")

    def shutdown(self) -> None:
        """Nothing is held."""

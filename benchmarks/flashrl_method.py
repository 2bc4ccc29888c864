"""FlashRL's way to update an 8-bit engine, by vLLM's own functions, on an engine without a patch.

What FlashRL (2025) does at each push, told in shared words, none of its code:

    1. every parameter of the model gets fresh, empty memory in checkpoint format
    2. the trainer's tensors are quantized (int8) and go through the model's `load_weights`
    3. `process_weights_after_loading` runs over every layer
    4. each result is copied over what the kernels had before, by `as_strided` and `copy_`

It is here so that its time can be compared; vLLM's metadata, recorded for its own reload, says
what the checkpoint format was. Where a CPU kernel keeps a raw pointer to scales (oneDNN), step 4
leaves it to memory that is freed: the fresh tensors are kept here until the next push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Quantize = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


class Method:
    """One engine, updated FlashRL's way."""

    def __init__(self, llm: Any, quantize: Quantize | None = None) -> None:
        """Args:
        llm: an engine in this process that flashquant does not look after.
        quantize: what becomes of each tensor first; None where vLLM quantizes by itself (fp8).

        """
        self._model: nn.Module = llm.apply_model(lambda model: model)[0]
        self._config = llm.llm_engine.vllm_config
        self._quantize = quantize
        self._fresh: list[Tensor] = []

    def __call__(self, weights: Mapping[str, Tensor]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.utils.torch_utils import set_default_torch_dtype

        dtype = self._config.model_config.dtype
        with (
            set_current_vllm_config(self._config),
            set_default_torch_dtype(dtype),
            torch.no_grad(),
        ):
            kept = self._take_out_parameters()
            self._model.load_weights(self._stored(weights))
            process_weights_after_loading(
                self._model, self._config.model_config, torch.device("cpu")
            )
            self._put_back(kept)

    def _take_out_parameters(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """Step 1; what the kernels have read so far is returned."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        kept, made = [], {}
        for module in self._model.modules():
            metas = get_layerwise_info(module).restore_metadata[0]
            if not metas:
                continue
            # The bias is in no metadata; it keeps its layout, whatever processing does.
            live = {name: p for name, p in module._parameters.items() if p is not None}
            kept.append((module, live))
            vars(module).pop("_already_called_process_weights_after_loading", None)
            for name in live.keys() - metas.keys() - {"bias"}:
                del module._parameters[name]
            for name, meta in metas.items():
                shared = id(live[name]) if name in live else id(meta)
                if shared not in made:
                    made[shared] = _empty(meta, module)
                module._parameters[name] = made[shared]
        return kept

    def _stored(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.items():
            if self._quantize is None:
                yield name, tensor
            else:
                yield from self._quantize(name, tensor)

    def _put_back(self, kept: list[tuple[nn.Module, dict[str, Tensor]]]) -> None:
        """Step 4."""
        self._fresh = []
        for module, live in kept:
            for name, old in live.items():
                fresh = module._parameters.get(name)
                if fresh is None or fresh is old or fresh.shape != old.shape:
                    continue
                self._fresh.append(fresh)
                old.data.copy_(fresh.data.as_strided(old.size(), old.stride()))
                module._parameters[name] = old


def _empty(meta: Tensor, module: nn.Module) -> Tensor:
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    tensor = materialize_meta_tensor(restore_layer_refs(meta, module))
    if hasattr(module, "kv_cache"):
        tensor.fill_(1)  # scales of a cache, which no trainer sends
    if hasattr(tensor, "weight_loader"):
        tensor.weight_loader = _get_original_loader(tensor)
    return tensor


def int8_rows(columns: Mapping[str, Tensor]) -> Quantize:
    """FlashRL's int8: `(w * output_scale) * input_scale`, rounded and clamped, all in eager torch.

    Args:
        columns: name -> the scales `[N, 1]` of the checkpoint's codes, which stay as they are.

    """

    def quantize(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        scale = columns.get(f"{name}_scale")
        if scale is None:
            yield name, tensor
            return
        ones = torch.ones(tensor.shape[1])
        product = tensor.float() * scale.reciprocal() * ones
        yield name, torch.clamp(torch.round(product), -128, 127).to(torch.int8)
        yield f"{name}_scale", scale

    return quantize

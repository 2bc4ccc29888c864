"""Routing replay (R3, 2510.11370): the trainer's experts are those that the rollout chose.

A router compares scores that are nearly alike, and two engines round them differently: now and
then another expert is chosen, and a token's probability jumps. No weight mends that. vLLM returns
what it chose (`enable_return_routed_experts=True`), and inside of this context the routers of a
transformers model choose the same. How much each expert counts is still the trainer's own: scores
and their gradients are of its router, at the replayed experts.

    with tis.replay_routing(model, [output.routed_experts for output in outputs], attention_mask):
        logits = model(input_ids, attention_mask=attention_mask).logits
        ...
        value.backward()  # within, too: checkpointed layers run forward once more

No table of routers: a decoder layer is watched, and where it takes the K best of as many scores as
the model has experts, the K are given to it. So it must run eagerly, not compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashquant.errors import CorrectionError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")
# By which configurations of transformers count experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@contextmanager
def replay_routing(
    model: nn.Module,
    routed: Tensor | Sequence[Any],
    attention_mask: Tensor | None = None,
) -> Iterator[None]:
    """Within, each router of the model chooses the experts that were recorded.

    Args:
        model: of transformers, a mixture of experts, not compiled.
        routed: for each row what vLLM returned as `output.routed_experts`: `[tokens, layers, K]`,
            integers, of its real tokens from the first on. Later ones (the last one that was
            sampled has never been through the engine) choose for themselves. Or all of it as one
            tensor `[B, T, layers, K]`, with -1 where nothing was recorded.
        attention_mask: `[B, T]`, True on the real tokens of each row. None: all are, and T is that
            of the longest row, and one more: the last token that was sampled.

    Raises:
        CorrectionError: the model has no experts or other ones, or limits them by groups as
            DeepSeek-V2 does; shapes differ; or, on the way out, no router has asked.

    """
    recorded = _laid_out(routed, attention_mask)
    counts = _experts_of(model)
    layers = {
        int(found[1]): module
        for name, module in model.named_modules()
        if (found := _LAYER.search(name))
    }
    _check(recorded, counts, len(layers))
    asked: set[int] = set()
    undo = [_wrapped(layers[i], i, recorded[:, i], counts, asked) for i in sorted(layers)]
    try:
        yield
    finally:
        for each in undo:
            each()
    if not asked:
        raise CorrectionError(
            f"no layer of {type(model).__name__} chose {recorded.shape[-1]} of "
            f"{_either(counts)} experts, so nothing was replayed. Run the model inside the "
            "context, eagerly; and look whether the routing is that of this model."
        )


class _Replay(TorchFunctionMode):
    """What a layer's router gets for the K best."""

    def __init__(self, layer: int, recorded: Tensor, counts: frozenset[int]) -> None:
        super().__init__()
        self.layer, self.recorded, self.counts = layer, recorded, counts
        self.replayed = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        scores, own = args[0], result.indices
        if scores.shape[-1] not in self.counts or own.shape[-1] != self.recorded.shape[-1]:
            return result
        chosen = self._chosen(own)
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    def _chosen(self, own: Tensor) -> Tensor:
        if own.numel() != self.recorded.numel():
            raise CorrectionError(
                f"the router of layer {self.layer} chose for {own.numel() // own.shape[-1]} "
                f"tokens, and the routing of {len(self.recorded)} is replayed. Give both the same "
                "rows and padding."
            )
        self.replayed += 1
        if self.replayed > 1:
            raise CorrectionError(
                f"layer {self.layer} chooses experts more than once in one pass, so that it is not "
                "known which choice was recorded. It cannot be replayed."
            )
        recorded = self.recorded.to(own.device).view_as(own)
        return torch.where(recorded >= 0, recorded, own)


def _wrapped(
    module: nn.Module, layer: int, recorded: Tensor, counts: frozenset[int], asked: set[int]
) -> Callable[[], None]:
    """The module's forward under the mode; what takes it out again."""
    original = module.forward
    was = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode = _Replay(layer, recorded, counts)
        with mode:
            result = original(*args, **kwargs)
        if mode.replayed:
            asked.add(layer)
        return result

    def undo() -> None:
        if was is None:
            del module.forward
        else:
            module.forward = was

    module.forward = forward
    return undo


def _laid_out(routed: Tensor | Sequence[Any], attention_mask: Tensor | None) -> Tensor:
    """`[B * T, layers, K]` int64, -1 where nothing was recorded."""
    if isinstance(routed, Tensor):
        if routed.dim() != 4:
            raise CorrectionError(
                f"routed has shape {tuple(routed.shape)}, but is [B, T, layers, K], or a list of "
                "[tokens, layers, K], one a row"
            )
        return routed.flatten(0, 1).long()
    # By way of a wider type: not every torch has unsigned ones of 16 bits.
    rows = [
        torch.as_tensor(row.astype("int64") if hasattr(row, "astype") else row) for row in routed
    ]
    if not rows or {(row.dim(), row.shape[1:]) for row in rows} != {(3, rows[0].shape[1:])}:
        raise CorrectionError(
            f"routed is a list of shapes {[tuple(row.shape) for row in rows]}, but of "
            "[tokens, layers, K], with the same layers and K in every row"
        )
    real = attention_mask
    if real is None:
        real = torch.ones(len(rows), max(len(row) for row in rows) + 1)
    if real.dim() != 2 or len(real) != len(rows):
        raise CorrectionError(
            f"attention_mask has shape {tuple(real.shape)}, and {len(rows)} rows were routed. Give "
            "[B, T]."
        )
    laid = torch.full((*real.shape, *rows[0].shape[1:]), -1)
    for place, row, mask in zip(laid, rows, real.bool().cpu(), strict=True):
        places = mask.nonzero().squeeze(-1)
        if len(row) > len(places):
            raise CorrectionError(
                f"the routing of {len(row)} tokens was recorded for a row of {len(places)} real "
                "ones. Give each row its own, of the prompt and of what was generated."
            )
        place[places[: len(row)]] = row.cpu().long()
    return laid.flatten(0, 1)


def _experts_of(model: nn.Module) -> frozenset[int]:
    config: Any = model.config
    text = config.get_text_config()
    counts = {getattr(text, name, None) for name in _COUNTS}
    found = frozenset(count for count in counts if isinstance(count, int) and count > 1)
    if not found:
        raise CorrectionError(
            f"{type(model).__name__} has no experts: its configuration has none of "
            f"{', '.join(_COUNTS)}"
        )
    if getattr(text, "topk_method", None) == "group_limited_greedy":
        raise CorrectionError(
            f"{type(model).__name__} takes its experts' weights from scores of which whole groups "
            "are set to 0 (topk_method='group_limited_greedy'), so that an expert of another group "
            "could not be replayed. Train it without replay."
        )
    return found


def _check(recorded: Tensor, counts: frozenset[int], layers: int) -> None:
    if recorded.shape[1] != layers:
        raise CorrectionError(
            f"the routing of {recorded.shape[1]} layers was recorded, and the model has {layers}"
        )
    highest = int(recorded.max()) if recorded.numel() else -1
    if highest >= max(counts):
        raise CorrectionError(f"expert {highest} was recorded, and the model has {_either(counts)}")


def _either(counts: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(counts)))

"""What a trainer does in the experiments T0 to T14, the same to either arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms

Weights = Mapping[str, Tensor]

_Q = "model.layers.0.self_attn.q_proj.weight"
_V = "model.layers.1.self_attn.v_proj.weight"
_NORM = "model.layers.1.input_layernorm.weight"


@dataclass(frozen=True)
class Experiment:
    """One thing that a trainer does.

    Attributes:
        live: pushes the weights to an engine and returns what each of the calls that count
            raised; those before them only bring the engine to where it begins.
        pushed: what the trainer asks for, out of policies A and B, if that is not all of B.
        whole: all of B is sent, each tensor once: to refuse that is no answer.

    """

    name: str
    what: str
    live: Callable[[Any, Weights], list[str | None]]
    pushed: Callable[[Weights, Weights], Weights] | None = None
    whole: bool = False


def without(weights: Weights, name: str) -> dict[str, Tensor]:
    """All but one weight and, where it is stored as codes, its scale."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith(name)}


def only(weights: Weights, name: str) -> dict[str, Tensor]:
    """One weight and, where it is stored as codes, its scale."""
    return {key: tensor for key, tensor in weights.items() if key.startswith(name)}


def with_a_wrong_shape(weights: Weights) -> dict[str, Tensor]:
    return {**weights, _NORM: torch.zeros(7, dtype=torch.bfloat16)}


def with_nan(weights: Weights) -> dict[str, Tensor]:
    """One NaN in a weight; codes have none to offer, so in their scale."""
    name = next(n for n, tensor in only(weights, _V).items() if tensor.is_floating_point())
    spoilt = weights[name].clone()
    spoilt[0, 0] = torch.nan
    return {**weights, name: spoilt}


def through_one_buffer(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The sender overwrites it as soon as it is asked for the next tensor."""
    buffer = torch.empty(max(tensor.nbytes for tensor in weights.values()), dtype=torch.uint8)
    for name, tensor in weights.items():
        buffer.fill_(255)  # NaN, in bf16 and in float32
        yield name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def poison(llm: Any, b: Weights) -> str:
    """T2, from which others begin."""
    error = push(llm, with_a_wrong_shape(b))
    if error is None:
        raise AssertionError("a wrong shape was taken: nothing to recover from")
    return error


def push(llm: Any, weights: Weights) -> str | None:
    return arms.push(llm, weights.items())


def push_in_two(llm: Any, first: Weights, b: Weights) -> list[str | None]:
    """Two updates, each of which says that it is whole."""
    rest = {name: tensor for name, tensor in b.items() if name not in first}
    return [push(llm, first), push(llm, rest)]


def one_by_one(llm: Any, b: Weights) -> list[str | None]:
    """No bracket at all; an exception ends it, as it would end the trainer."""

    def load_each(model: Any) -> None:
        for name, tensor in b.items():
            model.load_weights([(name, tensor)])

    return [arms.attempt(llm.apply_model, load_each)]


def cut_bracket(llm: Any, b: Weights) -> list[str | None]:
    """The trainer stops inside qkv without an error, begins anew and sends everything."""
    from vllm.model_executor.model_loader import reload

    def cut_and_begin_anew(model: Any) -> None:
        reload.initialize_layerwise_reload(model)
        model.load_weights([(_Q, b[_Q])])
        reload.initialize_layerwise_reload(model)
        model.load_weights(b.items())
        reload.finalize_layerwise_reload(model, llm.llm_engine.model_config)

    return [arms.attempt(llm.apply_model, cut_and_begin_anew)]


def rescue(llm: Any) -> None:
    """Put the tensors back that a failed update took from their layers: vLLM has no door to it."""
    from vllm.model_executor.model_loader.reload import layerwise

    def put_back(model: Any) -> None:
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                layerwise._place_kernel_tensors(layer, info)
                info.reset()

    llm.apply_model(put_back)


def after_rescue(llm: Any, b: Weights, *more: Weights) -> list[str | None]:
    """T2 and the rescue: its own error counts, unless something is pushed afterwards."""
    error = poison(llm, b)
    rescue(llm)
    return [push(llm, weights) for weights in more] or [error]


def after_poison(llm: Any, b: Weights) -> list[str | None]:
    poison(llm, b)
    return [push(llm, b)]


EXPERIMENTS = (
    Experiment(
        "T0", "nothing is wrong: the whole update", lambda llm, b: [push(llm, b)], whole=True
    ),
    Experiment(
        "T1",
        "`q_proj` without `k_proj`, `v_proj`",
        lambda llm, b: [push(llm, only(b, _Q))],
        lambda a, b: {**a, **only(b, _Q)},
    ),
    Experiment("T2", "a wrong shape", lambda llm, b: [push(llm, with_a_wrong_shape(b))]),
    Experiment("T3", "T2, then the whole update, correct", after_poison, whole=True),
    Experiment("T4", "a NaN", lambda llm, b: [push(llm, with_nan(b))]),
    Experiment(
        "T5",
        "all but one `v_proj`",
        lambda llm, b: [push(llm, without(b, _V))],
        lambda a, b: {**b, **only(a, _V)},
    ),
    Experiment(
        "T6",
        "a tensor twice",
        lambda llm, b: [arms.push(llm, [*b.items(), *only(b, _V).items()])],
    ),
    Experiment(
        "T7",
        "one staging buffer for every tensor",
        lambda llm, b: [arms.push(llm, through_one_buffer(b))],
        whole=True,
    ),
    Experiment("T8", "an unknown name", lambda llm, b: [push(llm, {**b, "typo": torch.zeros(1)})]),
    Experiment(
        "T9",
        "two updates, split between layers",
        lambda llm, b: push_in_two(llm, only(b, "model.layers.0."), b),
        whole=True,
    ),
    Experiment(
        "T10",
        "two updates, split inside `qkv_proj`",
        lambda llm, b: push_in_two(llm, only(b, _Q), b),
    ),
    Experiment("T11", "one tensor a call, no bracket (fp8: T14)", one_by_one, whole=True),
    Experiment("T12", "a bracket cut inside `qkv_proj`, then a whole one", cut_bracket, whole=True),
    Experiment("T13", "T2, then vLLM's tensors put back by hand", after_rescue),
    Experiment(
        "T13b",
        "the same, then the whole update",
        lambda llm, b: after_rescue(llm, b, b),
        whole=True,
    ),
)

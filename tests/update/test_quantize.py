"""Codes are made along the output channels, however the tensor comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashquant.errors import MisfitTensor, UnsupportedEngine
from flashquant.plan import Replay, Step, TensorPlan, View, Write
from flashquant.schemes import int8_channel
from flashquant.update.quantize import Recipe, as_stored

EXPERTS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()  # [E, N, K]
NAME, TARGET = "experts.down_proj", "w2_weight"
PARAMETERS = {
    TARGET: torch.empty(3, 6, 4, dtype=torch.int8, device="meta"),
    f"{TARGET}_scale": torch.empty(3, 6, 1, device="meta"),
}


def stored(tensor: Tensor, *steps: Step) -> dict[str, Tensor]:
    plan = TensorPlan(NAME, tuple(tensor.shape), tensor.dtype, steps)
    return dict(as_stored(Recipe(NAME, plan, PARAMETERS), tensor))


def write(expert: int, sent: Tensor) -> Write:
    """What a loader does that copies one expert of a stack, or of its transposed sibling."""
    return Write(NAME, View.of(sent), TARGET, View((6, 4), (4, 1), expert * 24))


def rows() -> tuple[Tensor, Tensor]:
    """Each expert by itself."""
    codes, scales = zip(*(int8_channel(expert) for expert in EXPERTS), strict=True)
    return torch.stack(codes), torch.stack(scales)


def test_stacked_experts_are_quantized_like_single_ones():
    made = stored(EXPERTS, *(write(e, EXPERTS[e]) for e in range(3)))

    codes, scales = rows()
    assert torch.equal(made[NAME], codes)
    assert torch.equal(made[f"{NAME}_scale"], scales)


def test_transposed_experts_have_the_scales_of_their_output_channels():
    sent = EXPERTS.mT.contiguous()

    made = stored(sent, *(write(e, sent[e].T) for e in range(3)))

    codes, scales = rows()
    assert torch.equal(made[NAME], codes.mT)
    assert torch.equal(made[f"{NAME}_scale"], scales)


def test_what_a_loader_computes_with_is_refused():
    """Nobody knows what becomes of its rows; of a square weight, not even by shape."""
    replay = Replay(NAME, TARGET, View((3, 6, 4), (24, 4, 1), 0), "aten.clone.default")

    with pytest.raises(UnsupportedEngine, match=r"experts\.down_proj.* output channels"):
        stored(EXPERTS, replay)


def test_codes_pass_through_whatever_the_loader_does():
    codes, _ = rows()
    replay = Replay(NAME, TARGET, View((3, 6, 4), (24, 4, 1), 0), "aten.clone.default")

    assert torch.equal(stored(codes, replay)[NAME], codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loads", [torch.int8, torch.bfloat16])
def test_codes_are_made_of_what_the_engines_loader_would_hold(dtype, loads):
    """An online scheme loads bf16 and quantizes that; where codes are loaded, of what is sent."""
    sent = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = TensorPlan(NAME, tuple(sent.shape), dtype, tuple(write(e, sent[e]) for e in range(3)))
    loaded = {TARGET: torch.empty(3, 6, 4, dtype=loads, device="meta")}

    made = dict(as_stored(Recipe(NAME, plan, PARAMETERS, None, loaded), sent))

    held = sent.bfloat16() if loads == torch.bfloat16 else sent
    expected = [int8_channel(expert) for expert in held]
    assert torch.equal(made[NAME], torch.stack([codes for codes, _ in expected]))
    assert torch.equal(made[f"{NAME}_scale"], torch.stack([scales for _, scales in expected]))


def test_what_is_infinite_once_loaded_is_refused_by_name():
    sent = torch.full((3, 6, 4), torch.finfo(torch.float32).max)
    plan = TensorPlan(NAME, (3, 6, 4), torch.float32, tuple(write(e, sent[e]) for e in range(3)))
    loaded = {TARGET: torch.empty(3, 6, 4, dtype=torch.bfloat16, device="meta")}

    with pytest.raises(MisfitTensor, match=NAME):
        as_stored(Recipe(NAME, plan, PARAMETERS, None, loaded), sent)

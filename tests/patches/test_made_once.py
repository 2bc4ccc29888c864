"""What modules make of their weights at their first pass, and keep, is made anew or refused."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.models import qwen2

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.layers import (
    all_made_once,
    attributes_kept,
    made_once,
    plain_tensors,
    while_loaded,
)
from flashquant.patches.seams.loading import engine_of, session_of
from flashquant.update import UndoLog
from tools.layouts.cases import HOPPER, Case
from tools.layouts.layout import load
from tools.layouts.machine import pretending
from tools.models.policies import Policies


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(5, 4)
        self.kept: Tensor | None = None


class InABranch(Base):
    """As vLLM's tower of HunyuanVision until 0.28."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            shape = (2, 2, 4)
            self.kept = self.inner.weight[1:, :].reshape(shape).permute(2, 0, 1).float()
        return x + self.kept


class ByAMethod(Base):
    """As vLLM's runner of experts fuses two gates."""

    def _fuse(self) -> None:
        if self.kept is None:
            assert self.inner is not None
            self.kept = torch.cat([self.inner.weight, self.inner.weight])

    def forward(self, x: Tensor) -> Tensor:
        self._fuse()
        return x @ self.kept.T


class Returning(Base):
    """As vLLM's draft of Gemma 4 gathers its head."""

    def _whole(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        weight = self.inner.weight
        self.kept = weight * 2
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._whole().T


class InPlace(Base):
    """As vLLM's rotary embedding with Fourier coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(5, 4), persistent=False)
        self.update = True

    def _compute(self) -> Tensor:
        return self.inner.weight.cos()

    def forward(self, x: Tensor) -> Tensor:
        if self.update:
            table = self._compute().to(torch.float32)
            self.table.copy_(table)
            self.update = False
        return x @ self.table.T


class Property(Base):
    @cached_property
    def table(self) -> Tensor:
        return self.inner.weight.sin()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.T


class OfItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.inner.weight[: len(x)]
        return x @ self.kept.T


class ByWayOfALocal(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        if self.kept is None:
            self.kept = weight[1:]
        return x @ self.kept.T


class OfNoWeight(Base):
    """Positions, masks, and whether a kernel takes a dtype: none is made of a weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(4, device=self.inner.weight.device).to(x.dtype)
        return x + self.kept


KINDS = [InABranch, ByAMethod, Returning, InPlace, Property]


def in_model(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"tower": module})


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(torch.ones(2, 2, 4)[0] if not isinstance(module, InABranch) else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_of_old_weights_is_made_anew_where_it_is(kind: type[Base]) -> None:
    torch.manual_seed(0)
    module, fresh = kind().requires_grad_(requires_grad=False), kind()
    found = all_made_once(in_model(module))
    before = run(module)
    held = {**vars(module), **dict(module.named_buffers())}
    addresses = {n: t.data_ptr() for n, t in held.items() if isinstance(t, Tensor)}
    module.inner.weight.copy_(fresh.inner.weight.detach())

    for one in found:
        one.make_anew(UndoLog())

    assert not torch.equal(run(module), before)
    assert torch.equal(run(module), run(fresh))
    held = {**vars(module), **dict(module.named_buffers())}
    assert {n: t.data_ptr() for n, t in held.items() if isinstance(t, Tensor)} == addresses


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_fails_leaves_what_was_made(kind: type[Base]) -> None:
    module = kind().requires_grad_(requires_grad=False)
    found, before, undo = all_made_once(in_model(module)), run(module), UndoLog()
    undo.remember(module.inner.weight)
    module.inner.weight.add_(1)
    for one in found:
        one.make_anew(undo)

    undo.restore()

    assert torch.equal(run(module), before)


@pytest.mark.parametrize("kind", KINDS)
def test_before_a_first_pass_nothing_is_made(kind: type[Base]) -> None:
    module, fresh = kind(), kind()
    found = all_made_once(in_model(module))
    module.load_state_dict(fresh.state_dict())

    for one in found:
        one.make_anew(UndoLog())

    assert torch.equal(run(module), run(fresh))


@pytest.mark.parametrize("kind", [OfItsInput, ByWayOfALocal])
def test_what_takes_more_than_the_module_is_refused(kind: type[Base]) -> None:
    with pytest.raises(UnsupportedEngine, match=r"tower \(.*'kept'.*forward.*go stale"):
        all_made_once(in_model(kind()))


def test_what_is_made_of_no_weight_is_left_alone() -> None:
    assert all_made_once(in_model(OfNoWeight())) == []


def test_another_form_is_refused() -> None:
    module = InABranch().requires_grad_(requires_grad=False)
    (one,) = all_made_once(in_model(module))
    run(module)
    module.inner.weight = nn.Parameter(torch.zeros(5, 8), requires_grad=False)

    with pytest.raises((ReloadError, RuntimeError)):
        one.make_anew(UndoLog())


def test_keys_that_are_weights_in_the_cache_are_refused() -> None:
    class Sink(nn.Module):
        def populate_sink_kv(self, cache: Tensor) -> None: ...

    with pytest.raises(UnsupportedEngine, match=r"tower \(Sink\).*KV cache"):
        all_made_once(in_model(Sink()))


class Draft(Base):
    """As vLLM's DFlash: its loader fuses what it has loaded."""

    def load_weights(self) -> None:
        self.fused = torch.cat([self.inner.weight, self.inner.weight])
        self.window = self.inner.weight.detach()[1:]
        self.splits = (self.inner.weight[:, :2].contiguous(), torch.tensor([1]))


def test_what_a_loader_makes_and_keeps_is_found() -> None:
    model = in_model(Draft())
    before = plain_tensors(model)

    model["tower"].load_weights()

    assert while_loaded(model, before) == ["tower.fused", "tower.splits[0]"]


class Gated(Base):
    """As vLLM's Muse Spark (0.33): its loader makes buffers of a gate that it has loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(5))

    def load_weights(self) -> None:
        self.steps = torch.ones(5)  # as the checkpoint has it
        self.register_buffer("beta", torch.sigmoid(self.inner.weight.detach()))


def test_a_buffer_that_a_loader_makes_is_found() -> None:
    model = in_model(Gated())
    before = plain_tensors(model)

    model["tower"].load_weights()

    assert while_loaded(model, before) == ["tower.beta"]


@pytest.mark.parametrize(("kind", "made"), [(Draft, "fused"), (Gated, "beta")])
def test_a_loader_that_is_watched_leaves_what_it_made(kind: type[Base], made: str) -> None:
    module = kind()
    module.load_weights()  # type: ignore[operator]
    real = getattr(module, made)

    with attributes_kept(in_model(module)), torch.device("meta"):
        setattr(module, made, torch.empty(1))

    assert getattr(module, made) is real


def test_vllms_rotary_embedding_of_fourier_coefficients_follows_its_weights() -> None:
    fope = pytest.importorskip("vllm.model_executor.layers.rotary_embedding.fope")
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        old, new = (
            fope.FourierRotaryEmbedding(
                head_size=8,
                rotary_dim=8,
                max_position_embeddings=16,
                base=10000.0,
                is_neox_style=True,
                dtype=torch.float32,
                init_cache=False,
                num_key_value_heads=2,
                num_inv_freq=None,
                fope_sep_head=True,
                fope_init_factor=0.1,
            )
            for _ in range(2)
        )
    for one in (old, new):
        one.sin_coef.data.normal_()
        one.cos_coef.data.normal_()
    found = all_made_once(in_model(old))
    states = torch.arange(3), torch.ones(3, 16), torch.ones(3, 16)
    with torch.inference_mode():
        old.forward_native(*states)
        expected = new.forward_native(*states)
    old.load_state_dict(new.state_dict())

    for one in found:
        one.make_anew(UndoLog())

    assert torch.equal(old.forward_native(*states)[0], expected[0])


def test_vllms_tower_of_hunyuan_vision_follows_its_weights() -> None:
    """vLLM 0.23 to 0.28 keep the position embeddings of the first image."""
    from types import SimpleNamespace

    vision = pytest.importorskip("vllm.model_executor.models.hunyuan_vision")
    config = SimpleNamespace(
        hidden_size=8,
        patch_size=2,
        num_channels=3,
        spatial_merge_size=1,
        interpolate_mode="bilinear",
        max_image_size=8,
    )
    torch.manual_seed(0)
    old, new = (vision.HunYuanVisionPatchEmbed(config) for _ in range(2))
    if not hasattr(old, "patch_pos_embed"):
        pytest.skip("this vLLM interpolates them for every image")
    found = all_made_once(in_model(old))
    image = torch.ones(16, 12), [[1, 4, 4]]
    with torch.inference_mode():
        old(*image)
        expected = new(*image)
        old.load_state_dict(new.state_dict())

        for one in found:
            one.make_anew(UndoLog())

        assert torch.equal(old(*image), expected)


def test_vllms_fused_gates_follow_their_weights() -> None:
    """Where shared experts are experts (on ROCm): router and shared gate are one matrix."""
    runner = pytest.importorskip("vllm.model_executor.layers.fused_moe.runner.moe_runner")
    made = runner.MoERunner.__new__(runner.MoERunner)
    nn.Module.__init__(made)
    made.gate, made.shared_expert_gate = nn.Linear(4, 3), nn.Linear(4, 1)
    made._combined_gate_weight = None
    found = all_made_once(in_model(made))
    made._maybe_fuse_gate_weights()
    kept = made._combined_gate_weight
    made.gate.weight.data.fill_(7)

    for one in found:
        one.make_anew(UndoLog())

    assert made._combined_gate_weight is kept
    assert bool((kept[:3] == 7).all())


@pytest.mark.parametrize("how", ["at once", "one by one", "prepared"])
def test_every_way_of_pushing_makes_it_anew_in_a_model_of_vllms(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU, whose kernels are not called; an engine: tests/engine/test_made_once."""

    def fuse(self: Any) -> None:
        if self.kept is None:
            self.kept = self.input_layernorm.weight.float() ** 2

    monkeypatch.setattr(qwen2.Qwen2DecoderLayer, "kept", None, raising=False)
    monkeypatch.setattr(qwen2.Qwen2DecoderLayer, "fuse", fuse, raising=False)
    # Anew, of this class.
    monkeypatch.setattr(made_once, "blocks", made_once.blocks.__wrapped__)
    live = load(Case(HOPPER, "int8", "", ""), tmp_path, "a", "int8")
    with pretending(HOPPER):
        layer = live.model.layers[0]
        layer.fuse()
        kept, at_first = layer.kept, layer.kept.clone()
        pushed, session = Policies(tmp_path, "qwen2").tensors("b"), session_of(live)

        spoilt = {**pushed, "model.norm.weight": torch.full_like(layer.kept, float("nan"))}
        with pytest.raises(ReloadError):
            session.reload(spoilt)
        assert layer.kept is kept
        assert torch.equal(kept, at_first)

        if how == "one by one":
            for pair in pushed.items():
                live.load_weights([pair])
        else:
            session.reload(pushed, prepare=how == "prepared")

    assert layer.kept is kept
    weight = pushed["model.layers.0.input_layernorm.weight"].float()
    assert torch.equal(kept, weight**2)
    assert not torch.equal(kept, at_first)


def test_a_draft_that_its_loader_fuses_serves_and_takes_no_push(tmp_path: Path) -> None:
    live = load(Case(HOPPER, "bf16", "", ""), tmp_path, "a", "bf16")
    with pretending(HOPPER):
        engine_of(live).made_while_loaded = ("fused",)

        with pytest.raises(ReloadError, match=r"made fused of its weights while"):
            live.load_weights(Policies(tmp_path, "qwen2").tensors("b").items())

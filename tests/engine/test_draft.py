"""A speculative draft is a model of its own, with a session of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

import flashquant
from flashquant.errors import IncompleteUpdate
from tests.engine import multi_token as mtp
from tests.engine.serving import Serving, same_bits, serve
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafts")
    return {
        name: tiny_models.make("qwen2", seed, folder / name, layers=1)
        for seed, name in enumerate("ab", start=7)
    }


def speculating(target: Path, draft: Path) -> Serving:
    from vllm.config import WeightTransferConfig

    return serve(
        target,
        "int8",
        weight_transfer_config=WeightTransferConfig(backend="flashquant_file"),
        speculative_config={
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": 3,
        },
    )


@pytest.fixture
def live(policies: Policies, drafts: dict[str, Path]) -> Serving:
    serving = speculating(policies.bf16("a"), drafts["a"])
    flashquant.reload_weights(draft_of(serving), tiny_models.tensors(drafts["a"]))
    return serving


def draft_of(serving: Serving) -> nn.Module:
    worker: Any = serving.llm.llm_engine.model_executor.driver_worker
    return worker.model_runner.drafter.model


def digest_of_draft(serving: Serving) -> str | None:
    return flashquant.status(draft_of(serving)).digest


def test_a_draft_takes_pushes_of_its_own(
    live: Serving, policies: Policies, drafts: dict[str, Path]
) -> None:
    """As verl and checkpoint-engine push to it; the target does not change."""
    fresh = speculating(policies.bf16("a"), drafts["b"])
    assert digest_of_draft(live) != digest_of_draft(fresh)

    draft: Any = draft_of(live)
    draft.load_weights(list(tiny_models.tensors(drafts["b"]).items()))

    assert digest_of_draft(live) == digest_of_draft(fresh)
    assert flashquant.status(draft).scheme == "bf16"
    live.snapshot().assert_same(live.start)


def test_vllms_update_of_a_draft_is_a_bracket_on_the_draft(
    live: Serving, policies: Policies, drafts: dict[str, Path], tmp_path: Path
) -> None:
    """Half a layer is refused, the old draft stays, and the next update goes through."""
    weights = tiny_models.tensors(drafts["b"])
    half = {name: t for name, t in weights.items() if "v_proj.weight" not in name}
    before, fresh = digest_of_draft(live), speculating(policies.bf16("a"), drafts["b"])
    live.llm.init_weight_transfer_engine({"init_info": {"folder": str(tmp_path)}})

    with pytest.raises(IncompleteUpdate):
        update(live, half, tmp_path)
    assert digest_of_draft(live) == before
    update(live, weights, tmp_path)

    assert digest_of_draft(live) == digest_of_draft(fresh)


def update(live: Serving, weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "draft.safetensors")
    live.llm.start_draft_weight_update()
    live.llm.update_weights({"update_info": {"path": "draft.safetensors"}})
    live.llm.finish_weight_update()


@pytest.fixture(scope="module")
def multi_token(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies of a model that drafts for itself, by a layer which shares its head."""
    folder = tmp_path_factory.mktemp("multi-token")
    return {name: mtp.make(folder / name, seed) for seed, name in enumerate("ab")}


def drafting_for_itself(checkpoint: Path) -> Serving:
    return serve(
        checkpoint,
        "bf16",
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )


def test_a_draft_that_shares_the_head_of_its_target_is_told_of_and_takes_pushes(
    multi_token: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The warning comes as the engine starts; a push of the target leaves the draft as it was."""
    with caplog.at_level(logging.WARNING, "flashquant"):
        live = drafting_for_itself(multi_token["a"])
    (warning,) = [r.message for r in caplog.records if "drafts grow stale" in r.message]
    fresh = drafting_for_itself(multi_token["b"])
    assert warning.startswith("Glm4MoeMTP drafts for the model")
    assert flashquant.status(live.llm).drafts == {"Glm4MoeMTP": 0}
    before, weights = digest_of_draft(live), tiny_models.tensors(multi_token["b"])
    flashquant.reload_weights(live.llm, weights)
    assert digest_of_draft(live) == before != digest_of_draft(fresh)
    assert flashquant.status(live.llm).digest == fresh.start.digest
    pushed = live.contents()

    flashquant.reload_weights(draft_of(live), weights, strict=False)

    assert digest_of_draft(live) == digest_of_draft(fresh)
    assert flashquant.status(live.llm).drafts == {"Glm4MoeMTP": 1}
    now = live.contents()
    assert [name for name in pushed if not same_bits(now[name], pushed[name])] == []  # the target's
    assert live.outputs() == fresh.outputs()

"""`flashquant inspect` says beforehand what an engine on the same checkpoint then does."""

from __future__ import annotations

from typing import Any

import pytest

import flashquant
from flashquant.plan import Write
from tests.engine.processes import run
from tests.engine.serving import BY_ROW, Serving, serve
from tools.models.policies import W8A8, Policies, config_name

pytestmark = pytest.mark.engine

# Biases; codes in the checkpoint; a scale a tensor; one parameter of two modules; attentions
# that make something of weights of their children, or were handed a parameter.
CASES = (
    ("qwen2", "int8"),
    ("qwen2", W8A8),
    ("llama", "fp8_vllm"),
    ("tied", BY_ROW),
    ("deepseek-v2", "bf16"),
    ("gpt-oss", "bf16"),
)
_AS_IN_STATUS = {
    "in place": "direct",
    "whole": "direct",
    "copied": "direct",
    "processed": "staged",
    "loader": "fallback",
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policies]:
    folder = tmp_path_factory.mktemp("policies")
    return {kind: Policies(folder, kind) for kind, _ in CASES}


@pytest.fixture(scope="module")
def keeps(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("keeps") / "keep.yaml"
    path.write_text("configs: [{fn: int8, keep: ['*.down_proj', {first: 1}]}]")
    return str(path)


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mixes") / "mixed.yaml"
    other = f"overrides: [{{match: '*.down_proj', fn: {BY_ROW}}}]" if BY_ROW != "int8" else ""
    path.write_text(f"configs: [{{fn: int8, {other}}}]")
    return str(path)


@pytest.fixture(scope="module")
def inspected(policies: dict[str, Policies], keeps: str, mixes: str) -> dict[str, Any]:
    """Everything in one process, in which no engine is started."""
    asked = [(policies[kind].served("a", scheme), config_name(scheme)) for kind, scheme in CASES]
    asked += [(policies["qwen2"].bf16("a"), file) for file in (keeps, mixes)]
    return run("inspecting", *(part for one in asked for part in one))


@pytest.fixture(params=CASES, ids=" ".join)
def case(
    request: pytest.FixtureRequest, policies: dict[str, Policies], inspected: dict[str, Any]
) -> tuple[Serving, dict[str, Any]]:
    """An engine that has taken a push, and what was said of its checkpoint.

    It learns with the first push which of its names need vLLM's loader.
    """
    kind, scheme = request.param
    serving = serve(policies[kind].served("a", scheme), config_name(scheme))
    flashquant.reload_weights(serving.llm, policies[kind].tensors("b"))
    return serving, inspected["inspections"][CASES.index(request.param)]


def test_each_layer_is_written_as_was_said(case: tuple[Serving, dict[str, Any]]) -> None:
    serving, said = case
    status = flashquant.status(serving.llm)
    expected: dict[str, list[str]] = {"direct": [], "staged": [], "fallback": []}
    for layer in said["layers"]:
        expected[_AS_IN_STATUS[layer["how"]]].append(layer["name"])

    assert {name: list(getattr(status, name)) for name in expected} == expected
    assert said["scheme"] == status.scheme


def test_each_tensor_lands_where_was_said(
    case: tuple[Serving, dict[str, Any]], policies: dict[str, Policies]
) -> None:
    serving, said = case
    kind = next(kind for kind, _ in CASES if serving.checkpoint.name.startswith(f"{kind}-"))
    pushed, plan = policies[kind].tensors("b"), serving.session.plan

    told = {tensor["name"]: tensor for tensor in said["tensors"]}
    assert pushed.keys() <= told.keys() & set(plan.names)
    for name in pushed:
        done = [(s.target, *s.target_view) for s in plan[name].steps if isinstance(s, Write)]
        assert done == [
            (step["target"], tuple(step["shape"]), tuple(step["stride"]), step["offset"])
            for step in told[name]["steps"]
            if step["what"] == "copy"
        ]


def test_what_is_kept_is_said_beforehand(
    policies: dict[str, Policies], inspected: dict[str, Any], keeps: str
) -> None:
    """By the names that the engine's status has, and as layers without codes."""
    said = inspected["inspections"][-2]
    live = serve(policies["qwen2"].bf16("a"), keeps)

    assert said["in_bf16"] == flashquant.status(live.llm).in_bf16 != {}
    whole = [layer["name"] for layer in said["layers"] if not layer["quantized"]]
    assert "model.layers.1.mlp.down_proj" in whole
    assert "model.layers.1.mlp.gate_up_proj" not in whole


def test_the_scheme_of_each_layer_is_said_beforehand(inspected: dict[str, Any]) -> None:
    said = {layer["name"]: layer["scheme"] for layer in inspected["inspections"][-1]["layers"]}

    assert said["model.layers.1.mlp.down_proj"] == BY_ROW
    assert (
        said["model.layers.1.mlp.gate_up_proj"]
        == said["model.layers.0.self_attn.qkv_proj"]
        == "int8"
    )
    assert said["model.norm"] is None


def test_nothing_is_left_of_an_inspection(inspected: dict[str, Any]) -> None:
    assert inspected["left"] == [False, False]
    assert all(not one["unfilled"] for one in inspected["inspections"])

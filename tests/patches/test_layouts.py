"""For each kernel that vLLM can choose on a GPU: its storage, and our bytes beside vLLM's.

No GPU is here: see `tools.layouts.machine` for what stands in for it, and docs/layouts.md for
what follows. `python -m tools.layouts` writes the table there from the same cases.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashquant.errors import ConfigError, UnsupportedEngine
from flashquant.schemes import fp8_tensor
from tools.layouts import models
from tools.layouts.cases import AMPERE, CORNERS, EXPERTS, HOPPER, LINEAR, MI350, REFUSED, Case
from tools.layouts.layout import load, look
from tools.layouts.machine import pretending
from tools.models import tiny_models
from tools.models.policies import Policies, config_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS, *CORNERS], ids=lambda case: case.id)
def test_two_reloads_leave_what_vllm_loads_where_it_was(case: Case, folder: Path) -> None:
    """Every byte that kernels would read; no tensor has moved; the storage is the one expected."""
    layout = look(case, folder)

    assert case.kernel in layout.kernels
    assert layout.stored[case.parameter].kind == case.weight
    assert layout.different == ()
    assert layout.moved == ()
    assert layout.compared > 0


@pytest.mark.parametrize(("case", "says"), REFUSED, ids=lambda value: getattr(value, "id", ""))
def test_what_vllm_cannot_load_is_refused_with_its_own_words(
    case: Case, says: str, folder: Path
) -> None:
    for scheme in (None, config_name(case.scheme)):
        with pytest.raises((ValueError, AssertionError, UnsupportedEngine), match=says):
            load(case, folder, "a", scheme)


def test_rows_that_vllm_moves_apart_on_amd_stay_apart(folder: Path) -> None:
    """VLLM_ROCM_FP8_PADDING: 256 bytes after each row of 512, so the layout has gaps."""
    case = Case(MI350, "fp8_block", "TritonFp8BlockScaledMMKernel", "packed")
    live = load(case, folder, "a", "fp8_block")

    down = models.tensors(live)["model.layers.0.mlp.down_proj.weight"]

    assert (down.shape, down.stride()) == ((256, 512), (768, 1))


def test_one_scale_for_a_fused_layer_is_that_of_all_its_shards(folder: Path) -> None:
    """q, k and v arrive one by one, in the wrong order, and share the largest maximum."""
    case = Case(HOPPER, "fp8_vllm", "CutlassFP8ScaledMMLinearKernel", "codes")
    live = load(case, folder, "a", "fp8_vllm")
    sent = Policies(folder, "qwen2").tensors("b")
    shards = [f"model.layers.0.self_attn.{shard}_proj.weight" for shard in "vkq"]
    sent[shards[0]] = sent[shards[0]] * 7

    for name in shards:
        with pretending(HOPPER):
            live.load_weights([(name, sent[name])])

    whole = torch.cat([sent[name] for name in shards])
    scale = models.tensors(live)["model.layers.0.self_attn.qkv_proj.weight_scale"]
    assert torch.equal(scale, fp8_tensor(whole)[1])


def test_a_checkpoint_with_a_scale_a_shard_is_refused_by_name(folder: Path) -> None:
    """vLLM requantizes its shards to the largest scale; codes from here would not be those."""
    path = folder / "a-scale-a-tensor"
    tiny_models.make_quantized(Policies(folder, "qwen2").bf16("a"), path, "fp8")
    config = json.loads((path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["strategy"] = "tensor"
    (path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"quantized already .* Serve the bf16 checkpoint"):
        models.configured(path, "fp8_vllm")


def test_zeros_that_a_kernel_moves_about_are_not_taken_for_what_was_loaded(tmp_path: Path) -> None:
    """Marlin permutes a bias: of one that is zero at the start, the live bytes do not tell."""
    policies = Policies(tmp_path, "qwen2")
    started = policies.tensors("a")
    started |= {n: torch.zeros_like(t) for n, t in started.items() if n.endswith("bias")}
    save_file(started, policies.bf16("a") / "model.safetensors", metadata={"format": "pt"})
    case = Case(AMPERE, "int4", "MarlinLinearKernel", "packed")
    live, sent = load(case, tmp_path, "a", "int4"), policies.tensors("b")
    with pretending(AMPERE):
        live.load_weights(sent.items())
    before = {name: tensor.clone() for name, tensor in models.tensors(live).items()}

    with pretending(AMPERE):
        live.load_weights((n, t) for n, t in sent.items() if not n.endswith("bias"))

    after = models.tensors(live)
    assert [n for n in after if not torch.equal(after[n], before[n])] == []


def test_twins_are_processed_without_a_default_device_as_vllm_processes_layers(
    folder: Path,
) -> None:
    """Of an engine on a GPU, for which `meta` stands: what vLLM makes on the host stays there."""
    case = Case(HOPPER, "fp8_channel", "CutlassFP8ScaledMMLinearKernel", "codes")
    engine = vars(load(case, folder, "a", "fp8_channel"))["load_weights"].engine
    engine.device = torch.device("meta")

    with engine._context():
        made, as_vllm_says = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)

    assert (made.device.type, made.dtype) == ("cpu", as_vllm_says.dtype)


def test_the_document_has_a_row_for_each_of_these_tests() -> None:
    """Remade by `python -m tools.layouts`, when cases change."""
    table = (Path(__file__).parents[2] / "docs/layouts.md").read_text()

    missing = [case.id for case in (*LINEAR, *EXPERTS, *CORNERS) if f"[{case.id}]" not in table]
    assert missing == []
    assert "**differs**" not in table

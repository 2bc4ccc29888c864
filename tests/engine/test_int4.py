"""int4 on the real engine: packed codes of four bits, made of bf16 at the start and by pushes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashquant
from flashquant.config.schemes import COMPRESSED
from flashquant.errors import ConfigError, MisfitTensor, UnsupportedEngine
from flashquant.patches.seams import int4
from flashquant.schemes import DEFINITIONS
from flashquant.sender import Sender
from tests.engine.kernels import NO_AMX_KERNELS, want_int4
from tests.engine.serving import Serving, same_bits, serve
from tests.engine.test_doors import DOORS, Weights
from tests.engine.test_reload_equals_restart import WAYS, Push
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

INT4 = ("int4", "int4_g32", "int4_channel")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(autouse=True, scope="module")
def kernel() -> None:
    want_int4("int4")


@pytest.fixture(scope="module", params=INT4)
def live(request: pytest.FixtureRequest, policies: Policies) -> Serving:
    return serve(policies.bf16("a"), request.param)


@pytest.fixture
def there(live: Serving, policies: Policies) -> Iterator[Serving]:
    """One that serves A, before and after."""
    yield live
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def prepared(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights, prepare=True)


def whole(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights)


def sent(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, Sender(flashquant.manifest(there.llm)).stream(weights))


@pytest.mark.parametrize("push", [*DOORS, whole, prepared, sent], ids=lambda door: door.__name__)
def test_what_arrives_by_a_door_equals_a_fresh_start(
    there: Serving, policies: Policies, push: Callable[[Serving, Weights], None]
) -> None:
    push(there, policies.tensors("b"))

    there.snapshot().assert_same(serve(policies.bf16("b"), there.scheme).start)


@pytest.mark.parametrize("push", WAYS, ids=lambda way: way.__name__)
def test_shards_in_any_order_equal_a_fresh_start(
    there: Serving, policies: Policies, push: Push
) -> None:
    push(there.model, policies.tensors("b"))

    there.snapshot().assert_same(serve(policies.bf16("b"), there.scheme).start)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "tied"])
def test_other_models_reload_as_they_start(kind: str, tmp_path: Path) -> None:
    policies = Policies(tmp_path, kind)
    live, fresh = (serve(policies.bf16(policy), "int4") for policy in "ab")

    whole(live, policies.tensors("b"))
    live.snapshot().assert_same(fresh.start)
    whole(live, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def unquantized(weights: Weights, scheme: str) -> Iterator[tuple[str, Tensor]]:
    """What the codes of a policy stand for, in bf16."""
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            yield name, weight
            continue
        codes, scales = DEFINITIONS[scheme](weight)
        each = weight.shape[1] // scales.shape[1]
        yield name, (codes.float() * scales.float().repeat_interleave(each, 1)).bfloat16()


def test_the_kernels_compute_with_what_the_codes_stand_for(
    live: Serving, policies: Policies, tmp_path: Path
) -> None:
    """An engine in bf16 on codes times scales says the same, far nearer than the policy itself."""
    meant = tmp_path / "meant"
    shutil.copytree(policies.bf16("a"), meant)
    held = dict(unquantized(policies.tensors("a"), live.scheme))
    save_file(held, meant / "model.safetensors", metadata={"format": "pt"})

    def distance(other: Path) -> float:
        said = serve(other, "bf16").start.outputs.logprobs
        pairs = zip(said, live.start.outputs.logprobs, strict=True)
        prompts = [(torch.tensor(one[:39]), torch.tensor(two[:39])) for one, two in pairs]
        return max(float((one - two).abs().mean()) for one, two in prompts)

    # On a CPU with AMX, activations are int8.
    assert 3 * distance(meant) < distance(policies.bf16("a"))


def test_a_refused_push_leaves_no_trace(there: Serving, policies: Policies) -> None:
    for wrong in (torch.nan, torch.inf):
        broken = policies.tensors("b")
        broken[DOWN][3, 5] = wrong
        with pytest.raises(MisfitTensor, match=r"down_proj\S* holds NaN"):
            whole(there, broken)
        there.snapshot().assert_same(there.start)


def test_codes_may_be_pushed_and_are_four_bits(there: Serving, policies: Policies) -> None:
    weights = policies.tensors("b")
    codes, scales = DEFINITIONS[there.scheme](weights.pop(DOWN))
    made = {DOWN: codes, f"{DOWN}_scale": scales}

    with pytest.raises(MisfitTensor, match=r"holds codes from -[78] to 99"):
        whole(there, {**weights, **made, DOWN: codes.index_fill(1, torch.tensor([3]), 99)})
    there.snapshot().assert_same(there.start)
    whole(there, {**weights, **made})

    there.snapshot().assert_same(serve(policies.bf16("b"), there.scheme).start)


def test_a_width_that_is_no_multiple_of_the_group_is_refused_by_layer_and_width(
    tmp_path: Path,
) -> None:
    odd = tiny_models.make("qwen2", 0, tmp_path / "odd", intermediate=160)

    says = r"model\.layers\.0\.mlp\.down_proj .*int4 on.*160 input channels are no multiple of "
    with pytest.raises(UnsupportedEngine, match=rf"{says}groups of 128; use int4_g32 or int4_ch"):
        _ = Serving(odd, "int4").llm
    assert serve(odd, "int4_g32").start
    assert serve(odd, written(tmp_path, fn="int4", keep=["*.down_proj"])).start


def written(folder: Path, **entry: object) -> str:
    path = folder / "config.yaml"
    path.write_text(json.dumps({"configs": [entry]}))
    return str(path)


def test_what_is_kept_stays_in_bf16(policies: Policies, tmp_path: Path) -> None:
    config = written(tmp_path, fn="int4", keep=["*.down_proj"])
    live, fresh = (serve(policies.bf16(policy), config) for policy in "ab")

    whole(live, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    kept = flashquant.status(live.llm).in_bf16
    assert kept == {f"model.layers.{block}.mlp.down_proj": "keep" for block in range(2)}


def test_experts_are_refused_by_name_unless_they_are_kept(tmp_path: Path) -> None:
    policies = Policies(tmp_path, "qwen3-moe")

    with pytest.raises(UnsupportedEngine, match=r"mlp\.experts.*in int4 \("):
        _ = Serving(policies.bf16("a"), "int4").llm
    config = written(tmp_path, fn="int4", keep=["*.experts"])
    live, fresh = (serve(policies.bf16(policy), config) for policy in "ab")
    whole(live, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)


def test_a_checkpoint_that_is_packed_already_is_refused(policies: Policies, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(policies.bf16("a"), packed)
    said = json.loads((packed / "config.json").read_text())
    said["quantization_config"] = COMPRESSED["int4"]
    (packed / "config.json").write_text(json.dumps(said))

    with pytest.raises(ConfigError, match=r"is quantized already.*Serve the bf16 checkpoint"):
        _ = Serving(packed, "int4").llm


def test_kernels_of_amx_are_packed_as_at_a_start(
    policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at by bytes: only a machine with AMX computes with them."""
    if not hasattr(torch.ops._C, "convert_weight_packed_scale_zp"):
        pytest.skip(NO_AMX_KERNELS)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    live, fresh = (Serving(policies.bf16(policy), "int4") for policy in "ab")
    start, goal = live.contents(), fresh.contents()
    assert live.model.get_submodule("model.layers.1.mlp.down_proj").use_w4a8

    whole(live, policies.tensors("b"))
    assert_alike(live.contents(), goal)
    whole(live, policies.tensors("a"))
    assert_alike(live.contents(), start)


def assert_alike(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


def test_a_cpu_whose_build_of_vllm_has_no_kernel_is_refused_by_name(
    policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "_ON_CPU", "a_kernel_of_another_build")

    with pytest.raises(UnsupportedEngine, match=r"qkv_proj .*a_kernel_of_another_build.*AVX-512"):
        _ = Serving(policies.bf16("a"), "int4").llm

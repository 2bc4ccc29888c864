"""One live engine in each scheme: what never moves, what is refused, what stays pending."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashquant
from flashquant.errors import (
    IncompleteUpdate,
    MisfitTensor,
    ReloadError,
    TornWeights,
    UnknownWeight,
)
from flashquant.patches.layers import InPlaceLayer, is_handle, kernel_state
from flashquant.patches.seams import loading
from flashquant.update import footprints
from flashquant.update.pipeline import Pipeline
from tests.engine.serving import Serving, needs, serve
from tools.models.policies import SCHEMES, Policies, config_name

pytestmark = pytest.mark.engine

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741  (its name in every model)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=SCHEMES)
def live(request: pytest.FixtureRequest, policies: Policies) -> Serving:
    """An engine that serves policy A, whole."""
    serving = serve(policies.served("a", request.param), config_name(request.param))
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    return serving


@pytest.fixture
def int8(policies: Policies) -> Serving:
    serving = serve(policies.bf16("a"), "int8")
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    return serving


def test_twenty_reloads_move_nothing_and_grow_nothing(live: Serving, policies: Policies) -> None:
    """Every live tensor keeps address, shape, stride and dtype; resident memory is flat."""
    weights = [policies.tensors("b"), policies.tensors("a")]
    before = footprints(live.tensors().items())
    for turn in range(20):  # until the allocator has what it wants
        flashquant.reload_weights(live.llm, weights[turn % 2])
    resident = psutil.Process().memory_info().rss

    for turn in range(40):
        flashquant.reload_weights(live.llm, weights[turn % 2])

    assert footprints(live.tensors().items()) == before
    assert psutil.Process().memory_info().rss - resident < 3e6  # one of its layers a reload


def test_the_first_step_after_a_sync_is_said_once(
    int8: Serving, policies: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    """A tensor a call, as stacks push: the log shows that it arrived, and not once a tensor."""
    int8.snapshot()
    before = int8.session.version
    caplog.clear()
    with caplog.at_level(logging.INFO, "flashquant"):
        for name, tensor in policies.tensors("b").items():
            int8.model.load_weights([(name, tensor)])
        int8.snapshot()
        int8.snapshot()

    said = [message for message in caplog.messages if "new weights are served" in message]
    after = int8.session.version
    assert said == [f"new weights are served: version {after} (at the last step: {before})"]
    assert after > before


def test_no_float_is_ever_copied_into_a_code(live: Serving, policies: Policies) -> None:
    """A cast where a quantization belongs is the silent garbage of the peers."""

    class Watch(TorchDispatchMode):
        casts: ClassVar[list[tuple[torch.dtype, torch.dtype]]] = []
        parameters: ClassVar[set[int]] = {
            t.untyped_storage().data_ptr() for t in live.tensors().values()
        }

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.copy_.default:
                into, source = args[:2]
                is_live = into.untyped_storage().data_ptr() in self.parameters
                if is_live and into.element_size() == 1 and source.element_size() > 1:
                    self.casts.append((source.dtype, into.dtype))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        flashquant.reload_weights(live.llm, policies.tensors("b"))

    assert watch.casts == []


def _failing(weights: dict[str, Tensor], after: int) -> Iterator[tuple[str, Tensor]]:
    for position, pair in enumerate(weights.items()):
        if position == after:
            raise RuntimeError("the trainer died")
        yield pair


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        pytest.param(
            {"model.layers.0.self_attn.q_porj.weight": torch.zeros(256, 256)},
            UnknownWeight,
            "q_proj",
            marks=needs(">=0.25", "loader of Qwen2 that refuses a name it does not know"),
        ),
        ({f"{Q}_": torch.zeros(256, 256)}, UnknownWeight, r"Did you mean .*q_proj\.weight'"),
        ({Q: torch.zeros(256, 255)}, MisfitTensor, r"\(256, 255\), but should have \(256, 256\)"),
        ({O: torch.zeros(256, 256, dtype=torch.int32)}, MisfitTensor, "Send bfloat16"),
        ({O: torch.full((256, 256), torch.nan)}, MisfitTensor, "NaN or infinite"),
        ({O: torch.zeros(256, 256, device="meta")}, MisfitTensor, "meta device"),
    ],
    ids=["unknown module", "unknown parameter", "wrong shape", "wrong dtype", "NaN", "meta"],
)
def test_bad_input_is_one_error_and_the_old_weights_serve_on(
    live: Serving, policies: Policies, change: dict[str, Tensor], error: type, says: str
) -> None:
    """Whatever came before the bad tensor in the same update is taken back."""
    weights = {**dict(reversed(policies.tensors("b").items())), **change}

    with pytest.raises(error, match=says):
        flashquant.reload_weights(live.llm, weights)

    live.snapshot().assert_same(live.start)


def test_a_trainer_that_dies_leaves_the_old_weights_and_the_next_update_goes_through(
    live: Serving, policies: Policies
) -> None:
    """All or nothing, at several places of the stream, then a retry that equals itself."""
    weights = policies.tensors("b")

    for after in (1, 9, len(weights) - 1):
        with pytest.raises(RuntimeError, match="the trainer died"):
            flashquant.reload_weights(live.llm, _failing(weights, after))
        live.snapshot().assert_same(live.start)
    report = flashquant.reload_weights(live.llm, weights)

    assert report.digest == live.session.proofs.digest() != live.start.digest


def test_a_name_missing_from_a_strict_update_is_named(live: Serving, policies: Policies) -> None:
    """Nothing of the rest is kept."""
    weights = policies.tensors("b")
    del weights["model.norm.weight"]

    with pytest.raises(IncompleteUpdate, match=r"model\.norm\.weight"):
        flashquant.reload_weights(live.llm, weights)

    live.snapshot().assert_same(live.start)


def test_a_lenient_update_takes_whole_layers_but_never_half_of_what_cannot_be_kept(
    live: Serving, policies: Policies
) -> None:
    """strict=False: a lone norm goes live; a lone q_proj does where its rows lie as they came."""
    weights = policies.tensors("b")
    norm = {"model.norm.weight": weights["model.norm.weight"]}
    by_rows = any(
        isinstance(layer, InPlaceLayer) and layer.name == "model.layers.0.self_attn.qkv_proj"
        for layer in live.session._engine.layers
    )

    flashquant.reload_weights(live.llm, norm, strict=False)
    refused = nullcontext() if by_rows else pytest.raises(IncompleteUpdate, match="qkv_proj")
    with refused:
        flashquant.reload_weights(live.llm, {Q: weights[Q]}, strict=False)

    held = live.contents()
    assert torch.equal(held["model.norm.weight"], norm["model.norm.weight"])
    changed = {n for n, t in held.items() if not torch.equal(t, live.start.contents[n])}
    others = {name for name in changed if "layers.0.self_attn.qkv_proj" in name}
    assert changed - others == {"model.norm.weight"}
    assert bool(others) == by_rows


@pytest.mark.parametrize(
    "lay",
    [
        lambda t: torch._neg_view(-t),
        lambda t: AsyncCollectiveTensor(t.clone()),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    ],
    ids=["negated", "wrapped", "every second element", "transposed"],
)
@pytest.mark.parametrize("prepare", [False, True], ids=["at once", "prepared"])
def test_values_are_what_arrives_however_they_lie(
    live: Serving, policies: Policies, lay: Callable[[Tensor], Tensor], prepare: bool
) -> None:
    weights = policies.tensors("b")
    flashquant.reload_weights(live.llm, weights)
    wanted = live.snapshot()
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    flashquant.reload_weights(
        live.llm, {name: lay(t) for name, t in weights.items()}, prepare=prepare
    )
    live.snapshot().assert_same(wanted)


def test_a_lone_shard_waits_and_is_listed(live: Serving, policies: Policies) -> None:
    """A bare push of q_proj changes nothing until k and v are there."""
    live.model.load_weights([(Q, policies.tensors("b")[Q])])

    status = flashquant.status(live.llm)

    assert "model.layers.0.self_attn.qkv_proj" in status.pending
    assert status.digest == live.start.digest
    live.snapshot().assert_same(live.start)


def test_float32_and_float16_are_quantized_from_their_own_precision(policies: Policies) -> None:
    """A float32 push is not rounded to bf16 first."""
    live = serve(policies.bf16("a"), "int8")
    weights = {name: t.float() * 1.001 for name, t in policies.tensors("b").items()}

    flashquant.reload_weights(live.llm, weights)
    from_float32 = live.session.proofs.digest()
    flashquant.reload_weights(live.llm, {name: t.bfloat16() for name, t in weights.items()})

    assert from_float32 != live.session.proofs.digest()


def test_without_undo_a_failure_leaves_the_engine_torn_until_a_complete_update(
    int8: Serving, policies: Policies
) -> None:
    """A torn engine refuses to generate rather than serve a mixture."""
    weights = policies.tensors("b")

    with pytest.raises(RuntimeError, match="the trainer died"):
        flashquant.reload_weights(int8.llm, _failing(weights, len(weights) - 1), atomic=False)

    assert flashquant.status(int8.llm).torn
    with pytest.raises(TornWeights, match="complete update"):
        int8.session.check_servable()
    flashquant.reload_weights(int8.llm, policies.tensors("a"))
    int8.snapshot().assert_same(int8.start)


def test_the_report_counts_what_was_done(int8: Serving, policies: Policies) -> None:
    """Bytes are those of the tensors, the version counts commits."""
    weights = policies.tensors("b")
    version = flashquant.status(int8.llm).version

    report = flashquant.reload_weights(int8.llm, weights)

    assert report.version == version + 1
    assert report.tensors == len(weights)
    assert report.bytes_in == sum(tensor.nbytes for tensor in weights.values())
    assert report.pending == ()
    assert report.digest == flashquant.status(int8.llm).digest


def test_what_came_before_and_needs_no_processing_is_stored_in_one_call(
    live: Serving, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms as well: nothing of them is left to decide."""
    general, seen = Pipeline._take_any, list[str]()

    def watched(pipeline: Pipeline, name: str, *rest: Any) -> Iterator[str]:
        seen.append(name)
        return general(pipeline, name, *rest)

    monkeypatch.setattr(Pipeline, "_take_any", watched)
    flashquant.reload_weights(live.llm, policies.tensors("b"))

    assert "lm_head.weight" in seen  # it is padded
    assert not [name for name in seen if "norm" in name]


def test_a_path_and_vllms_own_reload_weights_arrive_at_the_same_bits(
    live: Serving, policies: Policies
) -> None:
    """By folder through flashquant, by path and by iterator through collective_rpc."""
    path, weights = policies.bf16("b"), policies.tensors("b")
    flashquant.reload_weights(live.llm, path)
    expected = live.session.proofs.digest()

    for kwargs in ({"weights_path": str(path)}, {"weights_iterator": iter(weights.items())}):
        flashquant.reload_weights(live.llm, policies.tensors("a"))
        live.llm.collective_rpc("reload_weights", kwargs=kwargs)
        assert live.session.proofs.digest() == expected


def test_a_push_in_kernel_format_is_refused(live: Serving, policies: Policies) -> None:
    """It would write past every check, into memory whose layout is the kernel's business."""
    arguments = {
        "weights_iterator": iter(policies.tensors("b").items()),
        "is_checkpoint_format": False,
    }

    with pytest.raises(ReloadError, match="checkpoint names"):
        live.llm.collective_rpc("reload_weights", kwargs=arguments)

    live.snapshot().assert_same(live.start)


def test_a_torn_engine_refuses_to_generate(int8: Serving, policies: Policies) -> None:
    """The refusal stands where vLLM runs the model, not only in the session."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    with pytest.raises(RuntimeError, match="the trainer died"):
        flashquant.reload_weights(int8.llm, _failing(policies.tensors("b"), 20), atomic=False)

    with pytest.raises(TornWeights, match="complete update"):
        int8.outputs()
    runner = int8.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    with pytest.raises(TornWeights, match="complete update"):
        GPUModelRunner.execute_model(runner, SimpleNamespace(total_num_scheduled_tokens=1))
    flashquant.reload_weights(int8.llm, policies.tensors("a"))
    int8.snapshot().assert_same(int8.start)


def test_codes_and_scales_of_a_w8a8_checkpoint_pass_through(policies: Policies) -> None:
    """Already quantized tensors are not quantized again."""
    live = serve(policies.served("a", "int8_w8a8"), "int8")
    flashquant.reload_weights(live.llm, policies.tensors("b"))
    from_bf16 = live.session.proofs.digest()
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    flashquant.reload_weights(live.llm, policies.served("b", "int8_w8a8"))

    assert live.session.proofs.digest() == from_bf16


def test_a_half_precise_dtype_is_refused_for_codes(policies: Policies) -> None:
    """int8 codes do not fit an fp8 engine."""
    live = serve(policies.bf16("a"), "fp8_channel")

    with pytest.raises(ReloadError, match="int8"):
        live.model.load_weights([(O, torch.zeros(256, 256, dtype=torch.int8))])

    assert os.environ.get("FLASHRL_CONFIG") is None


def test_serving_folders_are_where_the_tests_put_them(policies: Policies) -> None:
    """The checkpoints of both policies differ, or none of these tests means anything."""
    a, b = policies.tensors("a"), policies.tensors("b")

    assert a.keys() == b.keys()
    assert not any(torch.equal(a[name], b[name]) for name in a)
    assert Path(policies.bf16("a")).is_dir()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_a_writer_that_goes_past_every_door_is_reported(
    policies: Policies, scheme: str, through_data: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`param.copy_` is seen before the next step, `param.data.copy_` by the next status."""
    live = serve(policies.bf16("a"), scheme)
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    assert flashquant.status(live.llm).foreign == ()
    name, parameter = next(
        (name, p)
        for name, p in live.model.named_parameters()
        if p.element_size() == 1 or name.endswith("norm.weight")
    )

    with torch.no_grad():
        (parameter.data if through_data else parameter).copy_(torch.ones(parameter.shape))
    if not through_data:
        live.snapshot()
        assert f"(first {name})" in caplog.text
    assert flashquant.status(live.llm).foreign == (name,)

    flashquant.reload_weights(live.llm, policies.tensors("a"))
    assert flashquant.status(live.llm).foreign == ()
    live.snapshot().assert_same(live.start)


def test_a_tied_head_and_the_embeddings_share_one_packed_copy(tmp_path: Path) -> None:
    policies = Policies(tmp_path, "tied")
    serving = serve(policies.bf16("a"), "bf16")
    packed = [
        {id(leaf): leaf for leaf in kernel_state.leaves(module).values() if is_handle(leaf)}
        for module in (serving.model.model.embed_tokens, serving.model.lm_head)
    ]
    if not any(packed):
        pytest.skip("this machine's kernels pack no weight of a head into a oneDNN handler")

    flashquant.reload_weights(serving.llm, policies.tensors("b"))

    assert len(packed[0]) == 1
    assert packed[0].keys() == packed[1].keys()
    serving.snapshot().assert_same(serve(policies.bf16("b"), "bf16").start)


def test_a_tied_head_with_a_packed_copy_of_its_own_is_renewed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wherever what packs a weight is not what flashquant knows to be shared."""
    policies = Policies(tmp_path, "tied")
    monkeypatch.setattr(loading, "packed_once", lambda shared: nullcontext())
    serving = serve(policies.bf16("a"), "bf16")
    flashquant.reload_weights(serving.llm, policies.tensors("b"))
    monkeypatch.undo()

    serving.snapshot().assert_same(serve(policies.bf16("b"), "bf16").start)


@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm", "fp8_channel"])
def test_zeros_and_numbers_without_a_reciprocal_arrive_as_a_fresh_start_loads_them(
    scheme: str, policies: Policies, tmp_path: Path
) -> None:
    """Whole layers of them, and single rows."""
    weights = policies.tensors("a")
    down = "model.layers.0.mlp.down_proj.weight"
    weights[O] = torch.zeros_like(weights[O])
    weights[down] = (weights[down].double() * 1e-37).bfloat16()
    weights[K] = weights[K].clone()
    weights[K][3], weights[K][5] = 0, 1e-40
    shutil.copytree(policies.bf16("a"), tmp_path / "a")
    save_file(weights, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    live = serve(policies.bf16("b"), scheme)

    flashquant.reload_weights(live.llm, weights)

    live.snapshot().assert_same(serve(tmp_path / "a", scheme).start)

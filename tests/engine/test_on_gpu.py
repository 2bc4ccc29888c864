"""What only a GPU has: captured graphs, memory of another process, an allocator that sleeps.

The other tests of this folder run there as well: `python -m pytest tests/engine -n 12`.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError
from flashquant.update import footprints
from tests.engine.serving import serve
from tests.support.gpu import HAS_GPU, ipc_engine
from tools.models.policies import Policies

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not HAS_GPU, reason="this machine has no GPU"),
]

GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "max_num_seqs": 8,
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def on_gpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in weights.items()}


IN_PLACE = ("bf16", "int8", "fp8_channel", "fp8_vllm")
# What vLLM repacks for Machete or Marlin, on a twin, biases among it; and blocks.
STAGED = ("int4", "nvfp4", "mxfp8", "int4_g32", "fp8_block")


@pytest.mark.parametrize(
    ("scheme", "place"),
    [*product(STAGED, ["cache"]), *product(IN_PLACE, ["cache", "host"])],
)
def test_captured_graphs_read_what_was_pushed_and_what_was_taken_back(
    policies: Policies, scheme: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHQUANT_UNDO", place)
    fresh = serve(policies.bf16("b"), scheme, **GRAPHS)
    # An engine reads at its start where its logs lie: a seed tells the two apart.
    live = serve(policies.bf16("a"), scheme, seed=int(place == "cache"), **GRAPHS)
    a, b = (on_gpu(policies.tensors(policy)) for policy in "ab")
    flashquant.reload_weights(live.llm, a)
    before = footprints(live.tensors().items())
    bad = {**b, "lm_head.weight": b["lm_head.weight"].clone().fill_(float("nan"))}

    live.snapshot().assert_same(live.start)
    with pytest.raises(ReloadError):
        flashquant.reload_weights(live.llm, bad)
    live.snapshot().assert_same(live.start)
    report = flashquant.reload_weights(live.llm, b)

    assert (report.undo_cache_bytes > 0) == (place == "cache")
    live.snapshot().assert_same(fresh.start)
    assert footprints(live.tensors().items()) == before


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("experts"), "qwen3-moe")


@pytest.mark.parametrize("scheme", ["int8", "bf16", "fp8_channel", "fp8_block"])
def test_captured_graphs_of_experts_read_what_was_pushed(experts: Policies, scheme: str) -> None:
    """In a memory between their kernels that all layers of an engine share."""
    fresh, live = (serve(experts.bf16(policy), scheme, **GRAPHS) for policy in "ba")
    a, b = (on_gpu(experts.tensors(policy)) for policy in "ab")

    flashquant.reload_weights(live.llm, b)
    live.snapshot().assert_same(fresh.start)
    flashquant.reload_weights(live.llm, a)
    live.snapshot().assert_same(live.start)


@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_a_prepared_update_serves_the_old_weights_until_it_is_swapped(
    policies: Policies, scheme: str
) -> None:
    live, fresh = (serve(policies.bf16(policy), scheme, **GRAPHS) for policy in "ab")
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.session.begin(prepares=True)
    for turn, pair in enumerate(on_gpu(policies.tensors("b")).items()):
        live.session.push([pair])
        if turn % 7 == 0:
            assert live.outputs() == live.start.outputs
    live.session.close()

    live.snapshot().assert_same(fresh.start)


@pytest.fixture
def handles(policies: Policies, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a trainer in another process sends of policy B, while it lives."""
    program = [sys.executable, "-m", "tests.engine.programs.trainer_on_gpu"]
    command = [*program, str(policies.bf16("b")), str(tmp_path / "handles")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as trainer:
        assert trainer.stdout is not None
        assert "sent\n" in trainer.stdout  # vLLM may have lines before it
        yield pickle.loads((tmp_path / "handles").read_bytes())  # of our own process
        trainer.communicate()


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_vllm"])
def test_memory_of_another_process_is_read_by_vllms_ipc(
    policies: Policies, scheme: str, handles: dict[str, Any]
) -> None:
    from vllm.config import WeightTransferConfig

    ipc_engine()
    config = WeightTransferConfig(backend="ipc")
    live = serve(policies.bf16("a"), scheme, weight_transfer_config=config)
    live.llm.init_weight_transfer_engine({"init_info": {}})
    live.llm.start_weight_update()
    live.llm.update_weights({"update_info": handles})
    live.llm.finish_weight_update()

    live.snapshot().assert_same(serve(policies.bf16("b"), scheme).start)


def test_what_slept_comes_back_and_what_is_pushed_after_it_is_exact(policies: Policies) -> None:
    """Level 1 brings weights back, level 2 loses them; one engine of a process may sleep."""
    fresh = serve(policies.bf16("b"), "int8")
    live = serve(policies.bf16("a"), "int8", enable_sleep_mode=True)
    live.llm.sleep(level=1)
    live.llm.wake_up()
    live.snapshot().assert_same(live.start)

    live.llm.sleep(level=2)
    live.llm.wake_up(tags=["weights"])
    flashquant.reload_weights(live.llm, on_gpu(policies.tensors("b")))
    live.llm.wake_up(tags=["kv_cache"])
    live.snapshot().assert_same(fresh.start)


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_vllm"])
def test_chunks_of_vllms_packed_transfer_come_on_streams_by_turns(
    policies: Policies, scheme: str
) -> None:
    """Layers lie across chunks, and what one brings may be written after the next has begun."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

    live, fresh = (serve(policies.bf16(policy), scheme) for policy in "ab")
    sent = on_gpu(policies.tensors("b"))
    chunks = 0

    def load(weights: list[tuple[str, Tensor]]) -> None:
        nonlocal chunks
        if chunks % 2 == 0:
            torch.cuda._sleep(20_000_000)  # cycles: a hundredth of a second, on this stream only
        chunks += 1
        live.session.push(weights)

    live.session.begin()
    packed_nccl_broadcast_consumer(
        iter((name, (list(tensor.shape), tensor.dtype)) for name, tensor in sent.items()),
        Broadcast(sent.values()),
        src=0,
        post_unpack_func=load,
        buffer_size_bytes=20_000,
        num_buffers=2,
    )
    live.session.finish(strict=True)

    assert chunks > 4
    live.snapshot().assert_same(fresh.start)


class Broadcast:
    """The trainer's end: the bytes of its tensors, one after another."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._rest = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        torch.cuda.synchronize()

    def broadcast(self, into: Tensor, src: int, stream: object = None) -> None:
        into.copy_(self._rest[: into.numel()])
        self._rest = self._rest[into.numel() :]


def test_tensors_of_a_stream_that_is_still_busy_are_waited_for(policies: Policies) -> None:
    """A trainer's last kernel may not have run when its tensors are pushed on the same stream."""
    live, fresh = (serve(policies.bf16(policy), "int8") for policy in "ab")
    a, b = (on_gpu(policies.tensors(policy)) for policy in "ab")
    late = {name: torch.empty_like(tensor) for name, tensor in b.items()}
    torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    for name, tensor in b.items():
        late[name].copy_(tensor)
    flashquant.reload_weights(live.llm, late)

    live.snapshot().assert_same(fresh.start)
    flashquant.reload_weights(live.llm, a)
    live.snapshot().assert_same(live.start)

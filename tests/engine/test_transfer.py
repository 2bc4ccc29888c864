"""vLLM's start / update / finish_weight_update, with engines that need neither NCCL nor a GPU."""

from __future__ import annotations

import operator
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor, ReloadError, StaleBase
from flashquant.patches.seams import worker
from flashquant.sender import Sender
from tests.engine.serving import KNOWS_VERSION, Serving, needs, serve, weight_version
from tests.engine.trainer import STEPS, stepped
from tests.support import nccl
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


FROM_A_FILE = "from a file"
# Before, each update says how it is packed.
PACKED_BY_THE_TRAINER = needs(">=0.28", "trainer that says once how it packs")


def receiving(policies: Policies, policy: str, scheme: str, backend: str) -> Serving:
    """An engine that was started with a transfer backend."""
    from vllm.config import WeightTransferConfig

    config = WeightTransferConfig(backend=backend)
    return serve(policies.bf16(policy), scheme, weight_transfer_config=config)


@pytest.fixture(params=["int8", "fp8_vllm"], scope="module")
def by_file(request: pytest.FixtureRequest, policies: Policies, tmp_path_factory: Any) -> Any:
    """An engine that receives from a folder, and the folder."""
    live = receiving(policies, "a", request.param, "flashquant_file")
    folder = tmp_path_factory.mktemp("transfer")
    live.llm.init_weight_transfer_engine({"init_info": {"folder": str(folder)}})
    return live, folder


@pytest.fixture(autouse=True)
def back_on_a(request: pytest.FixtureRequest, policies: Policies) -> Iterator[None]:
    yield
    if "by_file" in request.fixturenames:
        live, _ = request.getfixturevalue("by_file")
        flashquant.reload_weights(live.llm, policies.tensors("a"))


def write(folder: Path, weights: dict[str, Tensor], name: str) -> str:
    save_file(weights, folder / name)
    return name


def update(live: Serving, *paths: str) -> None:
    live.llm.start_weight_update()
    for path in paths:
        live.llm.update_weights({"update_info": {"path": path}})
    live.llm.finish_weight_update(**({"weight_version": FROM_A_FILE} if KNOWS_VERSION else {}))


def test_two_chunks_by_file_equal_a_fresh_start(by_file: Any, policies: Policies) -> None:
    """Cut inside a fused layer; the version is the trainer's."""
    live, folder = by_file
    pairs = list(policies.tensors("b").items())
    chunks = dict(pairs[:9]), dict(pairs[9:])

    update(live, *(write(folder, chunk, f"{n}.safetensors") for n, chunk in enumerate(chunks)))

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)
    assert weight_version(live.llm, FROM_A_FILE) == FROM_A_FILE


def test_an_update_that_ends_early_is_refused(by_file: Any, policies: Policies) -> None:
    """Half of a fused layer: the old weights serve on, and the next update goes through."""
    live, folder = by_file
    weights = policies.tensors("b")
    q = "model.layers.0.self_attn.q_proj.weight"

    with pytest.raises(IncompleteUpdate, match="qkv_proj"):
        update(live, write(folder, {q: weights[q]}, "half.safetensors"))
    live.snapshot().assert_same(serve(policies.bf16("a"), live.scheme).start)
    update(live, write(folder, weights, "whole.safetensors"))

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def test_a_bad_chunk_takes_the_whole_update_back(by_file: Any, policies: Policies) -> None:
    """The chunk before it, too; vLLM lets the trainer start anew."""
    live, folder = by_file
    weights = policies.tensors("b")
    good = write(folder, weights, "good.safetensors")
    bad = write(folder, {"model.norm.weight": torch.zeros(3).bfloat16()}, "bad.safetensors")

    with pytest.raises(MisfitTensor):
        update(live, good, bad)
    live.snapshot().assert_same(serve(policies.bf16("a"), live.scheme).start)
    update(live, good)

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def test_a_bundle_by_file_is_an_update_by_itself(by_file: Any, policies: Policies) -> None:
    """And takes the update back that somebody mixes it with."""
    live, folder = by_file
    weights = policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    for name in ("1", "2"):
        sender.bundle(weights).save(folder / f"{name}.safetensors")
        weights = stepped(weights)
    sender.bundle(weights).save(folder / "3.safetensors")
    plain = write(folder, policies.tensors("a"), "plain.safetensors")

    update(live, "1.safetensors")
    update(live, "2.safetensors")
    served = live.snapshot()
    for mixed in ((plain, "3.safetensors"), ("2.safetensors",)):
        with pytest.raises(ReloadError, match=r"update by itself|starts from policy"):
            update(live, *mixed)
        live.snapshot().assert_same(served)
    update(live, "3.safetensors")

    assert weight_version(live.llm, FROM_A_FILE) == FROM_A_FILE
    other = serve(policies.bf16("b"), live.scheme)
    for seed in range(STEPS):
        weights = stepped(weights, seed)
        sender.bundle(weights).save(folder / "next.safetensors")
        update(live, "next.safetensors")
        by_delta = flashquant.status(live.llm).digest
        assert flashquant.reload_weights(other.llm, weights).digest == by_delta


@pytest.mark.parametrize("goes_on", ["update_weights", "finish_weight_update"])
def test_what_another_update_came_into_is_refused_to_its_end(
    by_file: Any, policies: Policies, goes_on: str
) -> None:
    """The rest of it would go live by itself, among the layers of the other policy."""
    live, folder = by_file
    pairs = list(policies.tensors("b").items())
    first, rest = (
        {"path": write(folder, dict(part), f"{n}.safetensors")}
        for n, part in enumerate((pairs[:9], pairs[9:]))
    )
    live.llm.start_weight_update()
    live.llm.update_weights({"update_info": first})
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    more = ({"update_info": rest},) if goes_on == "update_weights" else ()
    with pytest.raises(ReloadError, match="under way no more: it was rolled back when another"):
        getattr(live.llm, goes_on)(*more)

    live.snapshot().assert_same(serve(policies.bf16("a"), live.scheme).start)
    update(live, write(folder, policies.tensors("b"), "b.safetensors"))
    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


@pytest.mark.parametrize("prepares", [False, True])
def test_slices_of_an_update_that_another_one_came_into_are_refused(
    by_file: Any, policies: Policies, prepares: bool
) -> None:
    live, folder = by_file
    path = str(folder / write(folder, policies.tensors("b"), "b.safetensors"))
    ask, mine, other = live.llm.collective_rpc, {"word": "mine"}, {"word": "other"}
    ask(worker.BEGIN, args=(path,), kwargs={**mine, "prepares": prepares})
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    said = [
        *ask(worker.FEED, args=(9.0,), kwargs=mine),
        *ask(worker.CLOSE, kwargs=mine),
    ]
    assert all("another one" in one["says"] for one in said)
    a = serve(policies.bf16("a"), live.scheme).start
    live.snapshot().assert_same(a)

    ask(worker.BEGIN, args=(path,), kwargs={**other, "prepares": prepares})
    assert all("says" in one for one in ask(worker.FEED, args=(9.0,), kwargs=mine))
    ask(worker.ABANDON, kwargs=mine)
    assert ask(worker.FEED, args=(9.0,), kwargs=other) == [{"answer": False}]
    ask(worker.CLOSE, kwargs=other)
    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc", "link"])
def test_nothing_outside_the_agreed_folder_is_read(by_file: Any, path: str) -> None:
    """Neither upwards, nor absolute, nor through a link."""
    live, folder = by_file
    link = folder / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")

    with pytest.raises(ReloadError, match="leads out of"):
        update(live, path)


@needs(">=0.26", "trainer's end of a weight transfer")
def test_by_gloo_the_trainer_broadcasts_and_a_refusal_leaves_both_in_step(
    policies: Policies,
) -> None:
    """vLLM's own trainer factory, three updates of which the second is refused."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    live = receiving(policies, "a", "int8", "flashquant_gloo")
    from flashquant.patches.transfer.gloo import GlooRendezvous

    weights = policies.tensors("b")
    source = Source(weights)
    trainer = WeightTransferTrainerFactory.trainer_init(
        *(() if KNOWS_VERSION else ("flashquant_gloo", None)),  # vLLM 0.26 asks for both
        init_info=GlooRendezvous("127.0.0.1", free_port(), 1, rank=0),
        client=Client(live.llm),
        source=source,
    )

    trainer.send_weights()
    live.snapshot().assert_same(serve(policies.bf16("b"), "int8").start)

    source.weights = {**weights, "model.embed_tokens.weight": torch.full((1000, 256), torch.nan)}
    with pytest.raises(MisfitTensor, match="NaN"):
        trainer.send_weights()
    live.snapshot().assert_same(serve(policies.bf16("b"), "int8").start)

    sender = Sender(flashquant.manifest(live.llm), delta=True)
    trainer.send_delta(sender.bundle(weights))
    first, second = (sender.bundle(stepped(w)) for w in (weights, stepped(weights)))
    with pytest.raises(StaleBase):
        trainer.send_delta(second)
    trainer.send_delta(first)
    trainer.send_delta(second)
    other, weights = serve(policies.bf16("b"), "int8"), stepped(stepped(weights))
    for seed in range(STEPS):
        weights = stepped(weights, seed)
        trainer.send_delta(sender.bundle(weights))
        by_delta = flashquant.status(live.llm).digest
        assert flashquant.reload_weights(other.llm, weights).digest == by_delta

    source.weights = policies.tensors("a")
    trainer.send_weights()
    live.snapshot().assert_same(live.start)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=PACKED_BY_THE_TRAINER)])
def test_by_nccl_a_refusal_leaves_no_trainer_waiting(policies: Policies, packed: bool) -> None:
    """Each broadcast waits for all: the rest of what is refused has to be received as well."""
    with nccl.answered_by_the_cpu(), ThreadPoolExecutor(1) as trainer:
        live = receiving(policies, "a", "int8", "nccl")
        flashquant.reload_weights(live.llm, policies.tensors("a"))  # it serves both cases
        meeting, size = {"host": "127.0.0.1", "port": free_port()}, 520_000
        joining = trainer.submit(StatelessProcessGroup.create, rank=0, world_size=2, **meeting)
        chunks = {"packed": True, "packed_buffer_size_bytes": size} if packed else {}
        init = {"master_address": meeting["host"], "master_port": meeting["port"]}
        live.llm.init_weight_transfer_engine(
            {"init_info": {**init, "rank_offset": 1, "world_size": 2, **chunks}}
        )
        group = nccl.Communicator(joining.result(60), None)

        def send(weights: dict[str, Tensor]) -> None:
            if packed:
                pairs, first = iter(weights.items()), operator.itemgetter(1)
                packed_nccl_broadcast_producer(pairs, group, 0, first, buffer_size_bytes=size)
                return
            for tensor in weights.values():
                group.broadcast(tensor, src=0)

        def update(weights: dict[str, Tensor]) -> None:
            said = {
                "names": list(weights),
                "dtype_names": [str(one.dtype).removeprefix("torch.") for one in weights.values()],
                "shapes": [list(one.shape) for one in weights.values()],
            }
            live.llm.start_weight_update()
            sending = trainer.submit(send, weights)
            try:
                live.llm.update_weights({"update_info": said})
            finally:
                sending.result(60)
            live.llm.finish_weight_update()

        weights = policies.tensors("b")
        first = next(iter(weights))
        with pytest.raises(MisfitTensor, match="NaN"):
            update({**weights, first: weights[first] * torch.nan})
        live.snapshot().assert_same(serve(policies.bf16("a"), "int8").start)

        update(weights)
        live.snapshot().assert_same(serve(policies.bf16("b"), "int8").start)


class Source:
    """A trainer's weights, as vLLM's `WeightSource` has them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class Client:
    """The four calls of vLLM's `VLLMWeightSyncClient`, on an engine in this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(*([weight_version] if KNOWS_VERSION else []))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Memory that is used again by the next update, and never by two copies at once."""

from __future__ import annotations

import os

import pytest
import torch

from flashquant.errors import ReloadError
from flashquant.update import UndoLog
from flashquant.update import reserve as reserve_module
from flashquant.update.reserve import Copies, Reserve
from tests.support.fake_engine import NEW, OLD, FakeEngine, serving

LARGE = 1 << 20


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(LARGE, dtype=torch.float32).view(512, -1),
        torch.arange(LARGE, dtype=torch.int16).view(512, -1).t(),
        torch.arange(LARGE, dtype=torch.float32).view(512, -1)[:, 100:1500:3],
        torch.randint(0, 120, (512, 2048), dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.arange(3.0),
        torch.empty(0, 5),
    ],
    ids=["rows", "turned", "a window", "fp8", "few", "none"],
)
def test_a_copy_is_the_tensor_in_memory_of_its_own(tensor):
    copy = Copies(Reserve()).of(tensor)

    assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(copy.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_what_a_forked_process_keeps_is_in_memory_of_its_own():
    """An engine that was forked off with its process takes updates of its own."""
    reserve, tensor = Reserve(), torch.arange(LARGE)
    reserve.put([reserve.take(tensor.nbytes)])
    child = os.fork()
    copy = Copies(reserve).of(tensor if child else torch.zeros_like(tensor))
    if not child:
        os._exit(int(copy.any()))
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(copy, tensor)


def test_a_dense_tensor_is_copied_in_the_order_in_which_it_lies():
    tensor = torch.zeros(512, 4096).t()

    assert Copies(Reserve()).of(tensor).stride() == tensor.stride()


def test_copies_do_not_overlap():
    copies = Copies(Reserve())

    made = [copies.of(torch.full((LARGE + odd,), odd, dtype=torch.int8)) for odd in range(100)]

    assert all((copy == odd).all() for odd, copy in enumerate(made))


def test_the_next_update_gets_the_same_memory():
    reserve, tensor = Reserve(), torch.zeros(LARGE)
    first, second = Copies(reserve), Copies(reserve)

    address = first.of(tensor).data_ptr()
    first.free()

    assert second.of(tensor).data_ptr() == address


def test_an_update_beside_another_gets_other_memory():
    reserve, tensor = Reserve(), torch.zeros(LARGE)

    kept = [Copies(reserve) for _ in range(2)]

    assert len({copies.of(tensor).data_ptr() for copies in kept}) == 2


def test_more_than_a_chunk_holds_has_a_chunk_of_its_own():
    tensor = torch.ones((64 << 20) + 12345, dtype=torch.uint8)

    assert torch.equal(Copies(Reserve()).of(tensor), tensor)


def test_what_the_largest_update_took_stays_while_small_ones_come_by():
    reserve, tensors = Reserve(), [torch.zeros(60 << 20, dtype=torch.uint8) for _ in range(3)]
    large = Copies(reserve)
    addresses = [large.of(tensor).data_ptr() for tensor in tensors]
    large.free()

    for _ in range(5):
        small = Copies(reserve)
        small.of(torch.zeros(LARGE))
        small.free()
    again = Copies(reserve)

    assert [again.of(tensor).data_ptr() for tensor in tensors] == addresses


def test_a_small_copy_leaves_the_largest_chunk_to_whoever_needs_it():
    reserve = Reserve()
    copies = Copies(reserve)
    copies.of(torch.zeros(100 << 20, dtype=torch.uint8))
    copies.of(torch.zeros(LARGE))
    copies.free()
    reserved = reserve.nbytes

    again = Copies(reserve)
    again.of(torch.zeros(LARGE))
    again.of(torch.zeros(100 << 20, dtype=torch.uint8))
    again.free()

    assert reserve.nbytes == reserved


def test_nothing_is_reserved_once_it_was_given_back():
    reserve = Reserve()
    copies = Copies(reserve)
    copies.of(torch.zeros(LARGE))
    copies.free()

    reserve.clear()

    assert reserve.nbytes == 0


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


class PinnedAllocator:
    """torch's: each block is rounded up to a power of two, and kept when it is freed."""

    def __init__(self):
        self.held, self.sizes = 0, []

    def allocate(self, size):
        self.sizes.append(size)
        self.held += 1 << (size - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8)

    def empty_cache(self):
        self.held = 0


@pytest.fixture
def pinning(monkeypatch):
    allocator = PinnedAllocator()
    monkeypatch.setattr(reserve_module, "_pinned", allocator.allocate)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", allocator.empty_cache, raising=False)
    return allocator


def model():
    """Weights of sizes that lie right above a power of two, in MB; and their small scales."""
    for place, size in enumerate([5, 9, 17, 33, 5, 9, 17, 33, 65]):
        weight = torch.full(((size << 20) + 64,), place, dtype=torch.uint8)
        yield weight.view(-1, 32).t().as_subclass(OnGpu)
        yield torch.full((7,), float(place)).as_subclass(OnGpu)


def test_what_is_pinned_for_a_gpu_is_hardly_more_than_its_bytes(pinning):
    """Block by block, torch would round 193 MB up to 384."""
    undo, live = UndoLog(reserve=Reserve()), list(model())

    for tensor in live:
        undo.remember(tensor)

    needed = sum(tensor.nbytes for tensor in live)
    assert needed < pinning.held < 1.7 * needed
    assert all(size & (size - 1) == 0 for size in pinning.sizes)


def test_a_log_reports_all_the_memory_that_was_pinned_for_it(pinning):
    undo = UndoLog(reserve=Reserve())

    for tensor in model():
        undo.remember(tensor)

    assert undo.bytes == pinning.held
    undo.forget()
    assert undo.bytes == pinning.held


def test_what_lives_on_a_gpu_is_restored_from_pinned_memory(pinning):
    undo, live = UndoLog(reserve=Reserve()), list(model())
    before = [tensor.as_subclass(torch.Tensor).clone() for tensor in live]

    for tensor in live:
        undo.remember(tensor)
        tensor.zero_()
    undo.restore()

    assert all(
        torch.equal(t.as_subclass(torch.Tensor), old) for t, old in zip(live, before, strict=True)
    )


def test_the_next_update_pins_nothing(pinning):
    reserve, held = Reserve(), []

    for _ in range(3):
        undo = UndoLog(reserve=reserve)
        for tensor in model():
            undo.remember(tensor)
        undo.forget()
        held.append(pinning.held)

    assert held == [reserve.nbytes] * 3


def test_pinned_memory_is_given_back_with_the_reserve(pinning):
    reserve = Reserve()
    undo = UndoLog(reserve=reserve)
    for tensor in model():
        undo.remember(tensor)
    undo.forget()

    reserve.clear()

    assert reserve.nbytes == pinning.held == 0


def test_a_prepared_update_leaves_nothing_to_an_engine_that_sleeps():
    """Its log is swept after the pause; who puts the engine to sleep may come first."""
    session = serving(FakeEngine(torch.bfloat16), OLD)
    transactions = session.transactions
    undo = UndoLog(reserve=transactions.reserve)
    undo.remember(torch.zeros(LARGE))
    transactions._spent.append(undo)

    session.sleep(keeps_weights=True)
    session.wake_up()
    session.proofs.audit()

    assert transactions.reserve.nbytes == 0


@pytest.fixture
def cache():
    """Two layers' pieces of a KV cache; untouched, they take no memory."""
    layers = (torch.zeros(size << 20, dtype=torch.uint8) for size in (50, 300))
    return tuple(layer.as_subclass(OnGpu) for layer in layers)


def test_a_log_in_the_kv_cache_takes_no_memory_of_its_own_and_restores_as_well(cache, pinning):
    reserve, live = Reserve(), list(model())
    undo, before = UndoLog(reserve=reserve), [t.as_subclass(torch.Tensor).clone() for t in live]
    reserve.lent = cache

    for tensor in live:
        undo.remember(tensor)
        tensor.zero_()

    assert (pinning.sizes, reserve.nbytes) == ([], 0)
    assert undo.cache_bytes == undo.bytes == sum(tensor.nbytes for tensor in live)
    undo.restore()
    assert all(
        torch.equal(t.as_subclass(torch.Tensor), old) for t, old in zip(live, before, strict=True)
    )


@pytest.mark.parametrize("end", [UndoLog.restore, UndoLog.forget])
def test_the_kv_cache_is_zero_again_when_the_log_is_over(cache, pinning, end):
    """A kernel reads past the end of a sequence, where 0 * NaN is NaN."""
    reserve = Reserve()
    reserve.lent, undo = cache, UndoLog(reserve=reserve)
    for tensor in model():
        undo.remember(tensor.fill_(255))
    assert all(chunk.as_subclass(torch.Tensor).any() for chunk in cache)

    end(undo)

    assert not any(chunk.as_subclass(torch.Tensor).any() for chunk in cache)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("end", [UndoLog.restore, UndoLog.forget])
def test_what_no_single_layers_cache_has_room_for_lies_in_several(pinning, turned, end):
    """An embedding may be larger than one layer's share of the cache."""
    reserve = Reserve()
    reserve.lent = tuple(torch.zeros(100_000, dtype=torch.uint8).as_subclass(OnGpu) for _ in "123")
    undo, live = UndoLog(reserve=reserve), torch.arange(65_000).to(torch.int32).view(130, -1)
    live = (live.t() if turned else live).as_subclass(OnGpu)
    before, scalar = live.clone(), torch.tensor(3.0).as_subclass(OnGpu)

    undo.remember(scalar)
    undo.remember(live)
    live.zero_()
    scalar.zero_()
    end(undo)

    assert undo.cache_bytes == undo.bytes == live.nbytes + scalar.nbytes
    assert pinning.sizes == []
    assert torch.equal(live, before) == (scalar == 3) == (end is UndoLog.restore)
    assert not any(chunk.as_subclass(torch.Tensor).any() for chunk in reserve.lent)


def test_what_the_kv_cache_has_no_room_for_is_kept_on_the_host(pinning):
    reserve, live = Reserve(), torch.ones(20, 10_000, dtype=torch.uint8).as_subclass(OnGpu)
    reserve.lent = (torch.zeros(105_000, dtype=torch.uint8).as_subclass(OnGpu),)
    undo = UndoLog(reserve=reserve)

    undo.remember(live)
    live.zero_()
    undo.restore()

    assert undo.cache_bytes == 100_000
    assert undo.bytes == 100_000 + pinning.held
    assert live.as_subclass(torch.Tensor).all()


def test_what_lies_on_another_device_than_the_kv_cache_is_kept_on_the_host(cache):
    reserve = Reserve()
    reserve.lent, undo = cache, UndoLog(reserve=reserve)

    undo.remember(torch.ones(LARGE))

    assert undo.cache_bytes == 0 < undo.bytes


@pytest.mark.parametrize("borrows", [True, False])
def test_nothing_more_is_put_into_a_kv_cache_that_is_not_lent(cache, pinning, borrows):
    """It was taken back, or steps may run before this update is over."""
    reserve = Reserve()
    undo = UndoLog(reserve=reserve, borrows=borrows)
    reserve.lent = cache
    undo.remember(live := torch.ones(LARGE).as_subclass(OnGpu))
    lay_there = undo.cache_bytes
    reserve.lent = ()

    undo.remember(torch.ones(LARGE).as_subclass(OnGpu))

    assert undo.cache_bytes == lay_there == borrows * live.nbytes
    live.zero_()
    undo.restore()
    assert live.as_subclass(torch.Tensor).all()


def test_an_engine_that_needs_its_kv_cache_gets_it_back_with_the_old_weights():
    """In the middle of a bracket, of which nothing can come any more."""
    session = serving(FakeEngine(torch.bfloat16), OLD)
    cache = torch.zeros(LARGE, dtype=torch.uint8)
    before, session.transactions.reserve.lent = session.proofs.digest(), (cache,)
    session.begin()
    session.push(list(NEW.items()))
    assert session.proofs.digest() != before
    assert cache.any()

    session.transactions.give_back()

    assert session.proofs.digest() == before
    assert not cache.any()
    assert session.transactions.reserve.lent == ()
    with pytest.raises(ReloadError, match="rolled back"):
        session.finish()


def test_an_engine_that_needs_its_kv_cache_does_not_disturb_a_log_on_the_host():
    session = serving(FakeEngine(torch.bfloat16), OLD)
    session.begin()
    session.push(list(NEW.items()))

    session.transactions.give_back()

    session.finish()
    assert session.version == 1

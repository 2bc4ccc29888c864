"""Memory that is used again by the next update, and never by two copies at once."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from flashquant.update import UndoLog
from flashquant.update import reserve as reserve_module
from flashquant.update.reserve import Copies, Reserve
from tests.support.fake_engine import OLD, FakeEngine, serving

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


GB = 1 << 30


@pytest.fixture
def gpu(monkeypatch, pinning):
    """One with 8 GB free, and what has been asked of it; its memory is the host's, untouched."""
    state = SimpleNamespace(free=8 * GB, asked=[], pools=0)

    @contextmanager
    def pool(_, device):
        state.pools += 1
        with monkeypatch.context() as inside:
            inside.setattr(torch, "empty", had)
            yield

    def had(size, *, dtype, device, empty=torch.empty):
        if size > state.free:
            raise torch.OutOfMemoryError
        state.free -= size
        state.asked.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.told(), 80 * GB))
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", pool)
    state.told = lambda: state.free
    return state


def test_a_log_that_may_stay_on_the_gpu_pins_nothing_and_restores_as_well(gpu, pinning):
    undo, live = UndoLog(reserve=Reserve(nearby=True)), list(model())
    before = [tensor.as_subclass(torch.Tensor).clone() for tensor in live]

    for tensor in live:
        undo.remember(tensor)
        tensor.zero_()

    assert (pinning.sizes, gpu.asked) == ([], [GB])
    assert undo.device_bytes == undo.bytes == GB
    undo.restore()
    assert all(
        torch.equal(t.as_subclass(torch.Tensor), old) for t, old in zip(live, before, strict=True)
    )


def test_it_leaves_the_gpu_2_gb_and_goes_on_in_pinned_memory(gpu, pinning):
    gpu.free = 3 * GB + 5
    undo = UndoLog(reserve=Reserve(nearby=True))

    for _ in range(2):
        undo.remember(torch.empty(700 << 20, dtype=torch.uint8).as_subclass(OnGpu))

    assert (gpu.asked, pinning.sizes) == ([GB], [GB])
    assert (undo.device_bytes, undo.bytes) == (GB, 2 * GB)


def test_where_another_process_takes_the_memory_first_nothing_fails(gpu, pinning):
    gpu.free, gpu.told = 0, lambda: 8 * GB
    undo = UndoLog(reserve=Reserve(nearby=True))

    undo.remember(torch.ones(LARGE).as_subclass(OnGpu))

    assert (gpu.asked, undo.device_bytes) == ([], 0)
    assert len(pinning.sizes) == 1


@pytest.mark.parametrize("end", ["forget", "restore"])
def test_the_memory_of_the_gpu_is_free_when_the_update_is_over(gpu, end):
    undo = UndoLog(reserve=Reserve(nearby=True))
    undo.remember(torch.ones(LARGE).as_subclass(OnGpu))
    chunk, pool = weakref.ref(undo._nearby._chunks[0]), undo._nearby._pool
    assert pool is not None

    getattr(undo, end)()

    assert chunk() is None
    assert undo._nearby._pool is None


def test_unless_it_is_asked_for_no_memory_is_had_of_a_gpu(gpu):
    undo = UndoLog(reserve=Reserve())

    undo.remember(torch.ones(LARGE).as_subclass(OnGpu))

    assert (gpu.asked, undo.device_bytes) == ([], 0)

"""What is launched on a GPU, and what becomes of a kernel that cannot be compiled: on fake tensors.

A fake tensor says that it lies on `cuda:1` and has no memory, so nothing here needs a GPU; the
kernels themselves are compiled for one (their code is read), and run in `test_fused`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from flashquant.schemes import absmax as maxima
from flashquant.schemes import chunks, devices, fp8, int8, native, quick, smoothed

triton = pytest.importorskip("triton")
fused = importlib.import_module("flashquant.schemes.fused")
kernels = importlib.import_module("flashquant.schemes.triton_kernels")
ROWS = ("absmax_row", "int8_row", "fp8_row", "static_row", "frozen_row", "refreshed_row")
SECOND = torch.device("cuda", 1)


def ones(weight: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, device=weight.device)


# Each function of rows, and in how many launches of ours it is done, whatever their size.
LAUNCHES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "row_absmax": (quick.row_absmax, 1),
    "absmax": (quick.absmax, 2),
    "int8_channel": (quick.int8_channel, 1),
    "fp8_channel": (quick.fp8_channel, 1),
    "fp8_tensor": (quick.fp8_tensor, 3),
    "fp8_tensors": (lambda weight: quick.fp8_tensors(weight, 16), 3),
    "fp8_static": (lambda weight: quick.fp8_static(weight, ones(weight, 1)), 1),
    "int8_frozen": (lambda weight: quick.int8_frozen(weight, None, None), 1),
    "int8_refreshed": (
        lambda weight: quick.int8_refreshed(weight, None, None, ones(weight, len(weight), 1)),
        1,
    ),
}


def _in_vllms_default(make: Callable[..., Tensor], *shape: int, **options: Any) -> Tensor:
    return make(*shape, **{"dtype": torch.bfloat16, **options})


def _kind(argument: object) -> object:
    """By which Triton tells integers apart: it compiles anew for multiples of 16, and for 1."""
    return (argument == 1, argument % 16 == 0) if isinstance(argument, int) else None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Each launch: what Triton compiles it by, and the GPU that was the current one."""
    seen: list[tuple[Any, ...]] = []
    current: list[torch.device] = [torch.device("cuda", 0)]

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name
            kernel = getattr(kernels, name)
            self.parameters, self.arg_names = kernel.params, kernel.arg_names

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(
                weight: Tensor, *others: Any, BLOCK: int, ONCE: bool | None = None, **__: Any
            ) -> None:
                numbers = zip(self.parameters[1:], others, strict=False)
                kinds = tuple(_kind(n) for p, n in numbers if not p.do_not_specialize)
                seen.append((self.name, weight.dtype, kinds, BLOCK, ONCE, current[-1]))

            return launch

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    for name in ROWS:
        monkeypatch.setattr(kernels, name, Recorded(name))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(quick, "_on_gpu", lambda device: fused)
    monkeypatch.setattr(quick, "_keeps_nan", lambda device: False)  # whatever it does on a GPU
    with FakeTensorMode():
        yield seen


def test_a_maximum_takes_no_launch_of_tritons_where_torchs_norm_keeps_nans(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for the kernel that was compiled takes Python longer than the launch."""
    monkeypatch.setattr(quick, "_keeps_nan", lambda device: True)
    weight = torch.empty(4096, 8960, dtype=torch.bfloat16, device=SECOND)

    peak = quick.absmax(weight)
    quick.fp8_tensor(weight)

    assert (peak.shape, peak.dtype, peak.device) == (torch.Size(), torch.float32, SECOND)
    assert [name for name, *_ in launched] == ["static_row"]


@pytest.mark.parametrize("weight", list(native.hard_rows()), ids=lambda weight: str(weight.dtype))
def test_torchs_norm_is_the_maximum_that_is_defined(weight: Tensor) -> None:
    """Of each row, and of all, NaN and infinity among them."""
    assert quick._keeps_nan(weight.device)
    for rows in (*weight.split(1), *weight.split(7), weight):
        assert torch.equal(
            quick._norm(rows).view(1).view(torch.int32),
            maxima.absmax(rows).view(1).view(torch.int32),
        )


def test_a_scale_of_a_tensor_is_made_of_that_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(quick, "_on_gpu", lambda device: None)
    for weight in native.hard_rows():
        for rows in (weight[:7], weight[7:8], weight):
            made, defined = quick.fp8_tensor(rows), fp8.fp8_tensor(rows)
            for ours, theirs in zip(made, defined, strict=True):
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("rows", [64, 1 << 20])
def test_a_weight_of_any_size_takes_the_same_few_launches(
    name: str, rows: int, launched: list[Any]
) -> None:
    run, times = LAUNCHES[name]

    run(torch.empty(rows, 8960, dtype=torch.bfloat16, device=SECOND))

    assert len(launched) == times


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_are_launched_on_the_gpu_where_the_rows_lie(name: str, launched: list[Any]) -> None:
    """The current one may be another: a worker on the second GPU need not have chosen it."""
    LAUNCHES[name][0](torch.empty(64, 640, dtype=torch.bfloat16, device=SECOND))

    assert {device for *_, device in launched} == {SECOND}


@pytest.mark.parametrize("columns", [112, 640, 2048, 3584, 8960, 18944])
@pytest.mark.parametrize("name", ["int8_channel", "fp8_channel", "fp8_tensor"])
def test_what_a_push_launches_has_been_compiled_at_the_start(
    name: str, columns: int, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever vLLM has made the default dtype: it is that of the model while it loads."""
    run = getattr(quick, name)
    monkeypatch.setattr(torch, "zeros", functools.partial(_in_vllms_default, torch.zeros))
    quick.warm([run], torch.bfloat16, SECOND)
    compiled = set(launched)
    launched.clear()

    _, scales = run(torch.empty(96, columns, dtype=torch.bfloat16, device=SECOND))
    quick.absmax(scales)
    quick.absmax(torch.empty(columns, dtype=torch.bfloat16, device=SECOND))  # of a norm
    quick.absmax(torch.empty(4096, columns, dtype=torch.bfloat16, device=SECOND))

    assert launched
    assert set(launched) <= compiled


def test_nothing_is_compiled_for_the_host(launched: list[Any]) -> None:
    quick.warm([quick.int8_channel], torch.bfloat16, torch.device("cpu"))

    assert launched == []


def failing(failure: Exception) -> Any:
    """A kernel that cannot be compiled."""

    class Kernel:
        arg_names = kernels.int8_row.arg_names

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*_: Any, **__: Any) -> None:
                raise failure

            return launch

    return Kernel()


def test_a_bound_launch_asks_triton_once_which_kernel_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers for aligned rows; others are rare, and asked about each time."""
    asked: list[tuple[Any, ...]] = []
    launched: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: launched.append((grid, *arguments))

    class Kernel:
        arg_names = kernels.int8_row.arg_names

        def __getitem__(self, grid: tuple[int]) -> Callable[..., Compiled]:
            def launch(*arguments: Any, BLOCK: int, ONCE: bool, **_: Any) -> Compiled:
                asked.append((grid, *arguments, BLOCK, ONCE))
                return Compiled()

            return launch

    monkeypatch.setitem(fused._ROWS, "int8_channel", Kernel())
    rows = torch.zeros(7 * 40 + 1, dtype=torch.bfloat16)
    codes, scales = torch.empty(9, 40, dtype=torch.int8)[1:8], torch.empty(7, 1)
    store = fused.bound("int8_channel", codes, scales)

    for start in (0, 0, 1, 0):
        store(rows[start : start + 280].view(7, 40))

    assert [call[0] for call in asked] == [(7,), (7,)]  # the first, and the one that is askew
    assert [call[0] for call in launched] == [(7, 1, 1)] * 2
    # Both take the same, in the same order: what is compiled is handed constants as well.
    for once, again in zip(asked[0][1:], launched[0][1:], strict=True):
        assert once is again or (
            torch.equal(once, again) if isinstance(once, Tensor) else once == again
        )


def test_a_bound_launch_that_cannot_be_compiled_leaves_the_work_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quick, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(quick, "_abandoned", set())
    monkeypatch.setattr(fused, "difference", lambda device: None)
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setitem(fused._ROWS, "int8_channel", failing(RuntimeError("no ptxas")))
    quick._on_gpu.cache_clear()
    weight, codes, scales = (
        torch.randn(4, 40),
        torch.empty(4, 40, dtype=torch.int8),
        torch.ones(4, 1),
    )

    store = quick.storing(quick.int8_channel, torch.float32, codes, scales)
    for _ in range(2):
        codes.zero_()
        store(weight)

        assert torch.equal(codes, int8.int8_channel(weight)[0])
        assert torch.equal(scales, int8.int8_channel(weight)[1])
    assert len(caplog.records) == 1
    quick._on_gpu.cache_clear()


FAILURES = [
    triton.compiler.errors.CompilationError(None, None, "no such thing"),
    triton.runtime.errors.PTXASError("fatal"),
    RuntimeError("Failed to find C compiler"),
    subprocess.CalledProcessError(1, "gcc"),
    PermissionError("/.triton"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_kernel_that_cannot_be_compiled_leaves_the_work_to_torch(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of an update: it goes on, and the log names the kernel and the reason."""
    monkeypatch.setattr(quick, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(quick, "_abandoned", set())
    monkeypatch.setattr(fused, "difference", lambda device: None)
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(kernels, "int8_row", failing(failure))
    quick._on_gpu.cache_clear()
    weight = torch.randn(4, 40)

    with caplog.at_level(logging.ERROR):
        made = quick.int8_channel(weight), quick.int8_channel(weight)

    for codes, scales in made:
        assert torch.equal(codes, int8.int8_channel(weight)[0])
        assert torch.equal(scales, int8.int8_channel(weight)[1])
    assert len(caplog.records) == 1
    assert "int8_channel cannot be compiled by Triton for cpu" in caplog.text
    quick._on_gpu.cache_clear()


def test_memory_that_is_short_is_not_a_kernel_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(quick, "_on_gpu", functools.cache(lambda device: fused))
    monkeypatch.setattr(kernels, "int8_row", failing(torch.OutOfMemoryError("short")))

    with pytest.raises(torch.OutOfMemoryError):
        quick.int8_channel(torch.randn(4, 40))
    assert quick._abandoned == set()


def test_kernels_that_cannot_be_compared_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The comparison at the start compiles them first, so it fails there."""

    def difference(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "difference", difference)
    quick._on_gpu.cache_clear()

    with caplog.at_level(logging.ERROR):
        assert quick._on_gpu(SECOND) is None
    assert "Failed to find C compiler" in caplog.text
    quick._on_gpu.cache_clear()


def test_kernels_are_compared_with_what_the_host_makes_of_the_same_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not with the definitions on the GPU, which may err as the kernels do.

    Here everything errs there: it sees twice the weight.
    """

    class Rows(Tensor):
        def to(self, *_: Any, **__: Any) -> Tensor:
            return 2 * self.as_subclass(Tensor)

    rows = list(native.hard_rows())
    defined = {"row_absmax": maxima, "absmax": maxima, "fp8_tensor": fp8, "fp8_tensors": fp8}
    defined |= {"int8_channel": int8, "fp8_channel": fp8}
    defined |= {"int8_frozen": smoothed, "int8_refreshed": smoothed}
    for name, module in defined.items():
        monkeypatch.setattr(fused, name, getattr(module, name))
    monkeypatch.setattr(
        fused, "_by_bound", lambda name, weight, _: getattr(defined[name], name)(weight)
    )
    difference = fused.difference.__wrapped__

    monkeypatch.setattr(native, "hard_rows", lambda: iter(rows))
    assert difference(torch.device("cpu")) is None
    monkeypatch.setattr(native, "hard_rows", lambda: (row.as_subclass(Rows) for row in rows))
    assert difference(torch.device("cpu")) == "row_absmax of torch.float32"


def test_kernels_for_float32_are_compared_while_a_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(fused, "_compared", lambda weight, there: seen.append(weight.dtype) or ())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fused.difference.__wrapped__(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)

    assert seen == [torch.float32, torch.bfloat16] * 2


def test_where_torch_has_to_quantize_on_a_gpu_chunks_are_large() -> None:
    """A launch takes as long as 16 MiB of memory traffic, so half a million elements are few."""
    with FakeTensorMode():
        there = torch.empty(8192, 8192, dtype=torch.bfloat16, device=SECOND)
        here = torch.empty(8192, 8192, dtype=torch.bfloat16)

        assert len(list(chunks.row_chunks(there))) == 4
        assert len(list(chunks.row_chunks(here))) == 128


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "meta"])
def test_a_resolved_device_is_that_of_the_tensors_on_it(device: str) -> None:
    """`cuda` is never equal to `cuda:0`, as `cpu:0` is not to `cpu`."""
    found = devices.resolved(torch.device(device))

    assert found == torch.zeros(3, device=device).device


def test_stacked_matrices_are_each_quantized_as_one_is() -> None:
    stack = torch.randn(3, 8, 40) * torch.tensor([1.0, 30.0, 0.0])[:, None, None]

    for module in (quick, fp8):
        codes, scales = module.fp8_tensors(stack.view(24, 40), 3)

        each = [fp8.fp8_tensor(one) for one in stack]
        assert torch.equal(
            codes.view(torch.uint8), torch.cat([c for c, _ in each]).view(torch.uint8)
        )
        assert torch.equal(scales, torch.cat([s for _, s in each]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., str]:
    """The PTX of a kernel, compiled for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"weight_ptr": "*bf16", "clipped_ptr": "*i64"}
    bytes_ = {"fp8_row": "*u8", "static_row": "*u8"}

    def ptx(name: str, capability: int, *, once: bool) -> str:
        kernel = getattr(kernels, name)
        fixed = {"BLOCK": 1024, "HAS_INPUT": True, "HAS_OUTPUT": True, "ONCE": once}
        fixed |= {"HAS_E4M3": capability >= 89}
        fixed |= {"column_stride": 1, "codes_column_stride": 1}
        constants = {word: value for word, value in fixed.items() if word in kernel.arg_names}
        signature = {
            word: "constexpr"
            if word in constants
            else bytes_.get(name, "*i8")
            if word == "codes_ptr"
            else pointers.get(word, "*fp32")
            if word.endswith("_ptr")
            else "fp32"
            if word == "divisor"
            else "i32"
            for word in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        options = fused._options(torch.empty(1, 1024, device="meta"))
        made: str = triton.compile(source, target=target, options=options).asm["ptx"]
        return made

    return ptx


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ROWS)
def test_compiled_code_rounds_as_the_definitions_do(
    name: str, capability: int, once: bool, compiled: Callable[..., str]
) -> None:
    """Only true divisions; no product is fused with a sum; nothing is flushed to zero."""
    code = compiled(name, capability, once=once)

    divisions = set(re.findall(r"\bdiv\.[\w.]+f32", code))
    assert divisions <= {"div.rn.f32"}
    assert divisions or name == "frozen_row"
    assert not re.findall(r"\bfma\.|\brcp\.|\.ftz|\.approx", code)
    assert re.findall(r"mul\.rn\.f32|add\.rn\.f32|max(?:\.NaN)?\.f32", code)


@pytest.mark.parametrize("name", ["fp8_row", "static_row"])
def test_where_a_gpu_has_an_instruction_for_e4m3_it_is_used(
    name: str, compiled: Callable[..., str]
) -> None:
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled(name, 90, once=True)
    assert "e4m3" not in compiled(name, 80, once=True)


@pytest.mark.parametrize("name", ["int8_row", "fp8_row", "refreshed_row"])
def test_a_row_that_fits_the_registers_is_loaded_once(
    name: str, compiled: Callable[..., str]
) -> None:
    once, twice = (compiled(name, 90, once=once).count("ld.global") for once in (True, False))

    assert 0 < once < twice

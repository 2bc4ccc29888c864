"""Count what a whole reload would launch on a GPU, where there is none.

python -m tools.layouts.launches [--layers N | --experts]

The model is laid out for a Hopper, on CPU tensors. Each operation of torch that fills memory is
counted as a launch, and each launch of a Triton kernel of ours, which then only fills its results.
Beside it: the same without these kernels, in the chunks in which torch quantizes on the host, and
which it used on a GPU, too. Undo copies are in the count; digests and checks of bytes are not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("FLASHRL_CONFIG", None)
os.environ.update(
    FLASHQUANT_DIGEST="0",
    FLASHQUANT_LEDGER="0",
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from flashquant.schemes import fused, quick, triton_kernels
from tools.layouts import models
from tools.layouts.cases import HOPPER
from tools.layouts.machine import pretending
from tools.models import tiny_models
from tools.models.policies import Policies

_SCHEMES = ("int8", "fp8_channel", "fp8_vllm", "fp8_block")
_KERNELS = ("absmax_row", "int8_row", "fp8_row", "static_row", "frozen_row", "refreshed_row")
_FREE = ("empty", "new_empty", "lift_fresh", "_local_scalar_dense")  # these fill no memory


class Launches(TorchDispatchMode):
    """How many there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in told)
        self.count += not (is_view or func._schema.name.split("::")[1].startswith(_FREE))
        return func(*args, **(kwargs or {}))


class Kernel:
    """One of ours: counted, and its results are ones."""

    arg_names = ()  # compiled for nothing

    def __init__(self, seen: Launches) -> None:
        self._seen = seen

    def __getitem__(self, _: tuple[int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, weight: Tensor, *others: Any, **_: Any) -> None:
        self._seen.count += 1
        with _disable_current_modes():
            for other in others:
                if isinstance(other, Tensor) and other.data_ptr() != weight.data_ptr():
                    other.fill_(1)


@contextlib.contextmanager
def with_kernels(seen: Launches) -> Iterator[None]:
    """Whatever is a matrix goes to Triton."""
    with contextlib.ExitStack() as stack:
        for name in _KERNELS:
            stack.enter_context(mock.patch.object(triton_kernels, name, Kernel(seen)))
        for name, value in {
            "_on_gpu": lambda _: fused,
            "_is_on_gpu": lambda weight: weight.dim() == 2 and weight.numel() > 0,
        }.items():
            stack.enter_context(mock.patch.object(quick, name, value))
        yield


def count(checkpoint: Path, scheme: str, weights: dict[str, Tensor], *, kernels: bool) -> int:
    """Of the second of two reloads: the first one plans."""
    live = models.load(HOPPER, models.configured(checkpoint, scheme))
    seen = Launches()
    with pretending(HOPPER), with_kernels(seen) if kernels else contextlib.nullcontext():
        live.load_weights(weights.items())
        seen.count = 0
        with seen:
            live.load_weights(weights.items())
    return seen.count


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.layouts.launches")
    parser.add_argument("--experts", action="store_true", help="of a tiny mixture of experts")
    parser.add_argument("--layers", type=int, default=1, help="as wide as Qwen2.5-0.5B's")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        if chosen.experts:
            path = Policies(Path(folder), "qwen3-moe").bf16("a")
        else:
            sizes = {"hidden": 896, "intermediate": 4864, "layers": chosen.layers}
            tiny_models.make("qwen2", 0, path, **sizes)
        weights = tiny_models.tensors(path)
        size = sum(tensor.numel() for tensor in weights.values())
        print(f"{len(weights)} tensors, {size / 1e6:.0f} M weights\n")
        print("| scheme | launches | by torch, in chunks |\n| :-- | --: | --: |")
        for scheme in _SCHEMES:
            ours, torchs = (count(path, scheme, weights, kernels=k) for k in (True, False))
            print(f"| {scheme} | {ours:,} | {torchs:,} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

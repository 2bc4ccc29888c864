"""What a reload should cost on an H100: arithmetic, not a measurement.

    python -m benchmarks.expected [--out benchmarks/out]

Bytes of each part of a reload, divided by the bandwidth of what moves them. No GPU is used.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import markdown, save_text

HBM = 3.0e12  # bytes/s: 90 % of the data sheet's 3.35 TB/s, which is what copies reach
PCIE = 50e9  # PCIe 5 x16
LINKS = {"NVLink": 450e9, "PCIe 5": PCIE, "400 Gb/s": 45e9}
A_TENSOR = 10e-6  # seconds: `benchmarks.replay`, rounded up

QUANTIZE = 3  # bytes a weight: two read, one written
UNDO = 1
DIGEST = 1
TRANSFER = 2


@dataclass(frozen=True)
class Model:
    """A model, cut over some GPUs; every rank is sent all tensors."""

    name: str
    gpus: int
    weights: float
    tensors: int


MODELS = (
    Model("8B dense (Llama-3.1-8B)", 1, 8.0e9, 291),
    Model("32B dense (Qwen2.5-32B)", 2, 32.8e9, 771),
    Model("235B-A22B (Qwen3: 94 layers of 128 experts)", 8, 235e9, 36_945),
)

_TITLES = ("model", "GPUs", "tensors", "weights a GPU", "quantize into place", "digest")
_TITLES += ("plan and checks, 10 µs a tensor", "undo log over PCIe")


def cells(model: Model) -> list[str]:
    """One row of the table."""
    weights = model.weights / model.gpus
    seconds = [
        QUANTIZE * weights / HBM,
        DIGEST * weights / HBM,
        A_TENSOR * model.tensors,
        UNDO * weights / PCIE,
        *(TRANSFER * weights / link for link in LINKS.values()),
    ]
    told = [f"{part * 1e3:.1f} ms" if part < 1 else f"{part:.2f} s" for part in seconds]
    return [model.name, str(model.gpus), f"{model.tensors:,}", f"{weights / 1e9:.1f} G", *told]


def main(argv: list[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expected")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    out: Path = parser.parse_args(argv).out
    titles = (*_TITLES, *(f"transfer: {link}" for link in LINKS))
    table = markdown(titles, map(cells, MODELS))
    print(table)
    save_text(table, out / "expected.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

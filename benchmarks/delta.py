"""What changed, against everything: bytes on the wire and time, after real steps of AdamW.

    python -m benchmarks.delta [--schemes int8 fp8_channel] [--lr 1e-6 1e-5 1e-4] [--steps 3]

SmolLM2-135M, trained in float32 on windows of a text and pushed in bf16, as trainers do. After each
step (but the first, which warms up AdamW's averages): a bundle by `Sender.bundle`, applied by
`flashquant.apply_delta`; then the same weights once more, whole, by `flashquant.reload_weights`,
whose digest has to be the same. Times are the medians over the steps, in seconds; making codes
alone is `Sender.stream`.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms
from examples.demo import smollm2

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One step of one engine.

    Attributes:
        wire: bytes of the bundle / bytes of all weights in bf16.
        of_codes: of them, those of tensors that are sent as codes, and their scales.
        changed: of all codes, the part that changed.
        make: seconds to make the bundle.
        codes: seconds to make all codes, and nothing else.
        apply: seconds to apply it.
        reload: seconds of a whole reload of the same weights in bf16.
        undo: bytes of the undo log / those of the whole reload.

    """

    wire: float
    of_codes: float
    changed: float
    make: float
    codes: float
    apply: float
    reload: float
    undo: float


def main() -> int:
    """Print one line for a scheme and a learning rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=["int8", "fp8_channel"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=3)
    chosen = parser.parse_args()
    os.environ.update(arms.environment() | {"OMP_NUM_THREADS": str(os.cpu_count())})
    arms.enable_amx()
    path = smollm2.checkpoint(smollm2.default_cache_dir())
    engines = {scheme: arms.start(path, scheme) for scheme in chosen.schemes}
    print("scheme        lr      " + " ".join(f"{field.name:>9}" for field in fields(Row)))
    for lr in chosen.lr:
        rows: dict[str, list[Row]] = {scheme: [] for scheme in engines}
        for scheme, row in measured(path, engines, lr, chosen.steps):
            rows[scheme].append(row)
        for scheme, found in rows.items():
            middle = [median(getattr(r, field.name) for r in found) for field in fields(Row)]
            print(f"{scheme:13} {lr:<7g} " + " ".join(f"{value:9.4f}" for value in middle))
    return 0


def measured(
    path: Path, engines: dict[str, Any], lr: float, steps: int
) -> Iterator[tuple[str, Row]]:
    """Each step of each engine, all of the same training."""
    import flashquant
    from flashquant.sender import Sender

    senders = {
        scheme: Sender(flashquant.manifest(llm), delta=True) for scheme, llm in engines.items()
    }
    training = trained(path, lr)
    first = next(training)
    for scheme, llm in engines.items():
        flashquant.apply_delta(llm, senders[scheme].bundle(first))
    for _ in range(steps):
        weights = next(training)
        for scheme, llm in engines.items():
            yield scheme, one_step(llm, senders[scheme], weights)
    gc.collect()


def one_step(llm: Any, sender: Any, weights: Weights) -> Row:
    import flashquant

    codes, _ = timed(lambda: [None for _ in sender.stream(weights)])
    make, delta = timed(lambda: sender.bundle(weights))
    apply, by_delta = timed(lambda: flashquant.apply_delta(llm, delta))
    reload, whole = timed(lambda: flashquant.reload_weights(llm, weights))
    if by_delta.digest != whole.digest:
        raise AssertionError("a delta and a whole reload of the same weights differ")
    specs, said = sender.manifest.tensors, delta.header.tensors
    coded = {name for name, spec in specs.items() if spec.scales}
    scaled = {spec.scales for spec in specs.values() if spec.scales}
    parts = {name: part.nbytes for name, part in delta.parts.items()}
    everything = sum(tensor.nbytes for tensor in weights.values())
    mine = (size for name, size in parts.items() if name.partition("#")[0] in coded | scaled)
    return Row(
        wire=delta.nbytes / everything,
        of_codes=sum(mine) / everything,
        changed=sum(said[name].changed for name in coded & said.keys())
        / sum(torch.Size(specs[name].shape).numel() for name in coded),
        make=make,
        codes=codes,
        apply=apply,
        reload=reload,
        undo=by_delta.undo_bytes / whole.undo_bytes,
    )


def trained(path: Path, lr: float) -> Iterator[Weights]:
    """The policy after two steps of AdamW, three, and so on; float32, rounded to bf16."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    prose = Path(smollm2.__file__).with_name("prose.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(path)(prose).input_ids)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    dice = torch.Generator().manual_seed(0)
    for step in range(1 << 30):
        starts = torch.randint(len(tokens) - 128, (4,), generator=dice)
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            yield {n: w.detach().bfloat16() for n, w in model.named_parameters()}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


if __name__ == "__main__":
    raise SystemExit(main())

"""What changed, against everything: bytes on the wire and time, after real steps of AdamW.

    python -m benchmarks.delta [--schemes int8 fp8_channel fp8_vllm] [--lr 1e-6 1e-5 1e-4]
                               [--steps 3] [--out FOLDER]
    python -m benchmarks.delta --growth qwen2.5-0.5b [--schemes fp8_channel]

SmolLM2-135M, trained in float32 on windows of a text and pushed in bf16, as trainers do. After each
step (but the first, which warms up AdamW's averages): a bundle by `Sender.bundle`, applied by
`flashquant.apply_delta`; then the same weights, whole, into another engine of the scheme by
`flashquant.reload_weights`, whose digest has to be the same. Times are the medians over the steps,
in seconds of the CPU, on one thread, so that neighbours do not show; making codes alone is
`Sender.stream`. `--growth` takes shapes of `benchmarks.shapes`, random weights, and a step that
changes 1 % of them a little. `--out` writes a table, and a picture.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms, results, shapes
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
    parser.add_argument("--schemes", nargs="+", default=["int8", "fp8_channel", "fp8_vllm"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--growth", choices=sorted(shapes.CONFIGS))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    os.environ.update(arms.environment())
    arms.enable_amx()
    found: list[tuple[str, float, Row]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.growth:
            path = Path(scratch)
            shapes.write(shapes.CONFIGS[chosen.growth], path)
            trainings = {0.0: lambda: drawn(path)}
        else:
            path = smollm2.checkpoint(smollm2.default_cache_dir())
            trainings = {lr: functools.partial(trained, path, lr) for lr in chosen.lr}
        engines = {s: (arms.start(path, s), arms.start(path, s)) for s in chosen.schemes}
        torch.set_num_threads(1)
        for lr, training in trainings.items():
            rows: dict[str, list[Row]] = {scheme: [] for scheme in engines}
            for scheme, row in measured(training(), engines, chosen.steps):
                rows[scheme].append(row)
            found += [(scheme, lr, middle(steps)) for scheme, steps in rows.items()]
    print(table(found))
    if chosen.out:
        results.save_text(table(found), chosen.out / "delta.md")
        draw(found, chosen.out / "delta.png")
    return 0


def middle(rows: list[Row]) -> Row:
    """The median of each column."""
    return Row(*(median(getattr(row, field.name) for row in rows) for field in fields(Row)))


def table(found: list[tuple[str, float, Row]]) -> str:
    """In Markdown."""
    titles = ["scheme", "lr", *(field.name for field in fields(Row))]
    lines = [[s, f"{lr:g}", *(f"{value:.4f}" for value in astuple(row))] for s, lr, row in found]
    return arms.table(titles, lines)


def draw(found: list[tuple[str, float, Row]], path: Path) -> None:
    """Bytes and times against those of a whole reload, a group of bars a scheme and rate."""
    columns = {
        "bytes on the wire, of bf16": [row.wire for *_, row in found],
        "time to apply, of a reload": [row.apply / row.reload for *_, row in found],
        "undo log, of a reload's": [row.undo for *_, row in found],
    }
    with results.save_plot(path, figsize=(9, 4)) as axes:
        for at, (label, values) in enumerate(columns.items()):
            places = [place + 0.27 * at for place in range(len(found))]
            bars = axes.bar(places, values, 0.25, label=label)
            axes.bar_label(bars, [f"{100 * value:.3g}" for value in values], fontsize=7)
        names = [f"{scheme}\n{lr:g}" for scheme, lr, _ in found]
        axes.set_xticks([place + 0.27 for place in range(len(found))], names, fontsize=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_title("What a step's delta costs (SmolLM2-135M, AdamW; by scheme and rate)")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def measured(
    training: Iterator[Weights], engines: dict[str, tuple[Any, Any]], steps: int
) -> Iterator[tuple[str, Row]]:
    """Each step of each scheme, all of the same training."""
    import flashquant
    from flashquant.sender import Sender

    senders = {s: Sender(flashquant.manifest(llm), delta=True) for s, (llm, _) in engines.items()}
    first = next(training)
    for scheme, (llm, other) in engines.items():
        flashquant.apply_delta(llm, senders[scheme].bundle(first))
        flashquant.reload_weights(other, first)
    for _ in range(steps):
        weights = next(training)
        for scheme, pair in engines.items():
            yield scheme, one_step(*pair, senders[scheme], weights)
    gc.collect()


def one_step(llm: Any, other: Any, sender: Any, weights: Weights) -> Row:
    import flashquant

    codes, _ = timed(lambda: [None for _ in sender.stream(weights)])
    make, delta = timed(lambda: sender.bundle(weights))
    apply, by_delta = timed(lambda: flashquant.apply_delta(llm, delta))
    reload, whole = timed(lambda: flashquant.reload_weights(other, weights))
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
        / max(1, sum(torch.Size(specs[name].shape).numel() for name in coded)),
        make=make,
        codes=codes,
        apply=apply,
        reload=reload,
        undo=by_delta.undo_bytes / whole.undo_bytes,
    )


def drawn(path: Path) -> Iterator[Weights]:
    """Random weights, of which 1 % are a little larger each step."""
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    for step in range(1 << 30):
        dice = torch.Generator().manual_seed(step)
        for tensor in weights.values():
            flat = tensor.view(-1)
            here = torch.randint(len(flat), (max(1, len(flat) // 100),), generator=dice)
            flat[here] *= 1.01
        yield weights


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
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


if __name__ == "__main__":
    raise SystemExit(main())

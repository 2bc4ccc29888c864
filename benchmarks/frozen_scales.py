"""Frozen or refreshed weight scales: how far from the trainer does calibrated int8 drift?

SmolLM2-135M, its real weights, smoothed by SmoothQuant (strength 0.8, maxima of one window of
prose). For each policy the trainer may have moved to: log-probs of the policy itself, and of
the same forward pass with int8 codes and per-token int8 activations, on prose that was not
calibrated on. Everything is simulated in float32, so that only the scales differ.

Clipped is what a frozen scale cannot hold even as 128; the error of the weights is
|codes * scale - smoothed| / |smoothed| over all layers.

    python -m benchmarks.frozen_scales [--steps 10] [--tokens 1024]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from examples.demo import smollm2
from examples.demo.trainer import Trainer
from flashquant.profiles import Entry
from flashquant.schemes import int8_channel
from flashquant.schemes.smoothed import int8_frozen, int8_refreshed, scaled

Weights = dict[str, Tensor]
_STRENGTH = 0.8


def main() -> int:
    """Print one row a policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of real training, at 1e-5")
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    prose = Path(smollm2.__file__).with_name("prose.txt").read_text(encoding="utf-8")
    path = smollm2.checkpoint(smollm2.default_cache_dir())
    trainer = Trainer(path, prose)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = trainer.tokenize(prose)
    asked = torch.tensor([tokens[512 : 512 + chosen.tokens]])
    start = {name: weight.clone() for name, weight in trainer.named_tensors()}
    entries, weight_scales = calibrate(model, start, torch.tensor([tokens[:512]]))
    say = sys.stdout.write
    say("| | | error of the weights | | mean abs. change of log-probs | | |\n")
    say("|---|--:|--:|--:|--:|--:|--:|\n")
    say("| the trainer's weights | clipped | frozen | refreshed | plain | frozen | refreshed |\n")
    for what, weights in policies(start, trainer, chosen.steps):
        exact = logprobs(model, weights, asked)
        changes, off = [], []
        for store in (plain, frozen, refreshed):
            served = stored(weights, entries, weight_scales, store)
            off.append(error(served, weights, entries, weight_scales))
            with int8_activations(model, entries):
                changes.append((logprobs(model, served, asked) - exact).abs().mean().item())
        row = [f"{clipped(weights, entries):.4%}", *(f"{e:.3%}" for e in off[1:])]
        say(f"| {what} | {' | '.join([*row, *(f'{c:.4f}' for c in changes)])} |\n")
        sys.stdout.flush()
    return 0


def policies(start: Weights, trainer: Trainer, steps: int) -> Iterator[tuple[str, Weights]]:
    """Where the trainer may be: on the way, and further than it should be."""
    yield "as calibrated", start
    for _ in range(steps):
        trainer.step()
    yield f"{steps} real steps at 1e-5", dict(trainer.named_tensors())
    dice = torch.Generator().manual_seed(0)
    for drift in (0.01, 0.05, 0.1, 0.3):
        moved = {
            name: (w * (1 + drift * torch.randn(w.shape, generator=dice))).bfloat16()
            if name.endswith("_proj.weight")
            else w
            for name, w in start.items()
        }
        yield f"each weight moved by {drift:.0%}", moved
    for drift in (0.05, 0.1, 0.3):
        grown = {
            name: (w * (1 + drift)).bfloat16() if name.endswith("_proj.weight") else w
            for name, w in start.items()
        }
        yield f"every layer grown by {drift:.0%}", grown


def calibrate(
    model: LlamaForCausalLM, weights: Weights, tokens: Tensor
) -> tuple[dict[str, Entry], Weights]:
    """The exact profile of a SmoothQuant checkpoint, and its weight scales."""
    peaks: Weights = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peaks[name] = inputs[0].abs().amax(dim=(0, 1))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()

    def strength(consumers: list[str]) -> Tensor:
        peak = peaks[consumers[0]].clamp_min(1e-5) ** _STRENGTH
        columns = torch.stack([weights[f"{c}.weight"].float().abs().amax(0) for c in consumers])
        return peak / columns.amax(0).clamp_min(1e-5) ** (1 - _STRENGTH)

    entries: dict[str, Entry] = {}
    scales: Weights = {}

    def note(layer: str, columns: Tensor | None, rows: Tensor | None) -> None:
        name = f"{layer}.weight"
        smoothed = scaled(weights[name], columns, None if rows is None else 1 / rows)
        scales[name] = smoothed.abs().amax(1, keepdim=True) / 127.5
        per_row = 1 / scales[name].flatten()
        entries[name] = Entry(torch.int8, columns, per_row if rows is None else per_row / rows)

    for index in range(model.config.num_hidden_layers):
        at = f"model.layers.{index}"
        qkv = [f"{at}.self_attn.{x}_proj" for x in "qkv"]
        gate, up, down = (f"{at}.mlp.{x}_proj" for x in ("gate", "up", "down"))
        for norm, layers in (("input", qkv), ("post_attention", [gate, up])):
            s = strength(layers)
            entries[f"{at}.{norm}_layernorm.weight"] = Entry(torch.bfloat16, 1 / s, None)
            for layer in layers:
                note(layer, s, strength([down]) if layer == up else None)
        note(f"{at}.self_attn.o_proj", None, None)
        note(down, strength([down]), None)
    return entries, scales


Store = Callable[[Tensor, Entry, Tensor], tuple[Tensor, Tensor]]


def plain(weight: Tensor, entry: Entry, scale: Tensor) -> tuple[Tensor, Tensor]:
    return int8_channel(weight)


def frozen(weight: Tensor, entry: Entry, scale: Tensor) -> tuple[Tensor, Tensor]:
    return int8_frozen(weight, entry.input_scale, entry.output_scale).codes, scale


def refreshed(weight: Tensor, entry: Entry, scale: Tensor) -> tuple[Tensor, Tensor]:
    return int8_refreshed(weight, entry.input_scale, entry.output_scale, scale)


def stored(weights: Weights, entries: dict[str, Entry], scales: Weights, store: Store) -> Weights:
    """The weights as the kernels multiply them."""
    served = {name: weight.float() for name, weight in weights.items()}
    for name, entry in entries.items():
        if entry.kind == torch.int8:
            codes, by = store(weights[name], entry, scales[name])
            served[name] = codes.float() * by
        elif store is not plain:
            served[name] = scaled(weights[name], entry.input_scale, None).bfloat16().float()
    return served


def error(served: Weights, weights: Weights, entries: dict[str, Entry], scales: Weights) -> float:
    """How far the codes are from the smoothed weights, relative to them."""
    off = size = 0.0
    for name, counted in _counted(weights, entries):
        smoothed = counted * scales[name]
        off += float((served[name] - smoothed).square().sum())
        size += float(smoothed.square().sum())
    return (off / size) ** 0.5


def clipped(weights: Weights, entries: dict[str, Entry]) -> float:
    """The part of all weights that frozen scales cannot hold."""
    outside = total = 0
    for _, counted in _counted(weights, entries):
        outside += int((counted.abs() > 128.5).sum())
        total += counted.numel()
    return outside / total


def _counted(weights: Weights, entries: dict[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Each smoothed weight, counted in the scales of the checkpoint."""
    for name, entry in entries.items():
        if entry.kind == torch.int8:
            yield name, scaled(weights[name], entry.input_scale, entry.output_scale)


@contextmanager
def int8_activations(model: LlamaForCausalLM, entries: dict[str, Entry]) -> Iterator[None]:
    """Quantize what goes into each quantized layer, a scale a token, as W8A8 kernels do."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = inputs[0].abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return ((inputs[0] / scale).round() * scale,)

    hooks = [
        module.register_forward_pre_hook(hook)
        for name, module in model.named_modules()
        if f"{name}.weight" in entries and isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def logprobs(model: LlamaForCausalLM, weights: Weights, tokens: Tensor) -> Tensor:
    """Of each token but the first, given those before it, under these weights."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    said = torch.cat(
        [
            model(input_ids=window).logits[0, :-1].log_softmax(-1).gather(1, window[0, 1:, None])
            for window in tokens.split(512, dim=1)
        ]
    )
    return said.squeeze(1)


if __name__ == "__main__":
    raise SystemExit(main())

"""How close to bf16 does each scheme serve? Teacher-forced, on the real engine, real weights.

    python -m benchmarks.fidelity [--only NAME...] [--tokens 2048] [--json FILE]

SmolLM2-135M. Every arm is a vLLM engine in this process, pushed the same bf16 weights by
`flashquant.reload_weights`, and asked for the logits of each token of a held-out text; all are
compared with those of a bf16 engine that was pushed the same. Profiles are calibrated on another
part of the text. FlashRL's comes from its own published arithmetic on a SmoothQuant twin of
strength 0.8, with scales of absmax / 127.5 and rounding to nearest (llm-compressor would add GPTQ).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

import flashquant
from benchmarks import arms
from examples.demo import smollm2
from flashquant.config.schemes import W8A8
from flashquant.profiles import save_profile
from flashquant.profiles.making import (
    Checkpoint,
    Factors,
    factors_of_twins,
    profile_of,
    write_w8a8,
)
from flashquant.profiles.making.discovery import find_sites, linear_layers
from flashquant.profiles.making.groups import alone, choose_for_groups
from flashquant.profiles.making.search import choose, factors_of, watch
from flashquant.profiles.making.sensitivity import sensitivity
from flashquant.schemes import scaled
from tools.models import flashrl

Weights = dict[str, Tensor]
KVScales = Mapping[str, tuple[float, float]]
LENGTH = 512
BUDGETS = (0.006, 0.003)  # nats a token, for layers that stay in bf16
_STRENGTH = 0.8  # llm-compressor's


@dataclass(frozen=True)
class Gap:
    """How far an engine is from the bf16 one, over all tokens of the text.

    Attributes:
        change: mean |log p(token) - log p_bf16(token)|, nats.
        kl: mean KL(engine || bf16) of the next-token distribution, nats.
        top1: how often both think the same token most likely.
        clipped: of all weights, the part that frozen scales have clipped.

    """

    change: float
    kl: float
    top1: float
    clipped: float | None = None


def main() -> int:
    """Print one table a policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="arms, beside bf16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="of real fine-tuning at 1e-5")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    ours = {"OMP_NUM_THREADS": str(os.cpu_count()), "FLASHQUANT_EMULATE": "1"}
    os.environ.update(arms.environment() | ours)
    arms.enable_amx()
    results: dict[str, dict[str, Gap]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = smollm2.checkpoint(smollm2.default_cache_dir())
        prose = Path(smollm2.__file__).with_name("prose.txt").read_text(encoding="utf-8")
        tokens = AutoTokenizer.from_pretrained(path)(prose).input_ids
        asked, known = tokens[-chosen.tokens :], tokens[: -chosen.tokens]
        engines = start_engines(path, known, Path(scratch), chosen.only)
        for policy, weights in policies(path, known, chosen.steps):
            results[policy] = compare(engines, weights, asked)
            say(policy, results[policy])
    if chosen.json:
        plain = {p: {arm: asdict(gap) for arm, gap in row.items()} for p, row in results.items()}
        chosen.json.write_text(json.dumps(plain, indent=2) + "\n")
    return 0


def policies(path: Path, known: list[int], steps: int) -> Iterator[tuple[str, Weights]]:
    """Where the trainer may be: at the start, a little on, and further than it should be."""
    start = dict(Checkpoint(path))
    yield "as calibrated", start
    yield f"after {steps} steps of fine-tuning at 1e-5", fine_tuned(path, known, steps)
    for drift in (0.05, 0.1, 0.3):
        grown = {n: (w * (1 + drift)).bfloat16() if _drifts(n) else w for n, w in start.items()}
        yield f"each layer grown by {drift:.0%}", grown
    dice = torch.Generator().manual_seed(0)
    for drift in (0.05, 0.1, 0.3):
        moved = {
            n: (w * (1 + drift * torch.randn(w.shape, generator=dice))).bfloat16()
            if _drifts(n)
            else w
            for n, w in start.items()
        }
        yield f"each weight moved by {drift:.0%}", moved


def fine_tuned(path: Path, known: list[int], steps: int, rate: float = 1e-5) -> Weights:
    """The policy after some steps of AdamW on windows of the text; float32, rounded at the end."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    tokens, dice = torch.tensor(known), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 128, (4,), generator=dice)
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}


def _drifts(name: str) -> bool:
    return name.endswith("_proj.weight")


def start_engines(
    path: Path, known: list[int], scratch: Path, only: list[str] | None
) -> dict[str, Any]:
    """Each arm's engine, by its name in the table."""
    source = Checkpoint(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    windows = [torch.tensor([known[i : i + LENGTH]]) for i in range(0, len(known) - 99, LENGTH)]
    twin = smoothquant(source, model, windows, scratch / "twin")
    torch.save(flashrl.make_profile(path, twin), scratch / "flashrl.pt")
    by_twin, scales = factors_of_twins(source, Checkpoint(twin))
    save_profile(profile_of(by_twin, source.items(), scales, "a"), scratch / "a.safetensors")
    layers = [f"{name}.weight" for name in linear_layers(model)]
    sites = find_sites(model, windows[0][:, :48])
    seen = watch(model, sites, windows)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        own = factors_of([choose(site, seen[site], parameters) for site in sites], parameters)
    made = profile_of(own, source.items(), dict.fromkeys(layers), "b")
    save_profile(made, scratch / "b.safetensors")
    ours = write_w8a8(source, made, scratch / "b")

    def entry(model: Path, profile: str, scales: str) -> tuple[Path, str]:
        file = scratch / f"{profile}-{scales}.yaml"
        where = str(scratch / profile)
        return model, flashrl.config(
            file, fn="int8", model=str(model), profile=where, scales=scales
        )

    made_of = {
        "int8, no profile": (path, "int8"),
        "int8, FlashRL's profile": entry(twin, "flashrl.pt", "frozen"),
        "int8, make (a), frozen": entry(twin, "a.safetensors", "frozen"),
        "int8, make (a), refreshed": entry(twin, "a.safetensors", "refreshed"),
        "int8, make (b), frozen": entry(ours, "b.safetensors", "frozen"),
        "int8, make (b), refreshed": entry(ours, "b.safetensors", "refreshed"),
        "int8, make (b), down_proj kept": (path, keeping(scratch, ["*.down_proj"])),
        "int8, make (b), 2 blocks of each end kept": (
            path,
            keeping(scratch, [{"first": 2}, {"last": 2}]),
        ),
        "fp8_channel": (path, "fp8_channel"),
        "fp8_tensor": (path, "fp8_tensor"),
        "fp8_vllm": (path, "fp8_vllm"),
        "mxfp8": (path, "mxfp8"),
        "nvfp4": (path, "nvfp4"),
        "int4_g32": (path, "int4_g32"),
        "int4_g32, profile": (path, in_groups(scratch, source, model, windows)),
        "int4_channel": (path, "int4_channel"),
    }
    found = None
    for budget in BUDGETS:
        name = f"int8, make (b), kept for {budget:g}"
        if only is None or name in only:
            found = sensitivity(model, windows, "int8", budget, profile=made, known=found)
            share = f"{len(found.keep)} of {len(layers)} layers, {found.kept_part:.1%} of weights"
            nats = f"{found.whole:.4f} to {found.left:.4f} nats by its own arithmetic"
            print(f"{name}: {share}; {nats}\n", flush=True)
            made_of[name] = (path, keeping(scratch, found.keep))
    del model, parameters, seen
    gc.collect()
    wanted = {name: how for name, how in made_of.items() if only is None or name in only}
    return {name: start(*how) for name, how in {"bf16": (path, "bf16"), **wanted}.items()}


def keeping(scratch: Path, keep: list[Any]) -> str:
    """A configuration of the bf16 checkpoint through profile (b), with some layers in bf16."""
    profile = str(scratch / "b.safetensors")
    file = scratch / f"keep-{len(list(scratch.glob('keep-*')))}.yaml"
    file.write_text(json.dumps({"configs": [{"fn": "int8", "profile": profile, "keep": keep}]}))
    return str(file)


def in_groups(scratch: Path, source: Checkpoint, model: nn.Module, windows: list[Tensor]) -> str:
    """A configuration of the bf16 checkpoint in int4, through a profile of its own."""
    layers = [f"{name}.weight" for name in linear_layers(model)]
    sites = find_sites(model, windows[0][:, :48])
    sites += alone(sites, layers)
    seen, parameters = watch(model, sites, windows), dict(model.named_parameters())
    with torch.no_grad():
        found = [choose_for_groups(site, seen.pop(site), parameters, 32) for site in sites]
    held = {name: hundredths for _, of_site in found for name, hundredths in of_site.items()}
    factors = factors_of([choice for choice, _ in found], parameters)
    kinds = dict.fromkeys(layers)
    made = profile_of(factors, source.items(), kinds, "g32", scheme="int4_g32", held=held)
    save_profile(made, scratch / "g32.safetensors")
    file = scratch / "g32.yaml"
    entry = {"fn": "int4_g32", "profile": "g32.safetensors"}
    file.write_text(json.dumps({"configs": [entry]}))
    return str(file)


def smoothquant(source: Checkpoint, model: nn.Module, windows: list[Tensor], folder: Path) -> Path:
    """A W8A8 checkpoint as llm-compressor's SmoothQuant makes it, but for GPTQ."""
    sites = find_sites(model, windows[0][:, :48])
    seen = watch(model, sites, windows)
    parameters = dict(model.named_parameters())
    factors = Factors()
    with torch.no_grad():
        for site in sites:
            readers = [parameters[name].abs().amax(0) for name in site.consumers]
            columns = torch.stack(readers).amax(0)
            by = seen[site].peaks ** _STRENGTH / columns ** (1 - _STRENGTH)
            lengths = {p.name: len(parameters[p.name]) for p in site.producers}
            factors.smooth(site, by.clamp_min(1e-5), lengths)
    layers = {f"{name}.weight" for name in linear_layers(model)}
    stored: Weights = {}
    for name, weight in source.items():
        if name in layers:
            smoothed = scaled(weight, factors.columns.get(name), factors.rows.get(name))
            scale = smoothed.abs().amax(1, keepdim=True) / 127.5
            stored[name] = (smoothed / scale).round().clamp(-128, 127).to(torch.int8)
            stored[f"{name}_scale"] = scale
        else:
            stored[name] = scaled(weight, factors.rows.get(name), None).to(weight.dtype)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.folder.glob("*.json"):
        shutil.copy(file, folder)
    config = {**source.config, "quantization_config": dict(W8A8)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(checkpoint: Path, config: str) -> Any:
    from vllm import LLM

    flashquant.patch()
    with mock.patch.dict(os.environ, FLASHRL_CONFIG=config):
        return LLM(
            str(checkpoint),
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            max_model_len=LENGTH + 8,
            max_num_batched_tokens=2 * LENGTH,
            dtype="bfloat16",
            enable_prefix_caching=False,
        )


def compare(
    engines: Mapping[str, Any],
    weights: Weights,
    asked: list[int],
    kv_scales: Mapping[str, KVScales] = MappingProxyType({}),
) -> dict[str, Gap]:
    """Push one policy to all, and compare what each thinks of the text with bf16.

    Args:
        engines: by arm; one is `bf16`.
        weights: to be pushed to all of them.
        asked: the tokens of the text.
        kv_scales: pushed with the weights, by arm.

    """
    reports = {
        arm: flashquant.reload_weights(llm, weights, kv_scales=kv_scales.get(arm))
        for arm, llm in engines.items()
    }
    found = token_by_token(engines, asked)
    return {arm: Gap(*each.mean(1).tolist(), reports[arm].clipped) for arm, each in found.items()}


def token_by_token(engines: Mapping[str, Any], asked: list[int]) -> dict[str, Tensor]:
    """`[3, tokens]` float64 of each arm: the three that `Gap` has the means of."""
    found: dict[str, list[Tensor]] = {arm: [] for arm in engines}
    for window in (asked[i : i + LENGTH] for i in range(0, len(asked), LENGTH)):
        target = torch.tensor(window[1:]).unsqueeze(1)
        exact = log_probs(engines["bf16"], window)
        for arm, llm in engines.items():
            said = log_probs(llm, window)
            change = (said.gather(1, target) - exact.gather(1, target)).abs().squeeze(1)
            kl = (said.exp() * (said - exact)).sum(1)
            found[arm].append(torch.stack([change, kl, said.argmax(1) == exact.argmax(1)]).double())
    return {arm: torch.cat(each, 1) for arm, each in found.items()}


def log_probs(llm: Any, window: list[int]) -> Tensor:
    """`[len - 1, vocabulary]` float32: of every next token, as the engine's head computes them."""
    from vllm import SamplingParams

    model = llm.apply_model(lambda model: model)[0]
    held: list[Tensor] = []

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = type(model).compute_logits(model, *args, **kwargs)
        held.append(logits.float())
        return logits

    with mock.patch.object(model, "compute_logits", compute_logits):
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        llm.generate([{"prompt_token_ids": window}], sampling, use_tqdm=False)
    (logits,) = (rows for rows in held if len(rows) >= len(window) - 1)
    return logits[: len(window) - 1].log_softmax(-1)


def say(policy: str, gaps: Mapping[str, Gap]) -> None:
    """The table of one policy, in markdown."""
    rows = [
        (
            arm,
            f"{gap.change:.4f}",
            f"{gap.kl:.5f}",
            f"{gap.top1:.1%}",
            "" if gap.clipped is None else f"{gap.clipped:.3%}",
        )
        for arm, gap in gaps.items()
        if arm != "bf16"
    ]
    titles = (policy, "mean abs. change of log-prob", "KL per token", "same top token", "clipped")
    sys.stdout.write(arms.table(titles, rows) + "\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())

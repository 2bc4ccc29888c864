"""Is 8 bit faster at generating, and after how many tokens has its sync paid for itself?

    python -m benchmarks.rollout [--model smollm2 qwen2.5-0.5b] [--scheme int8 ...]
                                 [--batch 1 8 32] [--prompt 8] [--tokens 48] [--seconds 10]
                                 [--rounds 3] [--cpu-time] [--out benchmarks/out]

`bf16, fp8 cache` has weights in bf16 and a KV cache in fp8; `cut off` is the same with vLLM's own
store, which does not round: the difference of the two is what rounding costs.

Engines of all schemes live in one process and take turns, batch size by batch size, round after
round; medians. Against bf16, each round is compared with bf16's own turn in it, for which the
machine was nearly the same; in brackets, the bounds of the middle half of these ratios. Counted is
what comes after the first token of each prompt, and nobody stops early: a turn ends when every
request has its tokens, or when the engine's seconds for this batch size, shared by its rounds, are
over. So an engine that is twenty times slower makes fewer tokens. On a machine that others use,
`--cpu-time` with OMP_NUM_THREADS=1 counts the seconds that this process computed.

The break-even line: a sync into 8 bit that takes longer than one into bf16 owes the difference,
each token that comes faster pays some of it back. Where 8 bit is not faster, it never does, and
the table says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch

from benchmarks import environment, models
from benchmarks.results import (
    described,
    earlier,
    machine,
    markdown,
    milliseconds,
    save_json,
    save_plot,
    save_text,
)


@contextmanager
def _cutting_off() -> Iterator[None]:
    """vLLM's own store of keys and values, without what flashquant puts around it."""
    from vllm import _custom_ops

    name = "cpu_attn_reshape_and_cache"
    with mock.patch.object(_custom_ops, name, getattr(_custom_ops, name).__wrapped__):
        yield


# Beside schemes: (scheme, dtype of the cache, what is so while it generates).
_CACHES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "bf16, fp8 cache": ("bf16", "fp8", nullcontext),
    "bf16, fp8 cache, cut off": ("bf16", "fp8", _cutting_off),
}
Clock = Callable[[], float]
SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
SERVED = (*SCHEMES, "fp8_tensor", "int4", "int4_g32", "int4_channel", *_CACHES)


@dataclass(frozen=True)
class Rate:
    """One engine at one batch size.

    Attributes:
        scheme: of `SERVED`.
        tokens: new ones in each round, of all requests together, after the first of each.
        seconds: what they took.
        sync: seconds that a whole reload of this engine takes, median.

    """

    model: str
    scheme: str
    batch: int
    tokens: list[int]
    seconds: list[float]
    sync: float

    @property
    def per_second(self) -> float:
        return median(self.each)

    @property
    def each(self) -> list[float]:
        """Tokens a second, round by round."""
        return [new / took for new, took in zip(self.tokens, self.seconds, strict=True)]

    def of(self, other: Rate) -> list[float]:
        """How much faster than another engine in the same round, least first."""
        return sorted(mine / its for mine, its in zip(self.each, other.each, strict=True))


def measure(
    model: str,
    schemes: Sequence[str],
    batches: Sequence[int],
    *,
    prompt: int,
    tokens: int,
    seconds: float,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> list[Rate]:
    """All these schemes of one model.

    Args:
        model: one of `models.NAMES`.
        schemes: bf16 and those that are compared with it.
        batches: how many requests at once.
        prompt: tokens of each request's.
        tokens: the most that a request makes in a round.
        seconds: how long an engine may take for all rounds of a batch size.
        rounds: how often each takes its turn, after one that does not count.
        clock: by which tokens are counted; `seconds` are those on the wall.

    """
    import flashquant
    from flashquant.patches.diagnostics import bench

    flashquant.patch()
    path = models.checkpoint(model)
    room = {"max_model_len": prompt + tokens + 16, "kv_cache_memory_bytes": 512 << 20}
    how = {name: _CACHES.get(name, (name, "auto", nullcontext)) for name in schemes}
    engines = {
        name: bench.start(path, scheme, kv_cache_dtype=cache, **room)
        for name, (scheme, cache, _) in how.items()
    }
    syncs = {scheme: bench.whole(llm, atomic=True) for scheme, llm in engines.items()}
    timings = bench.take_turns(syncs, models.both_policies(path), rounds)
    took = {timing.name: timing.median for timing in timings}
    found: list[Rate] = []
    for batch in batches:
        rates = {scheme: Rate(model, scheme, batch, [], [], took[scheme]) for scheme in schemes}
        for llm in engines.values():
            generate(llm, batch, prompt, tokens=2)  # does not count
        for turn in range(rounds):
            for scheme, rate in rates.items():
                with how[scheme][2]():
                    new, spent = generate(
                        *(engines[scheme], batch, prompt, tokens, seconds / rounds),
                        seed=turn + 1,
                        clock=clock,
                    )
                rate.tokens.append(new)
                rate.seconds.append(spent)
        found += rates.values()
        print(table(list(rates.values())), flush=True)
    return found


def generate(
    llm: Any,
    batch: int,
    length: int,
    tokens: int,
    seconds: float = 0,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> tuple[int, float]:
    """One turn: how many tokens came after the first of each request, and in how many seconds.

    Other prompts each time, so that no cache helps. A step that has begun ends, so it may be a
    little more than the seconds, which begin after the prompts; one step is always made.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(
        max_tokens=1 + tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    dice = torch.Generator().manual_seed(seed)
    names = [f"{batch}-{seed}-{number}" for number in range(batch)]
    for name in names:
        prompt = torch.randint(1000, (length,), generator=dice).tolist()
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    have: dict[str, int] = {}
    while len(have) < batch:
        _step(engine, have)
    first, began, until = sum(have.values()), clock(), time.perf_counter() + seconds
    while engine.has_unfinished_requests():
        _step(engine, have)
        if time.perf_counter() > until:
            break
    took = clock() - began
    engine.abort_request(names)
    return sum(have.values()) - first, took


def _step(engine: Any, have: dict[str, int]) -> None:
    """Let each request have its next token."""
    for output in engine.step():
        have[output.request_id] = len(output.outputs[0].token_ids)


def break_even(rate: Rate, bf16: Rate) -> str:
    """After how many tokens a sync has paid for itself."""
    saved = 1 / bf16.per_second - 1 / rate.per_second
    owed = rate.sync - bf16.sync
    if rate is bf16:
        return ""
    if saved <= 0:
        return "never: not faster here"
    return "at once" if owed <= 0 else f"{owed / saved:,.0f} tokens"


def table(rates: Sequence[Rate]) -> str:
    """One row a scheme and batch size."""
    rows = []
    for rate in rates:
        (bf16,) = [
            other
            for other in rates
            if (other.model, other.batch, other.scheme) == (rate.model, rate.batch, "bf16")
        ]
        rows.append(
            (
                f"{rate.model}, {rate.scheme}, {rate.batch} at once",
                f"{rate.per_second:,.1f}",
                _compared(rate.of(bf16)),
                milliseconds(rate.sync),
                break_even(rate, bf16),
            )
        )
    return markdown(("engine", "tokens/s", "of bf16", "a sync", "has paid for itself after"), rows)


def _compared(ratios: list[float]) -> str:
    """The median of these, and the quarters beside it where they are not the same."""
    about = f"{median(ratios):.2f}x"
    if len(ratios) < 4 or ratios[0] == ratios[-1]:
        return about
    lower, _, upper = quantiles(ratios, n=4)
    return f"{about} ({lower:.2f} to {upper:.2f})"


def plot(rates: Sequence[Rate], path: Path) -> None:
    """Tokens a second over the batch size, of bf16; a line a scheme, a panel a model."""
    with save_plot(path, figsize=(7, 4)) as axes:
        styles = dict(zip(dict.fromkeys(r.model for r in rates), ("-", "--", ":"), strict=False))
        shades = (
            "#777777",
            "#cc6677",
            "#ddaa33",
            "#4477aa",
            "#228833",
            "#aa3377",
            "#66ccee",
            "#000",
        )
        colors = dict(zip(dict.fromkeys(r.scheme for r in rates), shades, strict=False))
        for model, style in styles.items():
            for scheme, color in colors.items():
                mine = [r for r in rates if (r.model, r.scheme) == (model, scheme)]
                if not mine:
                    continue
                axes.plot(
                    [rate.batch for rate in mine],
                    [rate.per_second for rate in mine],
                    style,
                    marker="o",
                    color=color,
                    label=f"{model}, {scheme}",
                )
        axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens a second")
        axes.set_xticks([], minor=True)  # a log scale would name 2, 3, 4 and 6 as well
        axes.set_xticks(sorted({r.batch for r in rates}), sorted({r.batch for r in rates}))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description="tokens a second of each scheme"
    )
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=["smollm2"])
    parser.add_argument("--scheme", nargs="+", choices=SERVED[1:], default=list(SCHEMES[1:]))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=8, help="tokens of each request's")
    parser.add_argument("--tokens", type=int, default=48, help="most a request in a round")
    parser.add_argument("--seconds", type=float, default=10, help="most an engine a batch size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="not the time on the wall")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    environment.prepare()
    facts = machine()
    print(described(facts), flush=True)
    file = arguments.out / "rollout.json"
    known = [Rate(**rate) for rate in earlier(file)]
    found = [rate for rate in known if rate.model not in arguments.model]
    for model in arguments.model:
        schemes = [SCHEMES[0], *arguments.scheme]
        found += measure(
            model,
            schemes,
            arguments.batch,
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            clock=time.process_time if arguments.cpu_time else time.perf_counter,
        )
    facts["threads"] = str(torch.get_num_threads())
    facts["seconds"] = "of CPU time" if arguments.cpu_time else "on the wall"
    save_text(f"{described(facts)}\n\n{table(found)}", arguments.out / "rollout.md")
    save_json(found, facts, file)
    plot(found, arguments.out / "rollout.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

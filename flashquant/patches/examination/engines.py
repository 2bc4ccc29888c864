"""One scheme: an engine of vLLM alone on B, and one of flashquant that goes from A to B.

Both stay alive until the process ends: vLLM tears its global state down with an engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams

from flashquant.patches import kernel_state, patch
from flashquant.patches.engine_args import ONLINE
from flashquant.patches.examination import policies
from flashquant.patches.examination.layouts import describe
from flashquant.patches.loading import session_of
from flashquant.report import ReloadReport
from flashquant.session import Session
from flashquant.verify import footprints

SCHEMES = ("bf16", "int8", *ONLINE)
_PROMPTS = [list(range(start, start + 40)) for start in (5, 8, 16, 205)]


@dataclass(frozen=True)
class Step:
    """What is done next, or what came of it.

    Attributes:
        name: of the step; the start of vLLM alone is `vllm`.
        verdict: `begun` before it, in case the process does not survive it.

    """

    name: str
    verdict: Literal["begun", "ok", "fails"]
    detail: str = ""


VLLM_ALONE = "vllm"
_alive: list[object] = []  # until the process ends, see above


def examine(scheme: str, folder: Path, *, compiled: bool) -> Iterator[Step]:
    """Start both engines in a scheme, push, compare, and push back.

    Args:
        scheme: one of `SCHEMES`.
        folder: where `policies.write` has written.
        compiled: with torch.compile and, on a GPU, CUDA graphs; else eager.

    """
    engines = _Engines(scheme, folder, compiled=compiled)
    _alive.append(engines)
    looks = {
        VLLM_ALONE: engines.start_vllm_alone,
        "start": engines.start,
        "bytes": engines.push_b,
        "addresses": engines.compare_addresses,
        "outputs": engines.compare_outputs,
        "back": engines.push_a,
    }
    for name, look in looks.items():
        yield Step(name, "begun")
        wrong, detail = look()
        yield Step(name, "fails" if wrong else "ok", wrong or detail)


class _Engines:
    """The two engines, and what is asked of them.

    Each look returns what is wrong, or nothing, and what it saw.
    """

    def __init__(self, scheme: str, folder: Path, *, compiled: bool) -> None:
        self._scheme, self._folder, self._compiled = scheme, folder, compiled
        self._fresh: Any = None
        self._live: Any = None
        self._session: Session

    def start_vllm_alone(self) -> tuple[str, str]:
        checkpoint = self._folder / ("b-int8" if self._scheme == "int8" else "b")
        self._fresh = _serve(checkpoint, self._compiled, quantization=ONLINE.get(self._scheme))
        self._said = outputs(self._fresh)
        return "", "serves the scheme"

    def start(self) -> tuple[str, str]:
        os.environ["FLASHRL_CONFIG"] = self._scheme
        try:
            self._live = _serve(self._folder / "a", self._compiled)
        finally:
            del os.environ["FLASHRL_CONFIG"]
        self._session = session_of(_model(self._live))
        self._at_first = self._session.digest()
        return "", describe(_model(self._live))

    def push_b(self) -> tuple[str, str]:
        outputs(self._live)  # what is captured or compiled has run with the old weights
        self._before = footprints(tensors(_model(self._live)).items())
        report = self._push("b")
        live, fresh = tensors(_model(self._live)), tensors(_model(self._fresh))
        different = [n for n in live.keys() | fresh.keys() if not _same(live.get(n), fresh.get(n))]
        size = sum(tensor.nbytes for tensor in fresh.values())
        wrong = f"{len(different)} of {len(fresh)} differ: {', '.join(sorted(different)[:3])}"
        right = f"{len(fresh)} tensors, {size:,} bytes, as vLLM alone loads them"
        return wrong if different else "", f"{right}; {report.seconds * 1000:.1f} ms"

    def compare_addresses(self) -> tuple[str, str]:
        now = footprints(tensors(_model(self._live)).items())
        moved = [name for name in now if now[name] != self._before.get(name)]
        wrong = f"{len(moved)} moved: {', '.join(moved[:3])}" if moved else ""
        return wrong, f"{len(now)} tensors are where they were"

    def compare_outputs(self) -> tuple[str, str]:
        if outputs(self._fresh) != self._said:
            return "", "not comparable: vLLM alone does not say the same thing twice here"
        graphs = self._live.llm_engine.vllm_config.compilation_config.cudagraph_mode
        how = f"{'compiled' if self._compiled else 'eager'}, CUDA graphs: {graphs.name}"
        wrong = "" if outputs(self._live) == self._said else "other tokens or log-probs than vLLM's"
        return wrong, f"every token and log-prob as vLLM alone ({how})"

    def push_a(self) -> tuple[str, str]:
        self._push("a")
        wrong = (
            "" if self._session.digest() == self._at_first else "A leaves other bytes than before"
        )
        return wrong, "pushing A again leaves what it began with"

    def _push(self, policy: str) -> ReloadReport:
        """As a trainer on the same device would."""
        device = next(_model(self._live).parameters()).device
        sent = policies.tensors(self._folder / policy).items()
        return self._session.reload({name: tensor.to(device) for name, tensor in sent})


def outputs(llm: Any) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of some prompts, and the log-probs of prompt and answer."""
    sampling = SamplingParams(
        max_tokens=16, temperature=0, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in _PROMPTS]
    said = []
    for answer in llm.generate(prompts, sampling, use_tqdm=False):
        output = answer.outputs[0]
        positions = [*answer.prompt_logprobs[1:], *output.logprobs]
        said.append((list(output.token_ids), [next(iter(p.values())).logprob for p in positions]))
    return said


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a kernel reads; the pointers of oneDNN handlers are not among them."""
    return {
        f"{name}.{path}": leaf
        for name, module in model.named_modules()
        if not name.endswith(".attn")  # the KV cache
        for path, leaf in kernel_state.leaves(module).items()
        if isinstance(leaf, Tensor)
    }


def _serve(checkpoint: Path, compiled: bool, **options: Any) -> Any:
    """A small engine in this process."""
    patch()
    # Others may be at work on the same GPU; what is served here is tiny.
    options |= {"gpu_memory_utilization": 0.05} if torch.cuda.is_available() else {}
    return LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=128,
        max_num_seqs=8,
        dtype="bfloat16",
        enable_prefix_caching=False,
        **{name: value for name, value in options.items() if value is not None},
    )


def _model(llm: Any) -> nn.Module:
    model: nn.Module = llm.apply_model(lambda model: model)[0]
    return model


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))

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
from vllm.v1.worker import workspace

from flashquant.config import env, schemes
from flashquant.config.schemes import COMPRESSED, ONLINE
from flashquant.patches import patch
from flashquant.patches.diagnostics.bench import room_for_others
from flashquant.patches.diagnostics.examination import policies
from flashquant.patches.diagnostics.examination.layouts import describe
from flashquant.patches.layers import leaves
from flashquant.patches.remote import reload_weights
from flashquant.patches.seams.emulation import is_emulated
from flashquant.patches.seams.loading import session_of
from flashquant.update import ReloadReport, Session, footprints

SCHEMES = ("bf16", *COMPRESSED, *ONLINE)
Mode = Literal["eager", "graphs", "compiled"]
# What is given to vLLM for each: nothing is captured or compiled; CUDA graphs of layers that are
# not compiled, which start in seconds; both, as engines serve in production.
_OPTIONS: dict[Mode, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}
MODES = tuple(_OPTIONS)
# Few on a CPU: one with AMX multiplies fp8 in torch, at 55 ns a product (torch 2.13's oneDNN).
_PROMPT, _TOKENS = (40, 16) if torch.cuda.is_available() else (4, 4)
_PROMPTS = [list(range(start, start + _PROMPT)) for start in (5, 8, 16, 205)]


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


# Of each prompt: tokens, and log-probs.
Outputs = list[tuple[list[int], list[float]]]
VLLM_ALONE, FRESH = "vllm", "fresh"  # what a push is compared with
RUNNER = "runner"
_alive: list[object] = []  # until the process ends, see above


def examine(
    scheme: str, folder: Path, *, mode: Mode = "eager", attention: str | None = None
) -> Iterator[Step]:
    """Start both engines in a scheme, push, compare, and push back.

    Args:
        scheme: one of `SCHEMES`.
        folder: where `policies.write` has written.
        mode: one of `MODES`; a CPU has no graphs.
        attention: vLLM's name of a backend; its own choice, if not given.

    """
    engines = _Engines(scheme, folder, mode, attention)
    _alive.append(engines)
    looks = {
        engines.compared_with: engines.start_fresh,
        "start": engines.start,
        RUNNER: engines.compare_runners,
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

    def __init__(self, scheme: str, folder: Path, mode: Mode, attention: str | None) -> None:
        self._scheme, self._folder, self._mode, self._attention = scheme, folder, mode, attention
        self._fresh: Any = None
        self._live: Any = None
        self._session: Session

    @property
    def compared_with(self) -> str:
        """VLLM alone; or a fresh start of flashquant, where vLLM stores other layers as codes, or
        computes them here only because it was asked to emulate its kernels."""
        if is_emulated(schemes.SCHEMES[self._scheme]) and env.EMULATE.read(os.environ):
            return FRESH
        online = self._scheme in ONLINE
        routed = policies.has_routers_that_vllm_quantizes(self._folder / "b")
        return FRESH if online and routed else VLLM_ALONE

    def start_fresh(self) -> tuple[str, str]:
        if self.compared_with == FRESH:
            self._fresh = self._serve_patched("b")
        else:
            held = f"b-{self._scheme}" if self._scheme in COMPRESSED else "b"
            checkpoint = self._folder / held
            self._fresh = self._serve(checkpoint, quantization=ONLINE.get(self._scheme))
        self._said = outputs(self._fresh)
        return "", "serves the scheme"

    def start(self) -> tuple[str, str]:
        self._live = self._serve_patched("a")
        self._session = session_of(_model(self._live))
        self._at_first = self._session.proofs.digest()
        return "", describe(_model(self._live))

    def compare_runners(self) -> tuple[str, str]:
        """CUDA's default for dense models is vLLM's second model runner, a CPU's the first."""
        alone, ours = served_by(self._fresh), served_by(self._live)
        return "" if alone == ours else f"{ours}, and {self._words()} by {alone}", ours

    def push_b(self) -> tuple[str, str]:
        self._said_at_first = outputs(self._live)  # what is captured has run with old weights
        self._before = footprints(tensors(_model(self._live)).items())
        report = self._push("b")
        live, fresh = tensors(_model(self._live)), tensors(_model(self._fresh))
        different = [n for n in live.keys() | fresh.keys() if not _same(live.get(n), fresh.get(n))]
        size = sum(tensor.nbytes for tensor in fresh.values())
        wrong = f"{len(different)} of {len(fresh)} differ: {', '.join(sorted(different)[:3])}"
        right = f"{len(fresh)} tensors, {size:,} bytes, as {self._words()} loads them"
        return wrong if different else "", f"{right}; {report.seconds * 1000:.1f} ms"

    def compare_addresses(self) -> tuple[str, str]:
        now = footprints(tensors(_model(self._live)).items())
        moved = [name for name in now if now[name] != self._before.get(name)]
        wrong = f"{len(moved)} moved: {', '.join(moved[:3])}" if moved else ""
        return wrong, f"{len(now)} tensors are where they were"

    def compare_outputs(self) -> tuple[str, str]:
        if outputs(self._fresh) != self._said:
            return "", f"not comparable: {self._words()} does not say the same thing twice here"
        wrong = difference(outputs(self._live), self._said)
        other = wrong and f"{wrong} other than {self._words()}'s"
        return other, f"every token and log-prob as {self._words()} ({self._mode})"

    def push_a(self) -> tuple[str, str]:
        self._push("a")
        if self._session.proofs.digest() != self._at_first:
            return "A leaves other bytes than before", ""
        wrong = difference(outputs(self._live), self._said_at_first)
        return (
            wrong and f"A again: {wrong} other than before",
            "pushing A again leaves what it began with, which says what it said",
        )

    def _push(self, policy: str) -> ReloadReport:
        """As a trainer on the same device would."""
        device = next(_model(self._live).parameters()).device
        sent = policies.tensors(self._folder / policy).items()
        weights = {name: tensor.to(device) for name, tensor in sent}
        report: ReloadReport = reload_weights(self._live, weights)
        return report

    def _words(self) -> str:
        return "vLLM alone" if self.compared_with == VLLM_ALONE else "a fresh start"

    def _serve_patched(self, policy: str) -> Any:
        os.environ["FLASHRL_CONFIG"] = self._scheme
        try:
            return self._serve(self._folder / policy)
        finally:
            del os.environ["FLASHRL_CONFIG"]

    def _serve(self, checkpoint: Path, **options: Any) -> Any:
        options |= _OPTIONS[self._mode] | {"attention_backend": self._attention}
        return _serve(checkpoint, options)


def served_by(llm: Any) -> str:
    """Which model runner, attention and CUDA graphs vLLM has chosen for an engine."""
    runner = llm.collective_rpc(_runner)[0]
    generation = "V2" if runner.startswith("vllm.v1.worker.gpu.") else "V1"
    attention = {type(m.impl).__name__ for m in _model(llm).modules() if hasattr(m, "impl")}
    graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    return f"{generation} ({runner}), {', '.join(sorted(attention))}, CUDA graphs {graphs.name}"


def _runner(worker: Any) -> str:
    return type(worker.model_runner).__module__


def outputs(llm: Any) -> Outputs:
    """Greedy tokens of some prompts, and the log-probs of prompt and answer."""
    sampling = SamplingParams(
        max_tokens=_TOKENS, temperature=0, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in _PROMPTS]
    said = []
    for answer in llm.generate(prompts, sampling, use_tqdm=False):
        output = answer.outputs[0]
        positions = [*answer.prompt_logprobs[1:], *output.logprobs]
        said.append((list(output.token_ids), [next(iter(p.values())).logprob for p in positions]))
    return said


def difference(one: Outputs, other: Outputs) -> str:
    """How many tokens and log-probs are not the same, and how far off; nothing, if all are."""
    if one == other:
        return ""
    tokens = sum(a[0] != b[0] for a, b in zip(one, other, strict=True))
    pairs = [p for a, b in zip(one, other, strict=True) for p in zip(a[1], b[1], strict=True)]
    off = [abs(x - y) for x, y in pairs if x != y]
    return (
        f"{tokens} of {len(one)} texts, {len(off)} of {len(pairs)} log-probs "
        f"(by up to {max(off, default=0.0):.2g})"
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a kernel reads; the pointers of oneDNN handlers are not among them."""
    return {
        f"{name}.{path}": leaf
        for name, module in model.named_modules()
        if not name.endswith(".attn")
        for path, leaf in leaves(module).items()
        # A compressed attention holds weights beside its cache. What a checkpoint of packed codes
        # says of their shape, no kernel reads.
        if isinstance(leaf, Tensor) and not path.startswith("kv_cache") and path != "weight_shape"
    }


def _serve(checkpoint: Path, options: dict[str, Any]) -> Any:
    """A small engine in this process."""
    patch()
    options |= room_for_others()
    llm = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=128,
        max_num_seqs=8,
        dtype="bfloat16",
        enable_prefix_caching=False,
        **{name: value for name, value in options.items() if value is not None},
    )
    # Of experts' kernels. The next engine replaces it, and would free it; but captured graphs of
    # this one go on to write into it, into whatever lies there then.
    if workspace.is_workspace_manager_initialized():
        _alive.append(workspace.current_workspace_manager())
    return llm


def _model(llm: Any) -> nn.Module:
    model: nn.Module = llm.apply_model(lambda model: model)[0]
    return model


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    # Flat, for a scalar has no last dimension to be bytes of.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

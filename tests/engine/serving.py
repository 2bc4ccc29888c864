"""Real engines for the tests: started once, kept alive, asked for everything they hold.

vLLM tears its global parallel state down when an engine is collected while
another one lives, so every engine started here stays until the process ends.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import flashquant
from flashquant.patches.guard import vllm_is
from flashquant.patches.layers import kernel_state
from flashquant.patches.seams.loading import session_of
from flashquant.update import Session
from tests.engine.kernels import choosing as choosing
from tests.engine.kernels import want_int4
from tests.support.gpu import SHARE
from tests.support.groups import make_experts_group
from tests.support.inspection import inspect_models_here

_KEPT: list[Any] = []  # of every Serving, those that a test drops included
_IN_USE: list[Any] = []  # of them, those that have not been put away
atexit.register(gc.unfreeze)  # or nanobind, whose objects engines hold, complains of leaks
_PROMPTS = [list(range(5 + shift, 45 + shift)) for shift in (0, 3, 11, 200)]


def needs(versions: str, what: str) -> pytest.MarkDecorator:
    """Skip where this vLLM has no such thing; `python -m tools.versions` lists the reasons."""
    return pytest.mark.skipif(not vllm_is(versions), reason=f"this vLLM has no {what}")


FP8_CHANNEL = needs(">=0.24", "online fp8 by channel")
INT8_EXPERTS = needs(">=0.25", "kernel of experts in int8 on a CPU")
GPT_OSS = needs("!=0.24.0", "loader that finds the experts of GPT-OSS")
BY_EXPERTS = needs(">=0.30", "kernel of experts on a CPU that can be told which experts it has")
# A scheme of rows, for tests that are about something else.
BY_ROW = "fp8_channel" if vllm_is(">=0.24") else "int8"

WEIGHT_VERSIONS = needs(">=0.32", "weight versions in its outputs")
# Before 0.27, an engine core of vLLM knows no version of its weights.
KNOWS_VERSION = vllm_is(">=0.27")


def weight_version(llm: Any, otherwise: str) -> str:
    """The version that vLLM itself says it serves; `otherwise` where it cannot say."""
    return str(llm.get_weight_version()) if KNOWS_VERSION else otherwise


@dataclass(frozen=True)
class Outputs:
    """What an engine says: greedy tokens, and log-probabilities exactly as returned."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Snapshot:
    """Everything one engine holds and says at one moment."""

    contents: dict[str, Tensor]
    outputs: Outputs
    digest: str

    def assert_same(self, other: Snapshot) -> None:
        """Bit for bit: every tensor the kernels read, every token, every log-prob."""
        if different := self.different_from(other):
            raise AssertionError(f"not the same: {', '.join(different)}")

    def different_from(self, other: Snapshot) -> list[str]:
        """The names of what is not the same, or `outputs`, or `digest`."""
        names = self.contents.keys() | other.contents.keys()
        different = [
            name
            for name in sorted(names)
            if name not in self.contents
            or name not in other.contents
            or not same_bits(self.contents[name], other.contents[name])
        ]
        different += ["outputs"] if self.outputs != other.outputs else []
        return different + (["digest"] if self.digest != other.digest else [])


@dataclass
class Serving:
    """One real vLLM engine, patched, and ways to look into it."""

    checkpoint: Path
    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int = 16

    @cached_property
    def llm(self) -> Any:
        from vllm import LLM
        from vllm.v1.worker import workspace

        flashquant.patch()
        make_experts_group()
        inspect_models_here()
        asked = {"FLASHRL_CONFIG": self.scheme, "FLASHQUANT_EMULATE": "1"}
        with mock.patch.dict(os.environ, asked):
            llm = LLM(
                str(self.checkpoint),
                skip_tokenizer_init=True,
                max_model_len=128,
                dtype="bfloat16",
                **{
                    "enforce_eager": True,
                    "enable_prefix_caching": False,
                    "kv_cache_memory_bytes": 16 << 20,
                    **SHARE,
                    **self.options,
                },
            )
        _KEPT.append(llm)
        if workspace.is_workspace_manager_initialized():
            # Captured graphs of this engine write into it; the next engine would free it.
            _KEPT.append(workspace.current_workspace_manager())
        _IN_USE.append(llm)
        _leave_alone(llm)
        return llm

    @cached_property
    def model(self) -> nn.Module:
        model: nn.Module = self.llm.apply_model(lambda model: model)[0]
        return model

    @property
    def session(self) -> Session:
        return session_of(self.model)

    def outputs(self) -> Outputs:
        """Greedy tokens after each of 4 prompts, with the log-probs of prompt and answer.

        In a pipeline without the prompt's: its first stage has no head to say them with.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=self.tokens,
            temperature=0,
            ignore_eos=True,
            prompt_logprobs=None if "pipeline_parallel_size" in self.options else 0,
            logprobs=0,
        )
        prompts = [{"prompt_token_ids": tokens} for tokens in _PROMPTS]
        answers = self.llm.generate(prompts, sampling, use_tqdm=False)
        said = [[*(a.prompt_logprobs or ())[1:], *a.outputs[0].logprobs] for a in answers]
        return Outputs(
            tokens=[list(a.outputs[0].token_ids) for a in answers],
            logprobs=[[next(iter(p.values())).logprob for p in positions] for positions in said],
        )

    def continued(self, prompt: list[int], count: int) -> list[list[float]]:
        """The next greedy tokens after a prompt, each with its log-prob."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=0)
        (answer,) = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        output = answer.outputs[0]
        steps = zip(output.token_ids, output.logprobs, strict=True)
        return [[token, step[token].logprob] for token, step in steps]

    @cached_property
    def start(self) -> Snapshot:
        """How the engine stood right after its first load."""
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        outputs = self.outputs()  # first: a rotary cache takes its dtype from the first query
        return Snapshot(self.contents(), outputs, self.session.proofs.digest())

    def contents(self) -> dict[str, Tensor]:
        """A copy of everything the kernels read, packed memory included, by full name.

        A oneDNN handler shows no bytes: it is read through the matmul it serves,
        one row of the identity at a time.
        """
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            for path, leaf in kernel_state.leaves(module).items():
                if isinstance(leaf, Tensor):
                    found[f"{name}.{path}"] = leaf.detach().clone()
                else:
                    found[f"{name}.{path}"] = _read_through(module)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Every live tensor itself, by full name."""
        return {
            f"{name}.{path}": tensor
            for name, module in self.model.named_modules()
            for path, tensor in kernel_state.tensors(module)
        }


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _read_through(module: nn.Module) -> Tensor:
    """The packed weight of a layer, as its own kernel multiplies it."""
    # In the layer's own precision: some routers are float32, and a kernel reads what it expects.
    dtype = getattr(module, "params_dtype", torch.bfloat16)
    identity = torch.eye(_input_size(module), dtype=dtype)
    with torch.no_grad():
        result: Tensor = module.quant_method.apply(module, identity, None)
    return result


def _input_size(module: nn.Module) -> int:
    (width,) = {
        leaf.k for leaf in kernel_state.leaves(module).values() if not isinstance(leaf, Tensor)
    }
    return width


_STARTED: dict[tuple[object, ...], Serving] = {}


def put_away() -> None:
    """Give back the memory of every engine that this process has started, and keep the engines.

    They are asked for nothing more: each file has policies, hence engines, of its own.
    """
    _STARTED.clear()
    while _IN_USE:
        llm = _IN_USE.pop()
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        held = list(runner.kv_caches)
        for module in runner.get_model().modules():
            # Not buffers: vLLM shares rotary embeddings among the engines of a process.
            leaves = kernel_state.leaves(module).items()
            held += [leaf for path, leaf in leaves if path not in module._buffers]
        storages = {leaf.untyped_storage() for leaf in held if isinstance(leaf, Tensor)}
        for storage in storages:
            if storage.resizable():  # not what lies in somebody else's memory
                storage.resize_(0)  # whoever holds the tensors
        session_of(runner.get_model()).transactions.free()


def _leave_alone(llm: Any) -> None:
    """All engines are kept, so nobody has to look for garbage in them: when one starts, or, as
    vLLM does from 0.30 on, at exit, where that takes minutes after a file with many."""
    gc.collect()
    gc.freeze()
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.atexit = False


def serve(
    checkpoint: Path, scheme: str, kernels: str = "native", tokens: int = 16, **options: Any
) -> Serving:
    """The engine for a checkpoint in a scheme, started at the first call and kept.

    Args:
        kernels: which ones the surrounding `choosing` block makes vLLM choose.
        tokens: how many an answer has.

    """
    if scheme in ("fp8_channel", "fp8_tensor") and BY_ROW != "fp8_channel":
        pytest.skip(FP8_CHANNEL.kwargs["reason"])
    want_int4(scheme)
    key = (checkpoint, scheme, kernels, tokens, repr(sorted(options.items())))
    if key not in _STARTED:
        serving = Serving(checkpoint, scheme, options, tokens)
        _ = serving.start
        _STARTED[key] = serving
    return _STARTED[key]


@contextmanager
def scheduling_ahead() -> Iterator[None]:
    """What vLLM's platform for the CPU has switched off is switched on again."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    configure = platform.check_and_update_config.__func__

    def leave_on(cls: Any, config: Any) -> None:
        configure(cls, config)
        config.scheduler_config.async_scheduling = True

    with mock.patch.object(platform, "check_and_update_config", classmethod(leave_on)):
        yield

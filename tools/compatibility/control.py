"""Whose fault is it? The same engine, with nothing of flashquant but its CPU fixes.

Without those (permission to use AMX tiles, an op that vLLM leaves empty, a float32 bias, its
emulation of kernels that are a GPU's) vLLM would run even less. It has no int8 for a bf16
checkpoint, so there its W8A8 sibling is served with made-up weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashquant.config.schemes import COMPRESSED, ONLINE
from flashquant.patches.layers import cpu
from flashquant.patches.seams import emulation
from tools.compatibility.cell import ENGINE, WRONG, Cell, options_of, scheme_of
from tools.compatibility.trial import kernels, policy

_APPLIED: list[Any] = []


def blame(architecture: str, column: str, folder: Path) -> Cell:
    """`engine` with its reason where vLLM alone cannot either; else flashquant is `WRONG`."""
    from vllm import LLM, SamplingParams

    from tests.engine.serving import choosing

    if not _APPLIED:
        cpu.allow_amx()
        emulation.emulates = lambda _: True  # as FLASHQUANT_EMULATE=1 asks for
        _APPLIED.extend(point.apply() for point in (*cpu.POINTS, *emulation.POINTS))
    scheme = scheme_of(column)
    options: dict[str, Any] = {"quantization": ONLINE.get(scheme)}
    if scheme in COMPRESSED:
        options = {
            "quantization": "compressed-tensors",
            "hf_overrides": {"quantization_config": dict(COMPRESSED[scheme])},
            "load_format": "dummy",
        }
    try:
        with choosing(kernels()):
            llm = LLM(
                str(policy(folder, architecture, "a")),
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=16 << 20,
                max_model_len=128,
                dtype="bfloat16",
                **options,
                **options_of(column),
            )
            prompt = {"prompt_token_ids": list(range(5, 45))}
            llm.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    except Exception as error:  # whatever an engine dies of
        return Cell(architecture, column, ENGINE, f"{type(error).__name__}: {error}")
    _APPLIED.append(llm)  # an engine that is collected takes the others' parallel state along
    return Cell(architecture, column, WRONG, "vLLM alone starts and generates")

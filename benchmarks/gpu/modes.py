"""How the engines of these benchmarks are served, and made ready."""

from __future__ import annotations

from typing import Any

# Eager, or with CUDA graphs of layers that are not compiled, which start in seconds.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True, "max_num_seqs": 8},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "max_num_seqs": 8,
    },
}


def generate(llm: Any) -> None:
    """A few tokens: kernels are there, graphs have run."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(range(5, 45))}], sampling, use_tqdm=False)

"""What the programs of the kit find in their environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# Nothing is looked up, nothing is sent; what is printed is printed at once.
_ALWAYS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # A process that has touched CUDA cannot be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# Of a machine without a network: every socket is on it.
_OFFLINE = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    # FlashInfer is not in the kit. DeepGEMM is, but compiles each kernel with nvcc.
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_MOE_USE_DEEP_GEMM": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Would decide what the programs are to decide, or overrule it.
_UNSET = ("FLASHRL_CONFIG", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING")
_CUDA_HOMES = ("/usr/local/cuda", "/usr/local/cuda-13.0", "/usr/local/cuda-13")


def online(project: Path, *, on_cpu: bool) -> dict[str, str]:
    """A machine on which vLLM is installed.

    Args:
        project: the checkout, whose benchmarks are imported.
        on_cpu: a rehearsal without a GPU.

    """
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    ours = _ALWAYS | (_CPU if on_cpu else {})
    ours["PYTHONPATH"] = _joined(str(project), kept.get("PYTHONPATH", ""))
    return ours | kept | {"PYTHONPATH": ours["PYTHONPATH"]}


def offline(project: Path, site: Path, work: Path, *, on_cpu: bool) -> dict[str, str]:
    """A machine on which the kit has been unpacked.

    Args:
        project: the checkout.
        site: where the kit was unpacked to.
        work: where what is compiled may lie.
        on_cpu: a rehearsal without a GPU.

    """
    found = _OFFLINE | online(project, on_cpu=on_cpu)
    found["PYTHONPATH"] = _joined(str(project), str(site), os.environ.get("PYTHONPATH", ""))
    found["LD_LIBRARY_PATH"] = _joined(*_cuda_libraries(), found.get("LD_LIBRARY_PATH", ""))
    home = next((h for h in _homes(found) if (Path(h) / "bin" / "nvcc").exists()), None)
    if home is not None:
        found["CUDA_HOME"] = home
    nvcc = f"{home}/bin" if home else ""
    found["PATH"] = _joined(str(site / "bin"), nvcc, found.get("PATH", ""))
    return _caches(work) | found


def _homes(environment: Mapping[str, str]) -> Iterator[str]:
    if own := environment.get("CUDA_HOME"):
        yield own
    yield from _CUDA_HOMES


def _caches(work: Path) -> dict[str, str]:
    """What is compiled survives a second run."""
    names = {
        "DG_JIT_CACHE_DIR": "deep_gemm",
        "FLASHQUANT_CACHE": "flashquant",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "VLLM_CACHE_ROOT": "vllm",
    }
    return {name: str(work / "cache" / folder) for name, folder in names.items()}


def _cuda_libraries() -> Iterator[str]:
    """Those that came with torch; vLLM's own ask for some of them by name."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        yield from (str(folder) for folder in sorted(Path(place).glob("*/lib")))


def _joined(*paths: str) -> str:
    return ":".join(path for path in paths if path)


def shell(environment: Mapping[str, str]) -> str:
    """What differs from this process's environment, for a shell to evaluate."""
    lines = [
        f"export {name}='{value}'"
        for name, value in sorted(environment.items())
        if os.environ.get(name) != value
    ]
    return "\n".join(lines)

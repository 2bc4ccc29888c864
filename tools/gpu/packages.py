"""What the kit holds: a vLLM, and what it imports that a machine with PyTorch alone lacks."""

from __future__ import annotations

import re
from pathlib import Path

# The newest that asks for torch 2.11.0. Another pin carries another one: the compiled libraries
# of later releases load under torch 2.11, too, as far as that can be seen without a GPU.
VLLM = "vllm==0.26.0"
PYTHON = "3.12"

# Imported on the way to an engine in this process, in another one, or behind its HTTP server;
# versions that were imported together.
PACKAGES = Path(__file__).with_name("packages.txt").read_text().split()

# What vLLM takes from the machine, as it is imported.
EXPECTED = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "numba",
    "einops",
    "sentencepiece",
    "tiktoken",
    "google.protobuf",
    "psutil",
    "PIL",
    "cv2",
    "requests",
    "aiohttp",
    "httpx",
    "anyio",
    "regex",
    "tqdm",
    "yaml",
    "filelock",
    "packaging",
    "cloudpickle",
    "prometheus_client",
    "cpuinfo",
    "uvloop",
    "ninja",
    "jinja2",
    "six",
    "setuptools",
    "click",
    "typing_extensions",
    "attr",
    "rich",
    "xxhash",
)

_GLIBC = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
PLATFORMS = [
    *(f"manylinux_{version}_x86_64" for version in _GLIBC),
    "manylinux1_x86_64",
    "manylinux2010_x86_64",
    "manylinux2014_x86_64",
    "any",
]

# Never unpacked: other Pythons, other GPUs, data that nothing here reads.
LEFT_OUT = re.compile(
    r"vllm/vllm-rs$"
    r"|vllm/vllm_flash_attn/_vllm_fa2_C"
    r"|vllm/_qutlass_C"  # Blackwell
    r"|vllm/third_party/deep_gemm/_C\.cpython-31[^2]"
    r"|vllm/third_party/fmha_sm100/cutlass/"
    r"|vllm/entrypoints/serve/instrumentator/static/"
    r"|pycountry/locales/"
    r"|mistral_common/data/"
    r"|(^|/)__pycache__/"
    r"|^[^/]+\.data/(?!purelib|platlib)"
    r"|^xgrammar/.*\.(h|hpp|cc)$|^tvm_ffi/(include|src|3rdparty)/"
    r"|^(astor|dill|cbor2|ijson|msgspec|pyzmq|zmq|referencing|jsonschema)/tests?/"
)
# Libraries that are an archive each, for they are large.
LARGE = {
    "C": "vllm/_C_stable_libtorch.abi3.so",
    "moe": "vllm/_moe_C_stable_libtorch.abi3.so",
    "fa3": "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
}
HOPPER_ONLY = frozenset({"fa3"})  # there is nothing else in it
# The library of `moe` once more, with the PTX of 4-bit experts; it is unpacked after it.
MARLIN = "moe-marlin"

"""TRL's server mode: its command line, its client, and vLLM's weight transfer by NCCL between.

Usage: python -m tests.stacks.programs.trl_server STARTS_ON PUSHED

TRL's own: the command that `trl vllm-serve` runs, and `VLLMClient`. vLLM's own: the server, its
routes, and both ends of the transfer. Not theirs, for want of a GPU: NCCL's collectives and CUDA's
streams (`tests.support.nccl`). Not run: `GRPOTrainer`, which is run with the colocated engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor
from trl.generation.vllm_client import VLLMClient
from trl.scripts.vllm_serve import ScriptArguments, build_command

from tests.stacks.programs import gloo
from tests.stacks.programs.rollouts import PROMPTS, print_result, raised_by
from tests.support import nccl
from tools.models import tiny_models

# To the end of this process; and of the worker's, which imports this module for `Imported`.
_TO_THE_END = ExitStack()
_TO_THE_END.enter_context(nccl.answered_by_the_cpu())


class Imported:
    """A worker extension without methods: vLLM imports its module in each worker."""


@contextmanager
def served(checkpoint: str) -> Iterator[VLLMClient]:
    """A server, started as TRL starts it, and a client that has met its workers."""
    port = gloo.free_port()
    script = ScriptArguments(
        model=str(tiny_models.add_tokenizer(Path(checkpoint))),
        host="127.0.0.1",
        port=port,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
    )
    more = ["--kv-cache-memory-bytes", str(16 << 20)]
    more += ["--worker-extension-cls", f"{__spec__.name}.{Imported.__name__}"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen(build_command(script, more), env=environment)
    try:
        client = VLLMClient(
            base_url=f"http://127.0.0.1:{port}",
            group_port=gloo.free_port(),
            connection_timeout=240,
        )
        client.init_communicator(device="cuda:0")
        yield client
    finally:
        server.terminate()
        server.wait(60)


def said(client: VLLMClient) -> dict[str, Any]:
    """The digest of the server, and greedy tokens with their log-probs."""
    client.reset_prefix_cache()
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        answer = client.generate(
            [prompt], temperature=0.0, max_tokens=16, generation_kwargs={"ignore_eos": True}
        )
        tokens += answer["completion_ids"]
        logprobs += [[one for (one,) in answer["logprobs"][0]]]
    asked = {"method": "flashquant_status"}
    status = requests.post(f"{client.base_url}/collective_rpc", json=asked, timeout=60).json()
    return {"digest": status["results"][0]["digest"], "tokens": tokens, "logprobs": logprobs}


def push(client: VLLMClient, weights: dict[str, Tensor]) -> None:
    """As `GRPOTrainer` does it in server mode."""
    metadata = [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in weights.items()
    ]
    client.update_named_params(metadata, iter(weights.items()))


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    with served(starts_on) as client:
        result: dict[str, Any] = {"started": said(client)}
        push(client, b)
        result["pushed b"] = said(client)
        norm = "model.norm.weight"
        result["refused"] = raised_by(lambda: push(client, {**a, norm: a[norm] * torch.nan}))
        result["after refusal"] = said(client)
        push(client, a)
        return {**result, "pushed a": said(client)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))

"""Two workers, one of which fails, and then dies, in the middle of an update.

Usage: python -m tests.engine.programs.tensor_parallel STARTS_ON PUSHED
Prints one JSON object: the digests of both ranks before and after each step, what
was raised, and the seconds it took to notice the death.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_FAILS_AT = 5  # of 15 layers


def fail_at_a_layer(worker: Any, *, dies: bool) -> None:
    """Make one commit of rank 1 run out of memory, once, or end the process."""
    from flashquant.patches.loading import session_of

    session = session_of(worker.get_model())
    if session.rank != 1:
        return
    layer = session._engine.layers[_FAILS_AT]

    def commit(undo: Any) -> int:
        del layer.commit
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        layer.commit(undo)
        raise MemoryError("injected into rank 1")

    layer.commit = commit


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM

    import flashquant

    llm = LLM(
        starts_on,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=128,
        dtype="bfloat16",
        tensor_parallel_size=2,
    )

    def digests() -> tuple[str | None, ...]:
        return flashquant.status(llm).ranks

    steps = {"started on a": digests()}
    report = flashquant.reload_weights(llm, Path(pushed))
    steps["pushed b"] = digests()
    result: dict[str, Any] = {"reported": report.ranks, "one": report.digest}

    llm.collective_rpc(fail_at_a_layer, kwargs={"dies": False})
    result["failed"] = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    steps["rank 1 failed"] = digests()
    flashquant.reload_weights(llm, Path(starts_on))
    steps["pushed a"] = digests()

    llm.collective_rpc(fail_at_a_layer, kwargs={"dies": True})
    began = time.monotonic()
    result["lost"] = raised_by(lambda: flashquant.reload_weights(llm, Path(pushed)))
    return {**result, "steps": steps, "seconds": time.monotonic() - began}


def raised_by(call: Any) -> list[str]:
    """The class and the words of what a call raises."""
    try:
        call()
    except Exception as failure:  # whatever it is, the test looks at it
        return [type(failure).__name__, str(failure)]
    return ["nothing", ""]


if __name__ == "__main__":
    print("RESULT", json.dumps(main(*sys.argv[1:])), flush=True)

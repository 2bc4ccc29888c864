"""Two workers, one of which fails, and then dies, in the middle of an update.

Usage: python -m tests.engine.programs.tensor_parallel STARTS_ON PUSHED
Prints one JSON object: the digests of both ranks before and after each step, and
what was raised.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM

    import flashquant

    llm = LLM(starts_on, **OPTIONS, tensor_parallel_size=2)

    def digests() -> tuple[str | None, ...]:
        return flashquant.status(llm).ranks

    steps = {"started on a": digests()}
    report = flashquant.reload_weights(llm, Path(pushed))
    steps["pushed b"] = digests()

    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
    failed = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    steps["rank 1 failed"] = digests()
    flashquant.reload_weights(llm, Path(starts_on))
    steps["pushed a"] = digests()

    # vLLM's own door: it raises at the first answer that is a failure, rank 0's.
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
    native = {"weights_path": pushed}
    refused = raised_by(lambda: llm.collective_rpc("reload_weights", kwargs=native))
    steps["rank 1 failed in vLLM's reload"] = digests()
    llm.collective_rpc("reload_weights", kwargs=native)
    steps["pushed b by vLLM's reload"] = digests()

    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": True})
    lost = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    raised = {"failed": failed, "refused": refused, "lost": lost}
    borrowed = report.undo_cache_bytes / report.undo_bytes
    return {"reported": report.ranks, "steps": steps, "borrowed": borrowed, **raised}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))

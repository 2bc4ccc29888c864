"""What happens to an engine while an update is under way that its trainer may never finish.

Usage: python -m tests.engine.programs.open_bracket STARTS_ON PUSHED
Prints one JSON object: for each thing done in an open bracket, the tokens that came meanwhile and
the answer after it; for each way out, the digest of the engine and the answer of a request that
waited; and how many bytes of the KV cache each open bracket took for its undo log.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.engine.programs.engine import OPTIONS, PROMPT, in_the_cache, print_result
from tools.models import tiny_models

PATIENCE = 60.0  # seconds
LONG = 80  # tokens: more than come before a bracket is open
SHORT = 8


class Trial:
    """One engine, and the requests that wait in its open bracket."""

    def __init__(self, engine: Any, starts_on: str, pushed: str) -> None:
        self.engine, self.starts_on, self.pushed = engine, Path(starts_on), Path(pushed)
        self.seen: dict[str, int] = {}
        self.borrowed: list[int] = []  # bytes of the KV cache, in each open bracket
        self.numbers = itertools.count()

    async def prepare(self) -> None:
        """Each half of the pushed policy as a file."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        folder = Path(tempfile.mkdtemp())
        weights = list(tiny_models.tensors(self.pushed).items())
        middle = len(weights) // 2
        save_file(dict(weights[:middle]), folder / "1.safetensors")
        save_file(dict(weights[middle:]), folder / "2.safetensors")
        init = WeightTransferInitRequest(init_info={"folder": str(folder)})
        await self.engine.init_weight_transfer_engine(init)

    async def ask(self, name: str, tokens: int) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        said: list[int] = []
        async for output in self.engine.generate(PROMPT, sampling, f"{name}-{next(self.numbers)}"):
            said = list(output.outputs[0].token_ids)
            self.seen[name] = len(said)
        return said

    async def update(self, half: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info={"path": f"{half}.safetensors"})
        await self.engine.update_weights(request)

    async def finish(self) -> None:
        await self.update(2)
        await self.engine.finish_weight_update()

    async def open(self) -> list[asyncio.Task[list[int]]]:
        """Half an update, with one request in flight and one that comes later."""
        self.seen.clear()
        running = asyncio.create_task(self.ask("running", LONG))
        while not self.seen:
            await asyncio.sleep(0.01)
        await self.engine.start_weight_update()
        await self.update(1)
        self.borrowed += await self.engine.collective_rpc(in_the_cache)
        waiting = asyncio.create_task(self.ask("waiting", SHORT))
        await asyncio.sleep(0.3)
        return [running, waiting]

    async def meanwhile(self, act: Callable[[list[Any]], Awaitable[Any]]) -> list[Any]:
        """How many tokens came in an open bracket in which something was done, and the answer."""
        requests = await self.open()
        before = sum(self.seen.values())
        await asyncio.wait_for(act(requests), PATIENCE)
        await asyncio.sleep(0.5)
        came = sum(self.seen.values()) - before
        await asyncio.wait_for(self.finish(), PATIENCE)
        for request in requests:
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(request, PATIENCE)
        return [came, await asyncio.wait_for(self.ask("after", SHORT), PATIENCE)]

    async def leave(self, way: Callable[[], Awaitable[Any]]) -> list[Any]:
        """What is served after a way out, and what the request that waited was answered."""
        import flashquant

        await flashquant.reload_weights(self.engine, self.starts_on)
        running, waiting = await self.open()
        running.cancel()
        await asyncio.wait_for(way(), PATIENCE)
        answer = await asyncio.wait_for(waiting, PATIENCE)
        return [(await flashquant.status(self.engine)).digest, answer]


async def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = WeightTransferConfig(backend="flashquant_file")
    args = AsyncEngineArgs(starts_on, weight_transfer_config=transfer, **OPTIONS)
    engine = AsyncLLM.from_engine_args(args)
    import flashquant

    async def give_up(requests: list[Any]) -> None:
        for request in requests:
            request.cancel()

    async def pause(mode: str) -> None:
        await engine.pause_generation(mode=mode, clear_cache=False)
        await asyncio.sleep(0.3)
        await engine.resume_generation()

    async def sleep() -> None:
        await engine.sleep(level=0)
        await asyncio.sleep(0.3)
        await engine.wake_up(tags=["scheduling"])

    async def all_of_it(requests: list[Any]) -> None:
        await pause("keep")
        await give_up(requests[:1])
        await flashquant.status(engine)
        await give_up(requests)
        await flashquant.status(engine)

    trial = Trial(engine, starts_on, pushed)
    await trial.prepare()
    a = [(await flashquant.status(engine)).digest, await trial.ask("a", SHORT)]

    async def by_path() -> None:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": pushed})

    async def begin_anew() -> None:
        await engine.start_weight_update()
        await trial.update(1)
        await trial.finish()

    acts: dict[str, Callable[[list[Any]], Awaitable[Any]]] = {
        "nothing": lambda _: asyncio.sleep(0),
        "its client gives up": lambda requests: give_up(requests[:1]),
        "both clients give up": give_up,
        "status": lambda _: flashquant.status(engine),
        "resume": lambda _: engine.resume_generation(),
        "pause, keeping requests": lambda _: pause("keep"),
        "pause, aborting requests": lambda _: pause("abort"),
        "sleep": lambda _: sleep(),
        "caches are reset": lambda _: engine.reset_prefix_cache(),
        "all of it": all_of_it,
    }
    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        "finish": trial.finish,
        "start": begin_anew,
        "flashquant.reload_weights": lambda: flashquant.reload_weights(engine, Path(pushed)),
        "reload_weights": by_path,
        "nobody": lambda: asyncio.sleep(0),  # and FLASHQUANT_BRACKET_TIMEOUT passes
    }
    result: dict[str, Any] = {
        "acts": {name: await trial.meanwhile(act) for name, act in acts.items()},
        "ways": {name: await trial.leave(way) for name, way in ways.items()},
    }
    late = []
    for call in (trial.update(2), engine.finish_weight_update()):
        try:
            await call
        except Exception as refusal:  # whatever it is, the test looks at it
            late.append(str(refusal))
    result["late"] = late  # what the trainer that was taken to be gone hears when it goes on
    after = [(await flashquant.status(engine)).digest, await trial.ask("after", SHORT)]
    return {**result, "a": a, "after": after, "borrowed": trial.borrowed}


if __name__ == "__main__":
    print_result(asyncio.run(main(*sys.argv[1:])))

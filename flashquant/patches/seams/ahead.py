"""Steps that were scheduled ahead, and are on their way when new weights come.

What they have sampled is of the old weights. vLLM drops it, and computes it anew (`derived`); but

up to 0.26     it counts tokens, and not steps: of a request that speculates it drops too many, and
               without async scheduling (pipeline parallel) none. And log-probs of a prompt, which
               come with the first token, may not be dropped: that ends the engine
in all         what it had preempted for want of memory, in a pipeline, it delivers late
first runner   log-probs of a prompt are made once, so those that were dropped are lost
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from vllm.v1.request import RequestStatus

from flashquant.patches.channels import STALE
from flashquant.patches.guard import vllm_is
from flashquant.patches.point import PatchPoint

_COUNTS_TOKENS: Final = vllm_is("<0.27")
_BEGUN: Final = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)


def preempt(core: Any, *, reset_connector: bool = False) -> bool:
    """Every request in flight is computed anew, and nothing of what has been is used again.

    Returns:
        Whether the caches have been reset.

    Raises:
        RuntimeError: requests hold blocks that cannot be taken from them; those that could be
            preempted have been.

    """
    begun = [r for r in core.scheduler.requests.values() if r.status in _BEGUN]
    try:
        return bool(
            core.reset_prefix_cache(reset_running_requests=True, reset_connector=reset_connector)
        )
    finally:
        if _COUNTS_TOKENS:
            _drop_steps(core, begun)
        else:
            _drop_late(begun)


def _drop_steps(core: Any, begun: Iterable[Any]) -> None:
    """What is on its way of these requests, by the step it comes with."""
    for request in begun:
        request.async_tokens_to_discard = request.num_output_placeholders = 0  # vLLM's counts
    names = {request.request_id for request in begun}
    for _, scheduled, *_ in core.batch_queue or ():
        stale = names & scheduled.num_scheduled_tokens.keys()
        STALE.put(scheduled, stale | (STALE.get(scheduled) or set()))


def _drop_late(begun: Iterable[Any]) -> None:
    """vLLM itself drops what it has preempted for the reset, but not what it had before, for want
    of memory: in a pipeline that is still on its way."""
    for request in begun:
        if request.num_stale_output_tokens:
            request.drop_stale_output = True


def _update_from_output(original: Any, scheduler: Any, scheduled: Any, output: Any) -> Any:
    for name in STALE.get(scheduled) or ():
        output.prompt_logprobs_dict.pop(name, None)
        if output.sampled_token_ids:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
    return original(scheduler, scheduled, output)


def _update_states(original: Any, runner: Any, scheduled: Any) -> Any:
    """A request that has sampled nothing, and is computed anew, may want log-probs of its prompt
    that the runner takes to be delivered."""
    resumed = scheduled.scheduled_cached_reqs
    for name in resumed.resumed_req_ids:
        sampling = runner.requests[name].sampling_params
        wanted = None if sampling is None else sampling.prompt_logprobs
        if wanted is not None and resumed.is_context_phase(name):
            every = runner.input_batch.vocab_size
            runner.num_prompt_logprobs[name] = every if wanted == -1 else wanted
    return original(runner, scheduled)


_STATES = PatchPoint(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
    expects=("self", "scheduler_output"),
    wrapper=_update_states,
)
_OUTPUT = PatchPoint(
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    expects=("self", "scheduler_output", "model_runner_output"),
    wrapper=_update_from_output,
)
POINTS = (_STATES, _OUTPUT) if _COUNTS_TOKENS else (_STATES,)

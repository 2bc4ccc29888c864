"""Steps that were scheduled ahead, and were on their way when new weights came.

What they have sampled is of the old weights. vLLM drops it, and computes it anew (`derived`); but

tokens of a draft      up to 0.26 it drops a step for each token that was guessed, so that tokens of
                       the new weights are missing from the answer
log-probs of a prompt  come with the first token. Up to 0.26 they may not be dropped, which ends the
                       engine; and the first runner makes them once
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from flashquant.patches.guard import vllm_is
from flashquant.patches.point import PatchPoint

_COUNTS_TOKENS: Final = vllm_is("<0.27")


def counting_steps(core: Any) -> Callable[[], None]:
    """Count what is on its way before the running requests are preempted.

    Returns:
        What lets vLLM drop so many steps of each of them, afterwards.

    """
    running = core.scheduler.running if _COUNTS_TOKENS else ()
    steps = [(request, _steps_of(request, core)) for request in running]

    def drop() -> None:
        for request, count in steps:
            request.async_tokens_to_discard = count

    return drop


def _steps_of(request: Any, core: Any) -> int:
    """How many steps will still bring tokens of a request."""
    steps, awaited = request.async_tokens_to_discard, request.num_output_placeholders
    for _, scheduled, *_ in core.batch_queue or ():  # newest first
        # When nothing is awaited any more, older ones have computed parts of its prompt.
        if awaited > 0 and request.request_id in scheduled.num_scheduled_tokens:
            guessed = scheduled.scheduled_spec_decode_tokens.get(request.request_id, ())
            awaited -= 1 + len(guessed)
            steps += 1
    return int(steps)


def _update_from_output(original: Any, scheduler: Any, scheduled: Any, output: Any) -> Any:
    """Log-probs of a prompt are dropped with the token that they come with."""
    for name in list(output.prompt_logprobs_dict):
        request = scheduler.requests.get(name)
        if request is not None and request.async_tokens_to_discard:
            del output.prompt_logprobs_dict[name]
    return original(scheduler, scheduled, output)


def _update_states(original: Any, runner: Any, scheduled: Any) -> Any:
    """The first runner has forgotten who wants log-probs of a prompt, when it is to compute it
    anew."""
    resumed = scheduled.scheduled_cached_reqs
    for name in resumed.resumed_req_ids:
        sampling = runner.requests[name].sampling_params
        wanted = None if sampling is None else sampling.prompt_logprobs
        if wanted is not None and resumed.is_context_phase(name):  # it has sampled nothing
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

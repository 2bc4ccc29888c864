#!/usr/bin/env bash
# checkpoint-engine 0.4.2: an int8 server that takes bf16 checkpoints from a parameter server.
#
#     examples/checkpoint_engine.sh Qwen/Qwen3-0.6B
#
# Its `ParameterServer.update` then reaches the engine by POST /collective_rpc. It brings weights
# and knows nothing of a loss: the correction belongs to the trainer behind it.
set -euo pipefail

export FLASHRL_CONFIG=int8
export VLLM_SERVER_DEV_MODE=1  # /collective_rpc is a development route

exec vllm serve "${1:?which model?}" \
  --dtype bfloat16 \
  --load-format dummy \
  --logprobs-mode processed_logprobs \
  --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension \
  "${@:2}"

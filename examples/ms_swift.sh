#!/usr/bin/env bash
# ms-swift 4.6.0: GRPO with int8 rollouts on a server of its own. Add your model and data; this is
# what flashquant adds. ms-swift pushes flat buckets in the trainer's dtype, by NCCL.
set -euo pipefail

# The rollout server is where vLLM runs. (`--vllm_mode colocate`: set the variable for `swift rlhf`.)
FLASHRL_CONFIG=int8 swift rollout \
  --torch_dtype bfloat16 \
  "$@" &

swift rlhf \
  --rlhf_type grpo \
  --torch_dtype bfloat16 \
  --use_vllm true \
  --vllm_mode server \
  --rollout_importance_sampling_mode token_truncate \
  --rollout_importance_sampling_threshold 2.0 \
  "$@"

# ms-swift asks vLLM for `processed_logprobs` by itself.

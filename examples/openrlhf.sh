#!/usr/bin/env bash
# OpenRLHF 0.11.2: a GRPO run with int8 rollouts. Add your model and data; this is what flashquant
# adds. OpenRLHF pushes a tensor a call, in bf16 (`--ds.param_dtype`), by NCCL or CUDA IPC.
set -euo pipefail

# OpenRLHF gives Ray's workers three variables of its own; others go by the job.
ray job submit --runtime-env-json '{"env_vars": {"FLASHRL_CONFIG": "int8"}}' -- \
  python3 -m openrlhf.cli.train_ppo_ray \
  --algo.advantage.estimator group_norm \
  --ds.param_dtype bf16 \
  --vllm.sync_backend nccl \
  --algo.advantage.is_correction_level token \
  --algo.advantage.is_correction_mode clip \
  --algo.advantage.is_correction_gating ratio \
  --algo.advantage.is_correction_threshold 2.0 \
  "$@"

# With a correction level OpenRLHF asks vLLM for `processed_logprobs` by itself.

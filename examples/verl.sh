#!/usr/bin/env bash
# verl 0.9.1: a GRPO run with int8 rollouts. Add your model and data; this is what flashquant adds.
#
# verl starts its engines inside Ray actors, on random weights (`load_format: dummy`), and pushes
# buckets by CUDA IPC. flashquant takes the first push as it takes every other.
set -euo pipefail

python3 -m verl.trainer.main_ppo \
  +ray_kwargs.ray_init.runtime_env.env_vars.FLASHRL_CONFIG=int8 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.quantization=null \
  actor_rollout_ref.rollout.calculate_log_probs=true \
  actor_rollout_ref.rollout.logprobs_mode=processed_logprobs \
  algorithm.rollout_correction.rollout_is=token \
  algorithm.rollout_correction.rollout_is_threshold=2.0 \
  algorithm.rollout_correction.bypass_mode=false \
  "$@"

# quantization=null: verl's own fp8 would patch the same layers.
# bypass_mode=false: with it, the ratio of the loss is taken to the rollout policy already, and a
# weight on top of it would count the difference twice.

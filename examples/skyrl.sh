#!/usr/bin/env bash
# SkyRL 0.3.0: a GRPO run with int8 rollouts. Add your model and data; this is what flashquant adds.
#
# Colocated engines take weights by CUDA IPC, on vLLM 0.23, which SkyRL pins, and on 0.32. Engines that
# are not colocated do so on 0.23 only, if at all: SkyRL's broadcast calls a method that 0.32 lacks.
set -euo pipefail

# For Ray's workers on this machine. On several, export it before `ray start` on each.
export FLASHRL_CONFIG=int8

python3 -m skyrl.train.entrypoints.main_base \
  trainer.algorithm.advantage_estimator=grpo \
  trainer.placement.colocate_all=true \
  generator.inference_engine.backend=vllm \
  generator.inference_engine.model_dtype=bfloat16 \
  generator.inference_engine.engine_init_kwargs.logprobs_mode=processed_logprobs \
  generator.sampling_params.logprobs=1 \
  trainer.algorithm.off_policy_correction.tis_ratio_type=token \
  trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high=2.0 \
  "$@"

# After a refused update SkyRL's wrapper believes that one is still open, and refuses the next:
# restart the engines.

#!/usr/bin/env bash
# SkyRL 0.3.0: a GRPO run with int8 rollouts. Add your model and data; this is what flashquant adds.
#
# SkyRL asks for vLLM 0.23, flashquant for 0.27.1 or newer: colocated engines take weights by CUDA
# IPC there. Engines that are not colocated do not: SkyRL's broadcast calls a method of vLLM 0.23.
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

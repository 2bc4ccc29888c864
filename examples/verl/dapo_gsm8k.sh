#!/usr/bin/env bash
# verl 0.9.1: DAPO's loss on GSM8K with quantized rollouts and the loss correction for them.
#
#   examples/verl/dapo_gsm8k.sh examples/skyrl/qwen2.5-0.5b-int8.env [override=value ...]
#
# The same files as for SkyRL. tis_imp_ratio_cap=2.0 is rollout_is=token, rollout_is_threshold=2.0
# today. GSM8K lies in $DATA, as verl's own examples/data_preprocess/gsm8k.py prepares it. To resample
# groups in which all answers are alike, add algorithm.filter_groups.enable=true where your trainer
# (verl's v1) has it.
set -euo pipefail

if [[ ! -f "${1:-}" ]]; then
  echo "usage: $0 FILE.env [override=value ...]; the files are in ../skyrl" >&2
  exit 2
fi
source "$1"
shift

DATA="${DATA:-$HOME/data/gsm8k}"

python3 -m verl.trainer.main_ppo \
  +ray_kwargs.ray_init.runtime_env.env_vars.FLASHRL_CONFIG="$FLASHRL_CONFIG" \
  data.train_files="$DATA/train.parquet" \
  data.val_files="$DATA/test.parquet" \
  data.train_batch_size="$PROMPTS" \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH" \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
  actor_rollout_ref.actor.clip_ratio_low=0.2 \
  actor_rollout_ref.actor.clip_ratio_high=0.28 \
  actor_rollout_ref.actor.loss_agg_mode=token-mean \
  actor_rollout_ref.actor.use_kl_loss=false \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=16 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.tensor_model_parallel_size="$TENSOR_PARALLEL" \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.rollout.quantization=null \
  actor_rollout_ref.rollout.calculate_log_probs=true \
  actor_rollout_ref.rollout.logprobs_mode=processed_logprobs \
  algorithm.adv_estimator=grpo \
  algorithm.use_kl_in_reward=false \
  algorithm.rollout_correction.rollout_is=token \
  algorithm.rollout_correction.rollout_is_threshold=2.0 \
  algorithm.rollout_correction.bypass_mode=false \
  trainer.n_gpus_per_node="$GPUS" \
  trainer.nnodes=1 \
  "$@"

#!/usr/bin/env bash
# SkyRL 0.3.0: DAPO on GSM8K with quantized rollouts and the loss correction for them.
#
#   examples/skyrl/dapo_gsm8k.sh examples/skyrl/qwen2.5-0.5b-int8.env [override=value ...]
#
# FlashRL's recipes with present-day names: use_tis=true is off_policy_correction.tis_ratio_type=token,
# tis_imp_ratio_cap=2.0 is token_tis_ratio_clip_high=2.0. GSM8K lies in $DATA, as SkyRL's own
# gsm8k example prepares it. See the notes on vLLM and on engines that are not colocated in ../skyrl.sh.
set -euo pipefail

if [[ ! -f "${1:-}" ]]; then
  echo "usage: $0 FILE.env [override=value ...]; the files are beside this script" >&2
  exit 2
fi
set -a # FLASHRL_CONFIG for Ray's workers on this machine; elsewhere, export it before `ray start`
source "$1"
set +a
shift

DATA="${DATA:-$HOME/data/gsm8k}"

python3 -m skyrl.train.entrypoints.main_base \
  data.train_data="['$DATA/train.parquet']" \
  data.val_data="['$DATA/validation.parquet']" \
  environment.env_class=gsm8k \
  trainer.policy.model.path="$MODEL" \
  trainer.placement.colocate_all=true \
  trainer.placement.policy_num_gpus_per_node="$GPUS" \
  trainer.train_batch_size="$PROMPTS" \
  trainer.policy_mini_batch_size="$MINI_BATCH" \
  trainer.max_prompt_length=512 \
  trainer.policy.optimizer_config.lr=1e-6 \
  trainer.algorithm.advantage_estimator=grpo \
  trainer.algorithm.use_kl_loss=false \
  trainer.algorithm.eps_clip_low=0.2 \
  trainer.algorithm.eps_clip_high=0.28 \
  trainer.algorithm.loss_reduction=token_mean \
  trainer.algorithm.dynamic_sampling.type=filter \
  trainer.algorithm.off_policy_correction.tis_ratio_type=token \
  trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high=2.0 \
  generator.n_samples_per_prompt=16 \
  generator.apply_overlong_filtering=true \
  generator.sampling_params.max_generate_length=1024 \
  generator.sampling_params.temperature=1.0 \
  generator.sampling_params.logprobs=1 \
  generator.inference_engine.backend=vllm \
  generator.inference_engine.model_dtype=bfloat16 \
  generator.inference_engine.num_engines="$ENGINES" \
  generator.inference_engine.tensor_parallel_size="$TENSOR_PARALLEL" \
  generator.inference_engine.engine_init_kwargs.logprobs_mode=processed_logprobs \
  "$@"

"""A whole RL run on a laptop: a small decoder learns to add, with rollouts in bf16, int8 or fp8.

python -m examples.rl --quick
"""

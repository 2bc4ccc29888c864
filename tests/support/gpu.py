"""What engines of tests are told of a GPU, where there is one: `python -m pytest` runs on it."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()
# Many small engines share it, in several processes: none may ask for nearly all of its memory,
# which is vLLM's default and has to be free at each start.
SHARE: dict[str, float] = {"gpu_memory_utilization": 0.02} if HAS_GPU else {}

"""`flashquant.patches.diagnostics.examination`, killed in the step that DIES_IN names.

With HANGS, it does not come to an end there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

if os.environ["DIES_IN"] != "import":
    steps = [{"name": "vllm", "verdict": "begun", "detail": ""}]
    if os.environ["DIES_IN"] != "vllm":
        steps += [{"name": "vllm", "verdict": "ok", "detail": "serves the scheme"}]
        steps += [{"name": os.environ["DIES_IN"], "verdict": "begun", "detail": ""}]
    Path(sys.argv[3]).write_text("".join(json.dumps(step) + "\n" for step in steps))
print("ValueError: the kernel wants more", file=sys.stderr, flush=True)
if "HANGS" in os.environ:
    signal.pause()
os.kill(os.getpid(), signal.SIGSEGV)

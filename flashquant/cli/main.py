"""`flashquant` on the command line.

flashquant doctor [--engine|--gpu] [--json]   does it work on this machine? see `cli/doctor.py`
flashquant config [FILE] [--env] [--json]     what does FLASHRL_CONFIG mean here? `cli/config.py`
flashquant inspect --model PATH [NAME]        where does each tensor land? see `cli/inspect.py`
flashquant profile make|sensitivity|inspect|compare|convert    profiles: see `cli/profile.py`
flashquant bench --model PATH                 how long does a sync take here? see `cli/bench.py`
flashquant sync --from FOLDER --to URL        bring a trainer's bundles into servers: `cli/sync.py`
flashquant mismatch FILE.jsonl                what keeps both policies apart? `cli/mismatch.py`

The exit code is 0, 1 where something fails, or 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape

import flashquant
from flashquant.cli import bench as cli_bench
from flashquant.cli import config as cli_config
from flashquant.cli import doctor as cli_doctor
from flashquant.cli import inspect as cli_inspect
from flashquant.cli import mismatch as cli_mismatch
from flashquant.cli import profile as cli_profile
from flashquant.cli import sync as cli_sync
from flashquant.errors import FlashquantError

_FIRST: Final = """\
on a new machine:
  flashquant doctor                    does it work here?
  flashquant config int8               what would FLASHRL_CONFIG=int8 mean?
  flashquant inspect --model FOLDER    where does each tensor of my model land?
  FLASHRL_CONFIG=int8 python train.py  and it is on; without the variable, it is off
"""
_INTERRUPTED: Final = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well."""
    parser = argparse.ArgumentParser(
        prog="flashquant",
        description="fp8 and int8 rollouts in vLLM",
        epilog=_FIRST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {flashquant.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    cli_doctor.add_to(commands)
    cli_profile.add_to(commands)
    cli_bench.add_to(commands)
    cli_config.add_to(commands)
    cli_inspect.add_to(commands)
    cli_sync.add_to(commands)
    cli_mismatch.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except FlashquantError as error:
        said = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(said)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return _INTERRUPTED

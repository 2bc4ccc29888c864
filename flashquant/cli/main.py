"""`flashquant` on the command line.

flashquant doctor [--engine|--gpu] [--json]   does it work on this machine? see `cli_doctor`
flashquant config [FILE] [--env] [--json]     what does FLASHRL_CONFIG mean here? see `cli_config`
flashquant inspect --model PATH [NAME]        where does each tensor land? see `cli_inspect`
flashquant profile make|sensitivity|inspect|compare|convert    profiles: see `cli_profile`
flashquant bench --model PATH                 how long does a sync take here? see `cli_bench`
flashquant sync --from FOLDER --to URL        bring a trainer's bundles into servers: see `cli_sync`
flashquant mismatch FILE.jsonl                what keeps trainer and rollout apart? `cli_mismatch`

The exit code is 0, or 1 where something fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="flashquant", description="fp8 and int8 rollouts in vLLM")
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
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(str(error))}")
        return 1

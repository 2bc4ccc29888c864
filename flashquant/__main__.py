"""`python -m flashquant`: the same as `flashquant` on the command line."""

from __future__ import annotations

import sys

from flashquant.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""What every update is watched for; all of it, unless the environment says otherwise.

FLASHQUANT_LEDGER=0   do not compare where every live tensor is, before and after
FLASHQUANT_DIGEST=0   leave the digest out of reports (`status` still takes it)
FLASHQUANT_UNDO=cache   keep the undo log in the KV cache where no step can run (the default on a
                        GPU); host: never
FLASHQUANT_BRACKET_TIMEOUT=600   roll an update back after so many seconds without its trainer
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from flashquant.config import env


class Checks(BaseModel):
    """What is looked at in every update.

    Attributes:
        ledger: no live tensor changed its address, shape, stride or dtype.
        digest: a fingerprint of everything the kernels read, in every report.
        undo: where undo logs lie: on the "host", or, where they can, in the KV "cache"; "auto" is
            the cache on a GPU.
        bracket_timeout: seconds after which an update that was begun, and into which nothing
            has come since, is rolled back; 0 for never.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ledger: bool = env.LEDGER.default
    digest: bool = env.DIGEST.default
    undo: env.Place = env.UNDO.default
    bracket_timeout: float = Field(default=env.BRACKET_TIMEOUT.default, ge=0, allow_inf_nan=False)


def checks_from_env(environ: Mapping[str, str]) -> Checks:
    """Read FLASHQUANT_LEDGER, FLASHQUANT_DIGEST (unset means on), FLASHQUANT_UNDO and
    FLASHQUANT_BRACKET_TIMEOUT.

    Raises:
        ConfigError: a value that is neither yes nor no, no place, or no number of seconds.

    """
    return Checks(
        ledger=env.LEDGER.read(environ),
        digest=env.DIGEST.read(environ),
        undo=env.UNDO.read(environ),
        bracket_timeout=env.BRACKET_TIMEOUT.read(environ),
    )

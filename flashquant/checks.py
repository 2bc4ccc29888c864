"""Which proofs every reload carries; all of them, unless the environment says otherwise.

FLASHQUANT_LEDGER=0   do not compare where every live tensor is, before and after
FLASHQUANT_DIGEST=0   leave the digest out of reports (`status` still takes it)
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from flashquant.errors import ConfigError

_PREFIX = "FLASHQUANT_"


class Checks(BaseModel):
    """What is looked at in every reload.

    Attributes:
        ledger: no live tensor changed its address, shape, stride or dtype.
        digest: a fingerprint of everything the kernels read, in every report.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ledger: bool = True
    digest: bool = True


def checks_from_env(environ: Mapping[str, str]) -> Checks:
    """Read FLASHQUANT_LEDGER and FLASHQUANT_DIGEST; unset means on.

    Raises:
        ConfigError: a value that is neither yes nor no.

    """
    variables = {field: f"{_PREFIX}{field.upper()}" for field in Checks.model_fields}
    said = {field: environ[name] for field, name in variables.items() if environ.get(name)}
    try:
        return Checks.model_validate(said)
    except ValidationError as wrong:
        field = str(wrong.errors()[0]["loc"][0])
        raise ConfigError(
            f"{variables[field]}={said[field]!r} is neither yes nor no; set it to 1 or 0"
        ) from wrong

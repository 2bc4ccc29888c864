"""Every environment variable that flashquant reads: name, default, meaning, and one parser a kind.

    env.LEDGER.read(os.environ)     True, unless FLASHQUANT_LEDGER says no
    env.check(os.environ)           every one of ours says something that can be, or ConfigError

A variable that is empty counts as unset. `flashquant config --env` prints the table, and
`python -m tools.environment` writes it into docs/environment.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from flashquant.errors import ConfigError

T = TypeVar("T")
Place = Literal["auto", "host", "cache"]

_YES: Final = frozenset({"1", "true", "yes", "on", "y", "t"})
_NO: Final = frozenset({"0", "false", "no", "off", "n", "f"})


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    Attributes:
        name: as the shell has it.
        default: what it means to leave it unset, or empty.
        kind: what may be written, in a word or two.
        meaning: what it does.
        parse: makes a value of what was written; its ValueError says what is wrong with that,
            and what should be, in the words that follow `NAME='...'`.
        ours: whether nobody else reads it, too.

    """

    name: str
    default: T
    kind: str
    meaning: str
    parse: Callable[[str], T]
    ours: bool = True

    def read(self, environ: Mapping[str, str]) -> T:
        """What the environment says, or the default.

        Raises:
            ConfigError: it says something impossible; the message names the variable, what it
                says, and what it should say.

        """
        said = environ.get(self.name)
        if not said:
            return self.default
        try:
            return self.parse(said)
        except ValueError as wrong:
            raise ConfigError(f"{self.name}={said!r} {wrong}") from None

    @property
    def unset(self) -> str:
        """The default, as it would be written."""
        if isinstance(self.default, bool):
            return "1" if self.default else "0"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def means_no(said: str) -> bool:
    """Whether someone wants something to be off, who writes this where a name belongs."""
    return said.strip().lower() in _NO | {"none"}


def _yes_or_no(said: str) -> bool:
    word = said.strip().lower()
    if word not in _YES | _NO:
        raise ValueError("is neither yes nor no; set it to 1 or 0 (or yes/no, true/false, on/off)")
    return word in _YES


def _seconds(said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError("is no number of seconds; set it to one, or to 0 to wait for ever")
    return seconds


def _level(said: str) -> str:
    known = logging.getLevelNamesMapping()
    level = said.strip().upper()
    if level not in known:
        raise ValueError(f"is no level; set it to one of {', '.join(known)}")
    return level


def _place(said: str) -> Place:
    match said.strip().lower():
        case "auto":
            return "auto"
        case "host":
            return "host"
        case "cache":
            return "cache"
    raise ValueError("is no place; set it to auto, host or cache")


def _rank(said: str) -> int:
    if not said.strip().isdecimal():
        raise ValueError("is no rank; set it to a whole number from 0 on")
    return int(said)


CONFIG: Final = Variable(
    "FLASHRL_CONFIG",
    "",
    "name or file",
    "name of a scheme, or a YAML file here or on the Hub (`owner/repo/file.yaml@revision`). Until "
    "it is set, flashquant does nothing, and imports neither torch nor vLLM",
    str,
)
LOGGING_LEVEL: Final = Variable(
    "FLASHRL_LOGGING_LEVEL",
    "INFO",
    "level",
    "level of the logger `flashquant`, in every process where it has no handler",
    _level,
)
LOGGING_FILE: Final = Variable(
    "FLASHRL_LOGGING_FILE",
    "",
    "path",
    "a file for its log beside standard error, shared by all processes",
    str,
)
LMHEAD_FP32: Final = Variable(
    "FLASHRL_LMHEAD_FP32",
    False,
    "yes or no",
    "compute logits in float32 (vLLM's `head_dtype`)",
    _yes_or_no,
)
SAMPLED_LOGPROBS: Final = Variable(
    "FLASHQUANT_SAMPLED_LOGPROBS",
    True,
    "yes or no",
    "return log-probs after temperature, top-k and top-p (`logprobs_mode='processed_logprobs'`); "
    "0 leaves the mode as it is",
    _yes_or_no,
)
LEDGER: Final = Variable(
    "FLASHQUANT_LEDGER",
    True,
    "yes or no",
    "compare address, shape, stride and dtype of every live tensor before and after each update",
    _yes_or_no,
)
DIGEST: Final = Variable(
    "FLASHQUANT_DIGEST",
    True,
    "yes or no",
    "put a digest of all live weights into reports (`status` takes it in any case)",
    _yes_or_no,
)
UNDO: Final[Variable[Place]] = Variable(
    "FLASHQUANT_UNDO",
    "auto",
    "auto, host or cache",
    "where the undo log of an update lies: in host memory (pinned, for a GPU), or, as far as it "
    "can, in the KV cache, which an update makes stale anyway: no memory of its own, and the "
    "device's bandwidth. Requests in flight are then computed anew also after an update that was "
    "refused (docs/decisions/022-undo-in-the-cache.md). `auto`: the cache on a GPU, the host on a "
    "CPU",
    _place,
)
BRACKET_TIMEOUT: Final = Variable(
    "FLASHQUANT_BRACKET_TIMEOUT",
    600.0,
    "seconds",
    "roll back an update into which nothing has come for so long: its trainer has left it; "
    "0 waits for ever",
    _seconds,
)
NATIVE: Final = Variable(
    "FLASHQUANT_NATIVE",
    True,
    "yes or no",
    "quantize with kernels in C (built by `cc` at first use) or Triton; 0 leaves it to torch, "
    "which returns the same bits more slowly",
    _yes_or_no,
)
EMULATE: Final = Variable(
    "FLASHQUANT_EMULATE",
    False,
    "yes or no",
    "on a CPU, serve schemes of which vLLM has kernels for GPUs only (`mxfp8`, `nvfp4`) through "
    "its emulation in software: to try them, for it is slow",
    _yes_or_no,
)
CACHE: Final = Variable(
    "FLASHQUANT_CACHE",
    "",
    "path",
    "folder of the kernels that were built; unset: `flashquant` in `XDG_CACHE_HOME`, or in "
    "`~/.cache`",
    str,
)
CACHE_HOME: Final = Variable(
    "XDG_CACHE_HOME", "", "path", "where caches are, without `FLASHQUANT_CACHE`", str, ours=False
)
COMPILER: Final = Variable(
    "CC", "", "path", "the C compiler; unset: `cc`, `gcc` or `clang` of the PATH", str, ours=False
)
RANK: Final = Variable(
    "RANK",
    -1,
    "rank",
    "torchrun's: under `external_launcher` it says which entry of the file an engine takes",
    _rank,
    ours=False,
)
DP_RANK: Final = Variable(
    "VLLM_DP_RANK",
    0,
    "rank",
    "vLLM's data-parallel rank of an engine that is not told it by an argument: its entry",
    _rank,
    ours=False,
)

VARIABLES: Final[tuple[Variable[Any], ...]] = (
    CONFIG,
    LOGGING_LEVEL,
    LOGGING_FILE,
    LMHEAD_FP32,
    SAMPLED_LOGPROBS,
    LEDGER,
    DIGEST,
    UNDO,
    BRACKET_TIMEOUT,
    NATIVE,
    EMULATE,
    CACHE,
    CACHE_HOME,
    COMPILER,
    RANK,
    DP_RANK,
)
"""All of them, ours first, in the order in which they are shown."""


def check(environ: Mapping[str, str]) -> None:
    """Read every variable of ours, so that a wrong one is refused before anything is done.

    Raises:
        ConfigError: one of them says something impossible.

    """
    for variable in VARIABLES:
        if variable.ours:
            variable.read(environ)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, default and meaning of each variable, as tables show them."""
    for variable in VARIABLES:
        unset = "" if variable is RANK else variable.unset
        yield variable.name, variable.kind, unset, variable.meaning


def markdown() -> str:
    """The table of all variables, for a page."""
    lines = ["| variable | may say | unset | what it does |", "|---|---|---|---|"]
    for name, kind, unset, meaning in rows():
        shown = f"`{unset}`" if unset else ""
        lines.append(f"| `{name}` | {kind} | {shown} | {meaning} |")
    return "\n".join(lines)

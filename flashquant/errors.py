"""What flashquant raises on purpose.

FlashquantError
├── ConfigError                  a YAML file or an environment variable says something impossible
│   └── LocateError              a reference leads to no file, or out of where it may lead
├── ProfileError                 a calibration profile does not fit its model, or cannot be read
├── CorrectionError              a loss correction is set up, or fed, with what it cannot mean
├── PatchError                   a seam in the engine is missing, taken, or shaped differently
│   └── UnsupportedEngine        the engine, or a kernel in it, is none that flashquant knows
└── ReloadError                  a push of weights did not go through
    ├── BrokenDelta              a bundle was cut, or says what cannot be, or is for another engine
    ├── StaleBase                a delta starts from another policy than the one that is served
    ├── UnknownWeight            the engine's loader does not know this name
    ├── MisfitTensor             shape, dtype, device or values of an incoming tensor are wrong
    ├── IncompleteUpdate         a strict update ended before everything had arrived
    ├── TornWeights              the live weights are a mixture, so the engine refuses to serve
    ├── SleepingWeights          the engine has put its weights away, so none can be written
    ├── MovedTensor              a live tensor is not where, or not what, it was
    ├── PeerFailed               another worker refused the update, so this one went back too
    └── WorkerLost               a worker's process ended in the middle of an update

Each takes one message and nothing else, so it pickles on its way from a worker
to the front end. A message says what is, what should be, and what to do. Where
a class is a `ValueError` too, that is what pydantic or the engine's own loader
raises in the same case, and what callers already catch.
"""


class FlashquantError(Exception):
    """Anything flashquant refuses to do."""


class ConfigError(FlashquantError, ValueError):
    """A YAML file or an environment variable says something impossible."""


class LocateError(ConfigError):
    """A reference leads to no file, or out of where it may lead."""


class ProfileError(FlashquantError, ValueError):
    """A calibration profile does not fit its model, or cannot be read."""


class CorrectionError(FlashquantError, ValueError):
    """A loss correction is set up, or fed, with what it cannot mean."""


class PatchError(FlashquantError):
    """A seam in the engine is missing, taken, or shaped differently."""


class UnsupportedEngine(PatchError):
    """The engine, or a kernel in it, is none that flashquant knows."""


class ReloadError(FlashquantError):
    """A push of weights did not go through."""


class BrokenDelta(ReloadError, ValueError):
    """A bundle was cut, contradicts itself, or is for another engine."""


class StaleBase(ReloadError):
    """A delta starts from another policy than the one that the engine serves."""


class UnknownWeight(ReloadError, ValueError):
    """The engine's loader does not know the name of an incoming tensor."""


class MisfitTensor(ReloadError, ValueError):
    """Shape, dtype, device or values of an incoming tensor are wrong."""


class IncompleteUpdate(ReloadError):
    """A strict update ended while layers were half arrived or missing."""


class TornWeights(ReloadError):
    """The live weights are a mixture, so the engine refuses to serve them."""


class MovedTensor(ReloadError):
    """A live tensor changed its address, shape, stride or dtype."""


class SleepingWeights(ReloadError):
    """The engine has put its weights away; there is no memory to write into."""


class PeerFailed(ReloadError):
    """Another worker refused the update, so this one went back to the old weights too."""


class WorkerLost(ReloadError):
    """The process of a worker ended in the middle of an update."""

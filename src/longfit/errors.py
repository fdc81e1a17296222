"""Every error longfit raises on purpose: callers can catch a kind, the command line prints it without a traceback.

    LongfitError
    ├── ConfigError (ValueError)        a setting is wrong: the message says what, got, allowed, do
    │   └── ContextError                context, group size or RoPE settings do not go together
    ├── DataError (ValueError)          the text cannot be read, or nothing in it can be trained on
    ├── ModelError (ValueError)         the model cannot be loaded, quantised, extended, adapted or saved
    ├── RunError                        a run directory is missing, incomplete, or belongs to another run
    │   └── SaveError                   a run cannot be saved: the disk is full, or may not be written
    ├── PlanError                       the run cannot fit the memory it is given
    ├── ProcessesError                  of the processes of a run one has gone, hangs, or sees what the others do not
    ├── ExportError                     what was trained cannot be merged, exported, or written where it should be
    ├── BackendError (RuntimeError)     a forced kernel backend is not available on this machine
    └── PagingError (RuntimeError)      paged optimiser state is damaged, vanished, or belongs to another run

Plain ``ValueError`` and ``TypeError`` mean what they mean in Python: a function of ``numerics`` got bad arguments.
"""


class LongfitError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class ConfigError(LongfitError, ValueError):
    """A setting is wrong."""


class ContextError(ConfigError):
    """Context length, group size or RoPE settings do not go together."""


class DataError(LongfitError, ValueError):
    """The text cannot be read, or nothing in it can be trained on."""


class ModelError(LongfitError, ValueError):
    """The model cannot be loaded, quantised, extended, adapted or saved."""


class RunError(LongfitError):
    """A run directory is missing, incomplete, or belongs to another run."""


class SaveError(RunError):
    """A run cannot be saved; what was saved before stays."""


class PlanError(LongfitError):
    """The run cannot fit the memory it is given."""


class ProcessesError(LongfitError):
    """Of the processes of a run one has gone, hangs, or sees what the others do not; the text names it."""


class ExportError(LongfitError):
    """What was trained cannot be merged, exported, or written where it should be."""


class BackendError(LongfitError, RuntimeError):
    """A forced kernel backend is not available on this machine."""


class PagingError(LongfitError, RuntimeError):
    """Paged optimiser state is damaged, vanished, or belongs to another run."""

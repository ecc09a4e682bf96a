"""The exception tree of the project; it knows neither HTTP nor exit codes.

CodmdError
|-- ConfigError           a setting, preset or machine that cannot work
|-- CheckpointError       weights that are missing, truncated or of another kind
|-- InvalidRequestError   a request that no retry will make good
|-- QueueFullError        come back later; says when
|-- ConflictError         the request contradicts what is there: another body for a key, a result that is not ready
|-- GoneError             it was there, and has expired
|-- StoreError            the job store cannot be used
|-- StorageFullError      no room on a disk
|-- CancelledError        nobody waits for the result any more
`-- GenerationError       a good request that failed while running
"""


class CodmdError(Exception):
    """Root of every error that this project raises on purpose."""


class ConfigError(CodmdError):
    """A setting, preset or machine that cannot work."""


class CheckpointError(CodmdError):
    """Weights that are missing, truncated or of another kind."""


class InvalidRequestError(CodmdError):
    """A request that no retry will make good.

    Args:
        message: what was expected, what came, what to do.
        field: name of the offending field, or None when it concerns several.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(CodmdError):
    """The queue is at its bound.

    Args:
        message: how long the queue is.
        retry_after_s: seconds after which a place is likely to be free, at least 1.
        code: stable machine-readable word.
    """

    def __init__(self, message: str, retry_after_s: int, code: str = "queue_full") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class ConflictError(CodmdError):
    """The request contradicts what is there.

    Args:
        message: what is there.
        code: stable machine-readable word.
    """

    def __init__(self, message: str, code: str = "conflict") -> None:
        super().__init__(message)
        self.code = code


class GoneError(CodmdError):
    """It was there, and has expired."""


class StoreError(CodmdError):
    """The job store cannot be used: unreachable, locked, read-only, corrupt, or of a newer version."""


class StorageFullError(CodmdError):
    """A disk has no room for what would have to be kept."""


class CancelledError(CodmdError):
    """Nobody waits for the result any more."""


class GenerationError(CodmdError):
    """A good request that failed while running.

    Args:
        message: what failed.
        code: stable machine-readable word, for example out_of_memory or worker_died.
    """

    def __init__(self, message: str, code: str = "generation_failed") -> None:
        super().__init__(message)
        self.code = code

"""The exception tree of the project; it knows neither HTTP nor exit codes.

CodmdError
|-- ConfigError           a setting, preset or machine that cannot work
|-- CheckpointError       weights that are missing, truncated or of another kind
|-- InvalidRequestError   a request that fails however often it is retried
|-- QueueFullError        come back later; says when
|-- ConflictError         the request contradicts the state: another body for a key, a result that is not ready
|-- GoneError             the result existed and has expired
|-- StoreError            the job store cannot be used
|-- StorageFullError      a disk is full
|-- CancelledError        the request was cancelled
`-- GenerationError       a valid request that failed while running
"""


class CodmdError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(CodmdError):
    """A setting, preset or machine that cannot work."""


class CheckpointError(CodmdError):
    """Weights that are missing, truncated or of another kind."""


class InvalidRequestError(CodmdError):
    """A request that fails however often it is retried.

    Args:
        message: expected, got, what to do.
        field: name of the offending field; None for several.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(CodmdError):
    """The queue is full.

    Args:
        message: how long the queue is.
        retry_after_s: seconds until a place is likely to be free, at least 1.
        code: stable machine-readable word.
    """

    def __init__(self, message: str, retry_after_s: int, code: str = "queue_full") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class ConflictError(CodmdError):
    """The request contradicts the state of the server.

    Args:
        message: that state.
        code: stable machine-readable word.
    """

    def __init__(self, message: str, code: str = "conflict") -> None:
        super().__init__(message)
        self.code = code


class GoneError(CodmdError):
    """The result existed and has expired."""


class StoreError(CodmdError):
    """The job store cannot be used: unreachable, locked, read-only, corrupt, or of a newer version."""


class StorageFullError(CodmdError):
    """A disk is full."""


class CancelledError(CodmdError):
    """The request was cancelled."""


class GenerationError(CodmdError):
    """A valid request that failed while running.

    Args:
        message: what failed.
        code: stable machine-readable code, for example out_of_memory or worker_died.
    """

    def __init__(self, message: str, code: str = "generation_failed") -> None:
        super().__init__(message)
        self.code = code

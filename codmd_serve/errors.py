"""The exception tree of the project; it knows neither HTTP nor exit codes.

CodmdError
|-- ConfigError           a setting, preset or machine that cannot work
|-- CheckpointError       weights that are missing, truncated or of another kind
|-- InvalidRequestError   a request that no retry will make good
|-- QueueFullError        come back later; says when
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
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


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

"""Why the server does not do what a client asks, with the status that says so."""


class RefusalError(Exception):
    """A request that is answered with an error. `str` is one line for people."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class ClientGoneError(Exception):
    """The client left before its answer was ready; nobody reads what is sent now."""


class InvalidError(RefusalError):
    """A value is not valid, or more than this server allows."""

    status = 422
    code = "invalid_value"


class UnauthorizedError(RefusalError):
    """The key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RefusalError):
    """The Host or Origin header is none that this server answers to."""

    status = 403
    code = "forbidden"


class MissingError(RefusalError):
    """There is no such thing."""

    status = 404
    code = "not_found"


class ConflictError(RefusalError):
    """The job was cancelled."""

    status = 409
    code = "cancelled"


class TooLargeError(RefusalError):
    """The body is longer than this server reads."""

    status = 413
    code = "too_large"


class SlowBodyError(RefusalError):
    """The body did not come in time."""

    status = 408
    code = "timeout"


class QueueFullError(RefusalError):
    """As many requests wait as may."""

    status = 429
    code = "rate_limit_exceeded"


class UnavailableError(RefusalError):
    """The server stops, or the engine cannot be started."""

    status = 503
    code = "unavailable"


class EngineFailedError(RefusalError):
    """The job failed, by no fault of the request that is known."""

    status = 500
    code = "engine_failed"

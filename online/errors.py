"""Named errors, each with its HTTP status and its type and code in OpenAI's error format."""


class SlipstreamError(Exception):
    """Base of every error that a caller may see. `param`: the field at fault, if any."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def body(self) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "message": self.message,
                "type": type(self).type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(SlipstreamError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(SlipstreamError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(SlipstreamError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class Conflict(SlipstreamError):
    """The change was refused: it was based on a state that is no longer the present one."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class Overloaded(SlipstreamError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class Unavailable(SlipstreamError):
    """A part of the service that this call needs is down. Generation is not affected."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"


class ArtifactError(SlipstreamError):
    """Weights are missing, damaged or of another shape. They never reach a device."""

    status = 409
    type = "artifact_error"
    code = "artifact_invalid"


class SignalError(SlipstreamError):
    """This version of the code can't read the signal's record."""

    type = "signal_error"
    code = "signal_unreadable"

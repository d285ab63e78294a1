"""What a call is refused with, in the form that OpenAI's clients expect."""

from typing import Any


class ApiError(Exception):
    """A call that is refused.

    Attributes:
      status: HTTP's.
      message: what was found, and what is accepted.
      param: the field of the body that is to blame, or None.
      code: a word for programs, or None.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

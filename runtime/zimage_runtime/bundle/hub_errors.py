"""Errors of the Hub in one line each. huggingface_hub's own messages are many and long."""

import errno
from collections.abc import Iterator
from pathlib import Path

from ..errors import ZImageRuntimeError


class HubError(ZImageRuntimeError):
    """A model could not be fetched from the Hub."""


def unreachable(error: BaseException) -> str | None:
    """Why the Hub could not be reached; None if it answered."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        if isinstance(cause, HfHubHTTPError):
            status = _status(cause)
            return f"the Hub is down (it answers {status})" if status and status >= 500 else None
        if isinstance(cause, _transport_errors()):
            return f"the connection to the Hub failed ({_first_line(cause)})"
    return None


def not_cached(name: str, reason: str, file: str | None = None) -> HubError:
    """The error for a file that is needed, not in the cache, and because of `reason` not available from the Hub."""
    advice = "unset it to download it" if "OFFLINE" in reason else "run the command again to continue"
    return HubError(f"{name}: {f'{file} is not' if file else 'not completely'} in the cache, and {reason}; {advice}")


def explain(error: BaseException, name: str, revision: str | None, cache: Path) -> HubError:
    """The error to raise instead of one of huggingface_hub's or of the libraries that it uses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for cause in _chain(error):
        match cause:
            case HubError():
                return cause
            case GatedRepoError():
                text = "its authors ask you to accept terms: do so on its page on the Hub, then run `hf auth login`"
            case RepositoryNotFoundError():
                text = (
                    "no such directory, and no such model on the Hub, or it is private: "
                    "check the name, or log in with `hf auth login`"
                )
            case RevisionNotFoundError():
                text = f"has no revision {revision or 'main'!r} on the Hub"
            case HFValidationError():
                text = "no such directory, and not a possible name of a model on the Hub"
            case EntryNotFoundError() if not isinstance(cause, LocalEntryNotFoundError):
                text = f"a file is missing on the Hub: {_first_line(cause)}"
            case HfHubHTTPError() if (status := _status(cause)) and status < 500:
                text = _refusals().get(status) or f"the Hub answers {status}: {_first_line(cause)}"
            case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
                return HubError(f"{cache}: no space left for {name}; free some, or set HF_HOME to another place")
            case OSError(errno=int()) if not isinstance(cause, ConnectionError):
                return HubError(f"{cause.filename or cache}: {cause.strerror}")
            case FileMetadataError() | ValueError() | LookupError():
                text = f"{constants.ENDPOINT} does not answer like a Hub; check HF_ENDPOINT and your proxy"
            case _ if reason := unreachable(cause):
                return not_cached(name, reason)
            case _:
                continue
        return HubError(f"{name}: {text}")
    return HubError(f"{name}: the download failed: {_first_line(error)}; run the command again to continue")


def _refusals() -> dict[int, str]:
    return {
        401: "the Hub does not accept your token; log in again with `hf auth login`",
        403: "the Hub does not let you read it; log in with a token that has access, `hf auth login`",
        429: "the Hub limits your requests; wait a few minutes, or log in with `hf auth login`",
    }


def _transport_errors() -> tuple[type[BaseException], ...]:
    """What the HTTP library raises when there is no answer; the library depends on huggingface_hub's version."""
    from huggingface_hub import errors

    library = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return (library, ConnectionError, TimeoutError)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__

"""What the Hub answers where it refuses, as a line with a remedy and an exit code.

What asking again may mend ends with 75, as another process in the way does: the same command goes
on. A name, a token or a right that is missing is the user's to mend: 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llmpipe.errors import LATER, RESOURCES, Stopped, UserError, first_line
from llmpipe.run.hub import HTTP_CLIENTS
from llmpipe.secrets import REDACTED, redacted

GO_ON = "the same command goes on from what is there"

TOKENS = "https://huggingface.co/settings/tokens"

LONGEST = 300
"""Characters of an answer that are repeated."""


_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


@contextmanager
def asking(repo: str, token: str) -> Iterator[None]:
    """What the Hub refuses here, and a network that fails, is said in a line that holds no token.

    Raises UserError.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        refusal = _refusal(error, repo, token)
        if refusal is None:
            raise
        raise refusal from None


def _refusal(error: Exception, repo: str, token: str) -> UserError | None:
    """What to say of an error of huggingface_hub; None where it is none of the Hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    causes = list(_causes(error))
    answered = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answered is not None:
        headers, status = answered.response.headers, answered.response.status_code
        said = _without(token, answered.server_message or "")
        return _of_status(status, repo, said, headers.get("Retry-After"))
    if status := next(filter(None, map(_status_of_xet, causes)), None):
        return _of_status(status, repo, "", None)
    if any(_is_of_network(cause) for cause in causes):
        why = _without(token, first_line(causes[-1]))
        return UserError(f"push: the Hub cannot be reached: {why}", GO_ON, LATER)
    if isinstance(error, ValueError):  # huggingface_hub's, of a card or an answer
        why = " ".join(_without(token, str(error)).split())
        return UserError(f"push: {repo}: {why}")
    return None


def _of_status(status: int, repo: str, said: str, retry_after: str | None) -> UserError:
    """What an answer means, by its number (RFC 9110)."""
    words = f": {said}" if said else ""
    if status == 401:
        problem = f"push: the Hub does not take the token (HTTP 401){words}"
        hint = f"make one that may write at {TOKENS}; `hf auth login`, or HF_TOKEN"
        return UserError(problem, hint)
    if status == 403:
        problem = f"push: {repo}: the token may not write there (HTTP 403){words}"
        hint = f"a token with the right to write, from {TOKENS}, or a namespace of your own"
        return UserError(problem, hint)
    if status == 404:
        namespace = repo.partition("/")[0]
        problem = f"push: {repo}: not on the Hub, or closed to this token (HTTP 404){words}"
        return UserError(problem, f"is {namespace} spelled right, and are you a member of it?")
    if status in (409, 412):
        problem = f"push: {repo}: somebody else writes there meanwhile (HTTP {status}){words}"
        return UserError(problem, GO_ON, LATER)
    if status == 429:
        wait = f"{retry_after} s" if retry_after and retry_after.isdigit() else "a while"
        problem = f"push: the Hub takes no more requests for now (HTTP 429){words}"
        return UserError(problem, f"wait {wait}; {GO_ON}", LATER)
    if status in (402, 413, 507):
        problem = f"push: {repo}: no room for it on the Hub (HTTP {status}){words}"
        return UserError(problem, "see the storage of your account", RESOURCES)
    if status >= 500 or status == 408:
        problem = f"push: the Hub fails at this moment (HTTP {status}){words}"
        return UserError(problem, f"see https://status.huggingface.co; {GO_ON}", LATER)
    return UserError(f"push: {repo}: the Hub does not take it (HTTP {status}){words}")


def _status_of_xet(error: BaseException) -> int | None:
    """What hf_xet, which knows no responses, writes of one in the text of an error."""
    match = _XET_STATUS.search(str(error))
    return int(match[1]) if match else None


def _is_of_network(error: BaseException) -> bool:
    """Whether a connection failed, as the libraries have it that speak for huggingface_hub."""
    library = type(error).__module__.split(".")[0]
    return library in (*HTTP_CLIENTS, "hf_xet") or isinstance(error, ConnectionError | TimeoutError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _without(token: str, text: str) -> str:
    """The beginning of a text, in one line, less a token, signatures and other secrets."""
    line = " ".join(text.replace(token, REDACTED).split()) if token else " ".join(text.split())
    line = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", line)
    return redacted(line)[:LONGEST]

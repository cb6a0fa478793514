"""Turn errors of the Hugging Face hub's client into one line that says what to do."""

import contextlib
from collections.abc import Iterator

from megatron_moe_lpr.errors import UserError

CLIENT_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "requests")
"""Packages that raise the client's errors: its HTTP library differs between its versions."""


@contextlib.contextmanager
def explain_hub_errors(repository: str, page: str, missing: str, again: str = "start again to go on") -> Iterator[None]:
    """Turn an error of the hub's client inside the block into a UserError.

    Args:
        repository: name on the hub, such as `Qwen/Qwen1.5-1.8B`.
        page: address where a person reads and accepts the repository's conditions.
        missing: hint for a file or revision that does not exist.
        again: hint for a failed connection.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{repository}: accept its conditions at {page}, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repository}: not on the hub, or it asks for a login: {page}") from None
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        is_missing = isinstance(error, errors.EntryNotFoundError | errors.RevisionNotFoundError)
        if is_missing and not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"{repository}: {reason}; {missing}") from None
        if not is_client_error(error):
            raise
        raise UserError(f"{repository}: the hub does not answer: {reason}; {again}") from None


def is_client_error(error: Exception) -> bool:
    """Return whether the hub's client or its HTTP library raised an error, for example without a connection."""
    return type(error).__module__.partition(".")[0] in CLIENT_PACKAGES or isinstance(error, ConnectionError)

"""Shards behind URLs: read as a stream of bytes, listed, and asked for again when the network fails.

``http(s)`` goes through the standard library, object stores through fsspec and the package that it names for them.
Redirects stay on http(s); chained URLs of fsspec, and all schemes but those below, are refused.
"""

from __future__ import annotations

import glob
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from hjepa_data.errors import DataError, one_line
from hjepa_data.random import hash_int

__all__ = [
    "Body",
    "RemoteError",
    "check_url",
    "index_url",
    "is_glob",
    "list_remote",
    "open_remote",
    "read_small",
    "retry",
    "shown",
]

T = TypeVar("T")

_HTTP = ("http", "https")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec", "file": "fsspec"}
_CHUNK = 1 << 20
_SLOWEST = 1 << 10
_LONGEST_WAIT = 30.0
# An index has some hundred bytes a sample.
_MAX_SMALL_BYTES = 1 << 28
_MISSING = (403, 404, 410)
_BUSY = (408, 425, 429)


class RemoteError(Exception):
    """One attempt failed.

    Args:
        reason: in one line, without the URL.
        passing: whether another attempt may succeed.
        missing: whether there is nothing at the URL, or nothing that we may see.
    """

    def __init__(self, reason: object, *, passing: bool = False, missing: bool = False) -> None:
        super().__init__(one_line(reason))
        self.passing = passing
        self.missing = missing


@dataclass(slots=True)
class Body:
    """What lies behind a URL.

    Attributes:
        size: bytes, as the server says; None if it does not.
        chunks: the bytes, once.
    """

    size: int | None
    chunks: Iterator[bytes]


def shown(url: str) -> str:
    """Write a URL for a message: without its query and its user, which may be secrets."""
    scheme, _, rest = url.partition("://")
    rest, mark, _ = rest.partition("?") if scheme in _HTTP else (rest, "", "")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?...' if mark else ''}"


def check_url(url: str) -> None:
    """Refuse what is no URL of a shard.

    Args:
        url: without braces.

    Raises:
        DataError: the scheme is unknown, or the URL is chained, names a list file or a compressed tar, or holds a user.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in (*_HTTP, *_PACKAGES) or (scheme in _PACKAGES and "::" in url):
        raise DataError(one_line(f"'{shown(url)}': no URL of a shard; allowed: http, https, s3 and gs, unchained"))
    path = urlsplit(url).path if scheme in _HTTP else rest
    if path.endswith((".txt", ".list")):
        raise DataError(f"'{shown(url)}': list files are read from local files only; download it and give its path")
    if path.endswith((".gz", ".tgz", ".xz", ".bz2", ".zst")):
        raise DataError(f"'{shown(url)}' is compressed: samples are read at their offset; publish it as a plain .tar")
    if scheme in _HTTP and "@" in urlsplit(url).netloc:
        raise DataError(f"'{shown(url)}': a user in a URL is not sent; publish the shards without a password")
    if scheme in _HTTP and (glob.has_magic(path.replace("?", "")) or path.endswith("/") or not path):
        raise DataError(
            f"'{shown(url)}': http lists no files; name the shards by braces, such as train-{{000000..000099}}.tar"
        )


def is_glob(url: str) -> bool:
    """Say whether a checked URL names the files of a folder or pattern, not one file."""
    scheme, _, rest = url.partition("://")
    return scheme not in _HTTP and (glob.has_magic(rest) or rest.endswith("/"))


def index_url(url: str) -> str:
    """Name the index that a shard's publisher leaves beside it."""
    if url.partition("://")[0] not in _HTTP:
        return url + ".index.json"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path + ".index.json"))


def list_remote(url: str, *, timeout: float = 60.0, attempts: int = 5, first_wait: float = 0.5) -> list[str]:
    """List the shards that a glob or a folder of an object store names.

    Args:
        url: with ``*``, ``?`` or ``[...]``, or a folder that ends in ``/``.
        timeout: longest that a list may take, seconds.
        attempts: how often to try.
        first_wait: pause after the first failure, seconds.

    Returns:
        URLs, sorted.

    Raises:
        DataError: nothing matches, or the store cannot be asked.
    """
    pattern = url + "*.tar" if url.endswith("/") else url

    def ask() -> list[str]:
        files = _file_system(url)
        with _reasons(Exception):
            return sorted(str(files.unstrip_protocol(name)) for name in files.glob(pattern, timeout=timeout))

    found = retry(ask, url, attempts=attempts, first_wait=first_wait)
    if not found:
        raise DataError(f"no shard matches '{pattern}'")
    return found


@contextmanager
def open_remote(url: str, *, timeout: float) -> Iterator[Body]:
    """Open what lies behind a URL.

    Args:
        url: as ``check_url`` allows it.
        timeout: longest silence of a server, seconds.

    Yields:
        Its size and its bytes.

    Raises:
        RemoteError: this attempt failed.
        DataError: the package for this scheme is not installed.
    """
    if url.partition("://")[0] in _HTTP:
        # A ValueError for what is no ASCII.
        with _reasons(OSError, http.client.HTTPException, ValueError):
            response = _opener().open(urllib.request.Request(url), timeout=timeout)
        with response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else None
            yield Body(size, _chunks(response.read1, size, timeout, OSError, http.client.HTTPException))
        return
    files = _file_system(url)
    with _reasons(Exception):
        size = files.size(url)
        file = files.open(url, "rb")
    with file:
        yield Body(size, _chunks(file.read, size, timeout, Exception))


def read_small(url: str, *, timeout: float) -> bytes | None:
    """Read a small file.

    Args:
        url: as ``check_url`` allows it.
        timeout: longest silence of a server, seconds.

    Returns:
        Its bytes; None if there is none, or it is not small.

    Raises:
        RemoteError: this attempt failed.
        DataError: the package for this scheme is not installed.
    """
    data = bytearray()
    try:
        with open_remote(url, timeout=timeout) as body:
            for chunk in body.chunks:
                data += chunk
                if len(data) > _MAX_SMALL_BYTES:
                    return None
    except RemoteError as error:
        if error.missing:
            return None
        raise
    return bytes(data)


def retry(action: Callable[[], T], url: str, *, attempts: int = 5, first_wait: float = 0.5) -> T:
    """Try until it succeeds: attempt k + 1 comes ``first_wait * 2^k * u`` seconds after attempt k, u in [0.5, 1).

    u is a hash of the URL, the process and k, so that processes that failed together do not return together.

    Args:
        action: raises ``RemoteError`` where an attempt fails.
        url: for the message.
        attempts: how often to try.
        first_wait: seconds.

    Returns:
        What the action gives.

    Raises:
        DataError: no attempt succeeded, or the failure is none that passes.
    """
    for attempt in range(attempts):
        try:
            return action()
        except RemoteError as error:
            if not error.passing or attempt + 1 == attempts:
                times = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"
                raise DataError(f"'{shown(url)}' cannot be fetched: {error} ({times})") from None
        jitter = 0.5 + hash_int(zlib.crc32(url.encode()), os.getpid(), attempt) / 2**65
        time.sleep(min(_LONGEST_WAIT, first_wait * 2.0 ** min(attempt, 64)) * jitter)
    raise AssertionError("attempts >= 1")


def _opener() -> urllib.request.OpenerDirector:
    # The usual opener would follow a redirect to ftp, and knows file: and data: besides.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _file_system(url: str) -> Any:  # noqa: ANN401 (fsspec has no types)
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    scheme = url.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        package = _PACKAGES[scheme]
        raise DataError(
            f"'{shown(url)}': {scheme}:// needs the package {package}, which is not installed; pip install {package}"
        ) from None


def _chunks(
    read: Callable[[int], bytes], size: int | None, timeout: float, *failures: type[Exception]
) -> Iterator[bytes]:
    count = lately = 0
    began = time.monotonic()
    while True:
        with _reasons(*failures):
            chunk = read(_CHUNK)
        if not chunk:
            break
        count += len(chunk)
        lately += len(chunk)
        elapsed = time.monotonic() - began
        if elapsed > timeout:
            if lately < _SLOWEST * elapsed:
                raise RemoteError(f"it gave {lately} bytes in {elapsed:.0f} s", passing=True)
            lately, began = 0, time.monotonic()
        yield chunk
    if size is not None and count != size:
        raise RemoteError(f"it ended after {count} of {size} bytes", passing=True)


@contextmanager
def _reasons(*failures: type[Exception]) -> Iterator[None]:
    """Say of a failure of one attempt whether it may pass."""
    try:
        yield
    except RemoteError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        passing = error.code >= 500 or error.code in _BUSY
        reason = f"HTTP {error.code} {error.reason}"
        raise RemoteError(reason, passing=passing, missing=error.code in _MISSING) from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        reason = "no access" if isinstance(error, PermissionError) else "no such file"
        raise RemoteError(reason, missing=True) from None
    except failures as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        said = f"{type(cause).__name__}: {cause}".removesuffix(": ") if isinstance(cause, Exception) else cause
        wrong = (ssl.SSLCertVerificationError, http.client.InvalidURL, ValueError, TypeError)
        raise RemoteError(said, passing=not isinstance(cause, wrong)) from None

"""The local cache of remote shards: fetched whole, verified, shared by processes, bounded.

In the folder lie, for each URL, ``<hash of the URL>.index.json`` (what is published, or else what a scan found), and
while they are kept ``<hash of the URL>-<hash of the content>.tar``. A tar gets its name when it is whole and verified;
until then it is ``.part``. Who fetches holds a lock on ``.lock``, which the system takes from a process that dies. Who
reads holds a shared lock on the tar itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hjepa_data.errors import DataError, refuse
from hjepa_data.shards.index import (
    ShardIndex,
    StoredIndex,
    index_path,
    load_index,
    scan_shard,
    sha256_of,
    write_index,
)
from hjepa_data.shards.remote import Body, RemoteError, index_url, open_remote, read_small, retry, shown

__all__ = ["CacheConfig", "RemoteShard", "ShardCache"]

_NAME_DIGITS = 24
_LOOK_AGAIN = 0.05


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """Where remote shards are kept, and how they are fetched.

    Attributes:
        folder: on a local disk; None is ``$HJEPA_CACHE``, or ``~/.cache/hjepa/shards``.
        max_bytes: of the shards in the folder. Where one more would not fit, those used longest ago are deleted. Give
            room for two windows: with less, shards are fetched again and again.
        attempts: how often a request is tried before it has failed.
        first_wait: pause after the first failure, seconds; it doubles with each failure, up to 30.
        timeout: longest silence of a server, seconds; one that gives less than 1 KiB/s for so long is silent too. As
            long may an object store take to list its files.
        retry_after: how long a process takes a shard that could not be fetched as given up, seconds. Streams that skip
            what they cannot read do not wait for every sample of such a shard.
    """

    folder: str | None = None
    max_bytes: int = 100_000_000_000
    attempts: int = 5
    first_wait: float = 0.5
    timeout: float = 60.0
    retry_after: float = 60.0

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            refuse("max_bytes", self.max_bytes, "no shard fits", "allowed: 1 and more, bytes")
        if self.attempts < 1:
            refuse("attempts", self.attempts, "nothing is ever fetched", "allowed: 1 and more")
        if not 0 <= self.first_wait < float("inf"):
            refuse("first_wait", self.first_wait, "no pause", "allowed: 0 and more, seconds")
        if not 0 < self.timeout < float("inf"):
            refuse("timeout", self.timeout, "no server is so fast", "allowed: more than 0, seconds")
        if not 0 <= self.retry_after < float("inf"):
            refuse("retry_after", self.retry_after, "no pause", "allowed: 0 and more, seconds")


@dataclass(kw_only=True, slots=True)
class RemoteShard:
    """What is known of a remote shard once its samples are numbered.

    Attributes:
        url: where it is.
        size: bytes.
        sha256: checksum of the whole shard; None where its index has none.
    """

    url: str
    size: int
    sha256: str | None


class ShardCache:
    """Remote shards as local files.

    A shard at a URL is taken not to change: a new one needs a new name, or an empty cache.

    Args:
        config: where and how.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        folder = config.folder or os.environ.get("HJEPA_CACHE") or "~/.cache/hjepa/shards"
        self.folder = Path(folder).expanduser()
        self._given_up: dict[str, tuple[float, str]] = {}

    def index(self, url: str, *, allow_truncated: bool = False) -> tuple[ShardIndex, RemoteShard]:
        """Learn where the samples of a shard lie, from its published index if there is one.

        Args:
            url: of the shard.
            allow_truncated: keep the complete samples of a tar that is cut off, instead of refusing it.

        Returns:
            Its index, and what is needed to open it.

        Raises:
            DataError: the shard cannot be fetched, is damaged or cut off, or holds no image.
        """
        key = self._key(url)
        stored = _stored(key)
        if stored is None:
            with self._writing(), _locked(key):
                stored = _stored(key) or self._published(url, key)
                if stored is None:
                    return self._scanned(url, key, allow_truncated)
        return stored.index, RemoteShard(url=url, size=stored.stamp[0], sha256=stored.index.sha256)

    def open(self, shard: RemoteShard) -> int:
        """Open a shard for reading; it is fetched if it is not here, by one process while the others wait.

        Args:
            shard: what ``index`` gave.

        Returns:
            A file descriptor, to be closed by the caller. It can be read to the end even if the shard is deleted.

        Raises:
            DataError: the shard cannot be fetched, or is not the one that was indexed.
        """
        key = self._key(shard.url)
        path = _tar_path(key, shard)
        file = _open_whole(path, shard.size)
        if file is None:
            with self._writing(), _locked(key):
                file = _open_whole(path, shard.size)
                if file is None:
                    file = self._open_fetched(shard, key, path)
        return file

    def verify(self, shard: RemoteShard) -> None:
        """Read a shard once and compare it with the sha256 of its index; a copy that differs is fetched again.

        Args:
            shard: what ``index`` gave.

        Raises:
            DataError: the index has no checksum, or what is fetched has another one.
        """
        if shard.sha256 is None:
            raise DataError(
                f"shard '{shown(shard.url)}' has no checksum; publish an index made by 'hjepa-shards index'"
            )
        path = _tar_path(self._key(shard.url), shard)
        os.close(self.open(shard))
        with self._writing(), suppress(FileNotFoundError):
            if sha256_of(path) != shard.sha256:
                path.unlink()
                os.close(self.open(shard))

    def _key(self, url: str) -> Path:
        return self.folder / hashlib.sha256(url.encode()).hexdigest()[:_NAME_DIGITS]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise DataError(f"the cache of shards '{self.folder}' cannot be used: {error.strerror or error}") from None

    def _open_fetched(self, shard: RemoteShard, key: Path, path: Path) -> int:
        until, failure = self._given_up.get(shard.url, (0.0, ""))
        if time.monotonic() < until:
            raise DataError(failure)
        try:
            # A full disk is given up, too.
            with self._writing(), self._fetched(shard.url, key, shard) as (part, _):
                return self._keep(part, path)
        except DataError as error:
            self._given_up[shard.url] = (time.monotonic() + self.config.retry_after, str(error))
            raise

    def _published(self, url: str, key: Path) -> StoredIndex | None:
        data = retry(
            lambda: read_small(index_url(url), timeout=self.config.timeout),
            index_url(url),
            attempts=self.config.attempts,
            first_wait=self.config.first_wait,
        )
        if data is None:
            return None
        aside = key.with_name(key.name + ".new")
        index_path(aside).write_bytes(data)
        stored = _stored(aside)
        if stored is None:
            # Many servers answer with a page where there is nothing.
            index_path(aside).unlink()
        else:
            os.replace(index_path(aside), index_path(key))
        return stored

    def _scanned(self, url: str, key: Path, allow_truncated: bool) -> tuple[ShardIndex, RemoteShard]:
        with self._fetched(url, key, None) as (part, shard):
            # As long as it has no name of its own, nobody deletes it.
            try:
                try:
                    index = write_index(part)
                except DataError:
                    if not allow_truncated:
                        raise
                    index = scan_shard(part, allow_truncated=True)
                else:
                    os.replace(index_path(part), index_path(key))
            except DataError as error:
                # Its owner knows the shard by its URL.
                raise DataError(str(error).replace(str(part), shown(url))) from None
            os.close(self._keep(part, _tar_path(key, shard)))
        return index, shard

    @contextmanager
    def _fetched(self, url: str, key: Path, expected: RemoteShard | None) -> Iterator[tuple[Path, RemoteShard]]:
        """Fetch a shard whose lock is held; what is not kept is deleted."""
        part = key.with_suffix(".part")

        def attempt() -> RemoteShard:
            if expected is not None:
                # Before anything is asked of the server: it may take as long as others fetch.
                self._reserve(url, part, expected.size)
            with open_remote(url, timeout=self.config.timeout) as body:
                return self._receive(url, body, part, expected)

        try:
            yield part, retry(attempt, url, attempts=self.config.attempts, first_wait=self.config.first_wait)
        finally:
            part.unlink(missing_ok=True)

    def _receive(self, url: str, body: Body, part: Path, expected: RemoteShard | None) -> RemoteShard:
        size = body.size if expected is None else expected.size
        if body.size is not None and body.size != size:
            raise RemoteError(f"it has {body.size} bytes, but {size} in its index; make and publish the index anew")
        if expected is None:
            self._reserve(url, part, size or 0)
        digest, count = hashlib.sha256(), 0
        with open(part, "r+b") as file:
            for chunk in body.chunks:
                file.write(chunk)
                digest.update(chunk)
                count += len(chunk)
                if size is not None and count > size:
                    raise RemoteError(f"it goes on after the {size} bytes of its index")
                if count > self.config.max_bytes:
                    raise RemoteError(f"it is larger than the whole cache, max_bytes={self.config.max_bytes}")
            file.flush()
            os.fsync(file.fileno())
        if size is not None and count != size:
            raise RemoteError(f"it ended after {count} of {size} bytes", passing=True)
        found = digest.hexdigest()
        if expected is not None and expected.sha256 not in {None, found}:
            raise RemoteError(
                f"sha256 {found[:12]}..., but {str(expected.sha256)[:12]}... in its index; publish it again"
            )
        return RemoteShard(url=url, size=count, sha256=found if expected is None else expected.sha256)

    def _keep(self, part: Path, path: Path) -> int:
        """Give a fetched shard its name, open and leased, so that nobody deletes it in between."""
        file = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(file, fcntl.LOCK_SH)
        # Who makes room lists both kinds of files, and must not miss one that changes its kind.
        with _locked(self.folder / "room"):
            os.replace(part, path)
            # Its size was not reserved where nobody said it before.
            self._evict(path, os.fstat(file).st_size)
        return file

    def _reserve(self, url: str, part: Path, size: int) -> None:
        """Reserve room for a shard, and wait for those that others fetch where there is none."""
        if size > self.config.max_bytes:
            raise DataError(
                f"shard '{shown(url)}' has {size} bytes, more than the whole cache, max_bytes={self.config.max_bytes}"
            )
        while not self._make_room(part, size):
            time.sleep(_LOOK_AGAIN)

    def _make_room(self, part: Path, size: int) -> bool:
        """Reserve room for a shard; False if those that others fetch take it all."""
        with _locked(self.folder / "room"):
            for other in self.folder.glob("*.part"):
                if other != part:
                    _delete(other, other.with_suffix(".lock"))
            fits = self._evict(part, size)
            # As long as it will be: others that make room count it.
            part.touch()
            os.truncate(part, size if fits else 0)
            return fits

    def _evict(self, new: Path, size: int) -> bool:
        """Delete shards until a new file fits, those used longest ago first; whether it fits then."""
        others = [path for kind in ("*.tar", "*.part") for path in self.folder.glob(kind) if path != new]
        sizes = dict(_by_use(others))
        over = size + sum(sizes.values()) - self.config.max_bytes
        tars = [path for path in sizes if path.suffix == ".tar"]
        # What is being read is deleted last: it can be read to its end, but its room is free only then.
        for forced in (False, True):
            for path in [*tars]:
                if over > 0 and (_unlink(path) if forced else _delete(path, path)):
                    over -= sizes[path]
                    tars.remove(path)
        return over <= 0


def _tar_path(key: Path, shard: RemoteShard) -> Path:
    content = shard.sha256[:_NAME_DIGITS] if shard.sha256 else f"{shard.size}"
    return key.with_name(f"{key.name}-{content}.tar")


def _stored(key: Path) -> StoredIndex | None:
    try:
        stored = load_index(key)
    except (OSError, ValueError):
        return None
    return stored if stored is not None and len(stored.index) else None


def _open_whole(path: Path, size: int) -> int | None:
    """Open and lease a shard of the cache; None if it is not there, or not whole."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"'{path}' in the cache of shards cannot be read: {error.strerror}") from None
    if os.fstat(file).st_size != size:
        os.close(file)
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(OSError):
        os.utime(file)
    return file


@contextmanager
def _locked(key: Path) -> Iterator[None]:
    # Lock files stay: to delete one that somebody is about to lock would let two in.
    file = os.open(key.with_name(key.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough where a child that was forked meanwhile holds the file too.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _by_use(paths: list[Path]) -> list[tuple[Path, int]]:
    """Paths and sizes of the files that still exist, those used longest ago first."""
    found: list[tuple[int, Path, int]] = []
    for path in paths:
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, path, stat.st_size))
    return [(path, size) for _, path, size in sorted(found)]


def _delete(path: Path, lock: Path) -> bool:
    """Delete a file unless somebody holds its lock."""
    try:
        file = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return _unlink(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _unlink(path)
    except BlockingIOError:
        return False
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True

"""One program at a time trains in the folder of a run: two would tear its metrics and remove their checkpoints."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hjepa_pretrain.settings import SettingsError

LOCK_FILE = ".lock"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other programs out of a run's folder; one that has gone, however it went, keeps nobody out.

    The lock is the process's own: its loaders do not hold it, and what torchrun starts again may take it.

    Args:
        folder: of the run.

    Raises:
        SettingsError: another program trains there, or the folder cannot be written.
    """
    try:
        opened = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise SettingsError(
            f"run.dir={folder}: cannot be written ({error.strerror}); go on in a copy of it, or choose another (what a "
            "finished run has learned stands in its report.html and results.json)"
        ) from error
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some file systems of clusters know no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise SettingsError(
                    f"run.dir={folder}: another program trains there; wait for its end, or choose another folder (if "
                    f"none does any more, on no machine, remove {folder / LOCK_FILE})"
                ) from error
        yield

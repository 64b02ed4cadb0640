"""One run at a time in a folder: a lock that names its owner and dies with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from llm_streamline.errors import UserError
from llm_streamline.files import is_storage_failure, remove, storage_sentence, write_text

LOCK = ".lock"  # how the names of all its files begin, which are no contents of the folder
_OWNER = f"{LOCK}-owner"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, and leave it as if there had been no lock.

    The system frees the lock of a process that was killed, so files that such a one left are taken over.
    Errors: UserError where another run holds it, or where nothing can be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"-o {folder} is in use by another run ({_owner(folder)}); wait for it, stop it, or give another folder."
        ) from error
    except OSError as error:
        _remove_empty(made)
        if is_storage_failure(error):
            raise UserError(storage_sentence(error, folder)) from error
        raise
    try:
        began = datetime.now().astimezone().isoformat(" ", "seconds")
        write_text(folder / _OWNER, f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
        yield
    finally:
        remove(folder / _OWNER)
        remove(folder / LOCK)  # while it is held: who waits for the old file must not take it from the next owner
        lock.release()
        _remove_empty(made)


def _owner(folder: Path) -> str:
    """Who holds the lock, in words; it may be gone, or not have written yet."""
    with suppress(OSError):
        return (folder / _OWNER).read_text(encoding="utf-8").strip()
    return "it has just begun or ended"


def _remove_empty(folders: list[Path]) -> None:
    """Delete those of nested folders, innermost first, that hold nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()

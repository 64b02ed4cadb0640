"""Writes that are whole or absent: a temporary name beside the target, then a rename."""

from __future__ import annotations

import errno
import hashlib
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_streamline.errors import StreamlineError, UserError

TEMPORARY = ".partial-"
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder, the caller makes it) that becomes `target` if the block succeeds.

    It lies in a folder of its own: what a library writes beside it while saving is known for a leftover, too.
    Errors: UserError for a full disk or a place that cannot be written; nothing is left behind in either case.
    """
    own = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        own.mkdir(parents=True)
        yield own / target.name
        (own / target.name).replace(target)
        remove(own)
    except BaseException as error:
        remove(own)
        if is_storage_failure(error):
            raise UserError(storage_sentence(error, target)) from error
        raise


@contextmanager
def storage_guard(target: Path) -> Iterator[None]:
    """Errors: UserError for a full disk or a place that cannot be written, in one sentence."""
    try:
        yield
    except OSError as error:
        if is_storage_failure(error):
            raise UserError(storage_sentence(error, target)) from error
        raise


def write_text(target: Path, text: str) -> None:
    with atomic(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written in `folder` and below."""
    for path in sorted(folder.rglob(f"{TEMPORARY}*")):
        remove(path)


def is_storage_failure(error: BaseException) -> bool:
    """Whether a write failed for the disk's sake; safetensors wraps the system's error in its text."""
    if isinstance(error, StreamlineError):
        return False
    numbers = (errno.ENOSPC, errno.EDQUOT, *_UNWRITABLE)
    return (isinstance(error, OSError) and error.errno in numbers) or "No space left on device" in str(error)


def storage_sentence(error: BaseException, target: Path) -> str:
    target = Path(*(part for part in target.parts if not part.startswith(TEMPORARY)))  # by the name it would have had
    if getattr(error, "errno", None) in _UNWRITABLE:
        return f"cannot write {target}: choose an output folder (-o) that you may write to."
    free = shutil.disk_usage(existing_parent(target)).free
    return (
        f"the disk is full: {target} could not be written with {free / 1e9:.2f} GB free; "
        "free some space or choose another output folder (-o), and repeat the command to continue."
    )


def free_space(folder: Path | None) -> int:
    """Bytes free for a folder where it is, or would be made; here, where none is named.

    What it holds counts as free: an earlier run has written it, and the estimate of a run is of all that it writes.
    """
    own = [path.lstat() for path in folder.rglob("*")] if folder else []
    held = sum(getattr(one, "st_blocks", 0) * 512 for one in own if not stat.S_ISDIR(one.st_mode))
    return shutil.disk_usage(existing_parent((folder or Path()) / "x")).free + held


def existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def sha256(*chunks: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()

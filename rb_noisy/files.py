"""Files that are either whole or absent: written beside their place, then renamed into it; and digests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import lzma
import os
import shutil
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rb_noisy.errors import InputError

# What reading an .npz raises that is not the one that was written.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, EOFError, AttributeError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError, MemoryError, OverflowError),
    *(SyntaxError, tokenize.TokenError),  # a header of .npy is Python
)


def user_path(text: str | os.PathLike) -> Path:
    """A path as somebody wrote it, ~ and ~USER included.

    Raises:
        InputError: there is no such user, or no path can be so long.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{text} names no home folder there is ({error}): write the path out") from error
    except ValueError as error:  # a NUL
        raise InputError(f"{str(text)!a} cannot be a path ({error}): check it") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            start, length = str(text)[:100], len(str(text))
            raise InputError(f"the path {start}… of {length} characters is too long: check it") from error
    return path  # whether anything is there, whoever reads it finds out


def refuse_streams(path: Path) -> None:
    """Raise `InputError` if a path is a named pipe, a device or a socket, which would be waited for without an end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is no regular file but a pipe, a device or a socket: give a file")


ABANDONED = 3600.0  # seconds without a change after which an unlockable temporary folder is nobody's
CHANGES = 60.0  # seconds: far longer than reading, changing and writing a file of figures takes

_UMASK = os.umask(0)  # which only setting it tells
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; on success what was written there takes the place of `path`, on failure it goes.

    It lies beside `path` in a new folder that only this writer can enter: neither another container's writer, which may
    have the same PID, nor a link that somebody has planted can be met there, and what a library writes beside it
    meanwhile goes with it. What writers of `path` that were killed left is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_by_killed(path)
    try:
        with _own_folder(path) as folder:
            temporary = folder / f".new{path.suffix}"  # numpy.savez and matplotlib read the format from the suffix
            yield temporary
            os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors lets nobody else read what it writes
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is not None and (error.filename is None or _is_temporary(str(error.filename), path)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _ends(path: Path) -> tuple[str, str]:
    """What the name of a folder for writing `path` begins and ends with; between them is what tells writers apart."""
    return f".{path.stem}.", f".tmp{path.suffix}"


def _is_temporary(name: str, path: Path) -> bool:
    prefix, suffix = _ends(path)
    places = (Path(name).name, Path(name).parent.name)
    return any(place.startswith(prefix) and place.endswith(suffix) for place in places)


@contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, with a random name, locked for as long as this process lives; it goes at the end."""
    prefix, suffix = _ends(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # taken for a killed writer's before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _free(handle)


def remove_left_by_killed(path: str | os.PathLike) -> None:
    """Remove what writers of `path` that were killed left beside it; what living ones write stays."""
    path = Path(path)
    prefix, suffix = map(glob.escape, _ends(path))
    for left in path.parent.glob(f"{prefix}*{suffix}"):
        remove_abandoned(left)


def remove_abandoned(left: Path) -> None:
    """Remove a folder (or file, of an earlier version) of an `atomic_path`, unless its writer lives.

    The lock tells, not a PID, which means nothing in another container. Where there are no locks, one that has not
    changed for an hour is abandoned. One that may not be removed stays; a link goes, not what it links to.
    """
    with contextlib.suppress(OSError):
        if left.is_symlink():
            left.unlink()
            return
        handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not _is_abandoned(left, handle):
                return
            if left.is_dir():  # while it is locked: a writer that is about to lock it looks whether it is still there
                shutil.rmtree(left)
            else:
                left.unlink()
        finally:
            os.close(handle)


def _is_abandoned(left: Path, handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - max(place.lstat().st_mtime for place in (left, *left.glob("*"))) > ABANDONED
    return True


@contextmanager
def only_writer(folder: str | os.PathLike, patience: float = 0.0) -> Iterator[None]:
    """Keep a folder to oneself; what another process keeps is refused, and its end, however it comes, frees it.

    Args:
        patience: seconds to wait for another process' end.

    Raises:
        InputError: another holds the folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(handle, patience):
            raise InputError(f"another process writes to {folder}; wait for its end, or name another folder")
        yield
    finally:
        _free(handle)


@contextmanager
def only_changer(path: str | os.PathLike) -> Iterator[None]:
    """Let nobody else change `path` while it is read, changed and written; waits for those who do.

    The lock is a file beside it, because `path` itself is replaced by every change. It goes with its last holder.

    Raises:
        InputError: another process keeps it for longer than any change takes.
        OSError: nothing can be written there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + CHANGES
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(handle, deadline - time.monotonic()):
                raise InputError(
                    f"another process has been changing {path} for {CHANGES:g} seconds; end it and try again"
                )
            if not _is_at(lock, handle):  # the last holder has just removed it
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            _free(handle)


def _lock(handle: int, patience: float) -> bool:
    """Lock an open file or folder; whether it could be had within so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return True
        else:
            return True


def _free(handle: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to processes that were forked meanwhile
    os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def md5_of(content: bytes) -> str:
    """The MD5 of bytes, in hexadecimal: what official data sets are known by."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

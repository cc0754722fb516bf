"""Files that are either whole or absent: written beside their place, then renamed into it; and digests."""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import os
import struct
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


_UMASK = os.umask(0)  # which only setting it tells
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it takes the place of `path`, on failure it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because numpy.savez and matplotlib read the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # as `left_by_killed` finds it
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors lets nobody else read what it writes
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def left_by_killed(path: str | os.PathLike) -> list[Path]:
    """The temporary files of writers of `path` that were killed; of living ones too, so ask when none writes."""
    path = Path(path)
    return sorted(path.parent.glob(f".{glob.escape(path.stem)}.*.tmp{path.suffix}"))


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a folder to oneself; what another process keeps is refused, and its end, however it comes, frees it.

    Raises:
        InputError: another holds the folder.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process writes to {folder}; wait for its end, or name another folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


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

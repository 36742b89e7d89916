"""Files that are either whole or not there, and an error that names them where they cannot be."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from stat import S_IMODE
from threading import get_ident
from time import monotonic, sleep
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigendamage.errors import (
    EigenDamageError,
    FileError,
    FileFormatError,
    MissingFileError,
    NotAFolderError,
)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_PATIENCE_S = 5.0
"""How long a writer waits for another that moves its files; that takes milliseconds."""
_MOMENT_S = 0.1
"""How long a run waits for a writer; what keeps the folder for longer is another run."""
_PAUSE_S = 0.01


@contextmanager
def opened(path: Path, what: str) -> Generator[BinaryIO]:
    """A file to read bytes from; ``what`` is what messages call it.

    Raises:
        MissingFileError: if there is no such file.
        FileError: if it cannot be read.
    """
    path = path_of(path)
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no {what} at '{path}'; check the path") from error
    except OSError as error:
        raise FileError(f"cannot read the {what} at '{path}': {error.strerror}") from error
    with stream:
        yield stream


@contextmanager
def written_beside(path: str | Path) -> Generator[Path]:
    """A path beside ``path`` to write to; renamed to it if all went well, removed if not.

    Raises:
        MissingFileError: if the folder does not exist.
        FileError: if it cannot be written, because the disk is full, say, or because there is a
            folder, a device or a pipe in its place. What was there stays.
    """
    final = path_of(path)
    with writing(final):
        if not final.parent.is_dir():
            raise MissingFileError(
                f"cannot write {final}: the folder {final.parent} does not exist"
            )
        refuse_special(final)
        beside = _beside(final)
        try:
            yield beside
            beside.replace(final)
        finally:
            beside.unlink(missing_ok=True)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write safetensors with the permissions of any new file; their writer lets nobody else read.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read safetensors; ``what`` is what messages call the file.

    Raises:
        MissingFileError: if there is no such file.
        FileError: if it cannot be read.
        FileFormatError: if it is cut short, or something else.
    """
    with opened(path, what):  # what reads it has errors of its own for all else
        pass
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FileFormatError(
            f"'{path}' is not a whole safetensors file ({error}); fetch or save it again"
        ) from error


def refuse_special(path: Path) -> None:
    """Refuse to replace what is no regular file: a rename would put one in a device's place.

    Raises:
        FileError: if there is a folder, a device, a pipe or a socket. Links are followed.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file but a device, a pipe or a socket"
        raise FileError(f"cannot write {path}: it is {what}, which stays as it is; give a file")


@contextmanager
def written_together(directory: str | Path, names: Sequence[str]) -> Generator[Path]:
    """A folder beside ``directory`` to write files to, which take its place if all went well.

    A folder that is not there appears at once, with its parents. In one that is, files are
    replaced one by one in the order of ``names``, those of them that were not written are removed,
    and files of other names are left alone. Of two that are written at once the last one stays,
    whole.

    Raises:
        NotAFolderError: if there is a file of that name.
        FileError: if it cannot be written, if it is the root of all folders, or if one of ``names``
            in it is no regular file.
    """
    final = path_of(directory)
    with writing(final):
        if final.exists() and not final.is_dir():
            raise NotAFolderError(f"cannot write into {final}: it is a file, not a folder")
        if not final.absolute().name:
            raise FileError(
                f"cannot write into {final}: nothing can be put beside it; give a folder in it"
            )
        for name in names:
            refuse_special(final / name)
        beside = _beside(final.absolute())
        make_folder(final.parent)
        beside.mkdir()
        try:
            yield beside
            with ExitStack() as stack:
                with suppress(BlockingIOError):  # then it is a run in the folder above, no writer
                    stack.enter_context(_locked(final.absolute().parent, _PATIENCE_S))
                _move(beside, final, names)
        finally:
            rmtree(beside, ignore_errors=True)


def _move(beside: Path, final: Path, names: Sequence[str]) -> None:
    if not final.exists():
        beside.replace(final)
        return
    for name in names:
        if (beside / name).exists():
            (beside / name).replace(final / name)
        else:
            (final / name).unlink(missing_ok=True)


def make_folder(directory: Path) -> None:
    """Make a folder and those above it, if it is not there.

    Raises:
        NotAFolderError: if there is a file in its place, or in that of one above.
        FileError: if it cannot be made.
    """
    with writing(path_of(directory)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotAFolderError(
                f"cannot make the folder {directory}: a file is in its place, or in that of a "
                f"folder above; give another folder, or move the file away"
            ) from error


@contextmanager
def alone_in(directory: Path) -> Generator[None]:
    """Keep other runs out of a folder, which is made if it is not there.

    A process that ends, however it does, lets go. Where the system or the disk has no locks, none
    is kept out. A folder that was made for this and has nothing in it at the end is removed.

    Raises:
        FileError: if another run is in it, or it cannot be made (`make_folder`).
    """
    with writing(path_of(directory)):
        new = not directory.exists()
    make_folder(directory)
    with ExitStack() as stack:
        try:
            with writing(directory):
                stack.enter_context(_locked(directory, _MOMENT_S))
        except BlockingIOError as error:
            raise FileError(
                f"another run is at work in {directory}; wait until it ends, or give another folder"
            ) from error
        try:
            yield
        finally:
            if new:
                with suppress(OSError):  # as it is not empty
                    directory.rmdir()


@contextmanager
def _locked(directory: Path, patience: float) -> Generator[None]:
    """Hold the lock of a folder itself, so that no file of a lock is left behind.

    Raises:
        BlockingIOError: if another holds it for all of these seconds.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        end = monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() >= end:
                    raise
                sleep(_PAUSE_S)
            except OSError:
                break  # some network disks have no locks
        yield
    finally:
        os.close(handle)


def path_of(path: str | Path) -> Path:
    """A path that the system takes.

    Raises:
        FileError: if it has a null byte.
    """
    if "\0" in str(path):
        raise FileError(f"{str(path)!r} is no path: it has a null byte; give one without")
    return Path(path)


def _beside(final: Path) -> Path:
    """A name that no other thread or process writes to."""
    return final.with_name(f".{final.name}.{os.getpid()}-{get_ident()}.part")


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Say of an error of the system, or of a writer of files, which file could not be written.

    Raises:
        FileError: in the place of such an error.
    """
    try:
        yield
    except (EigenDamageError, BlockingIOError):  # the latter is of a lock
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(
            f"cannot write {path}: {reason}. What was there is as it was; free some space, or "
            f"give a place that can be written to"
        ) from error

"""The image files of a folder or of a zip archive, which is read where it is."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eigendamage.errors import DataError, FileFormatError
from eigendamage.files import opened
from eigendamage.zoo._archive import ARCHIVE_ERRORS

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFile:
    """An image that has not been read.

    Attributes:
        parts: its path below the folder or in the archive, the file's own name last.
        size: its length in bytes.
        read: reads them.
    """

    parts: tuple[str, ...]
    size: int
    read: Callable[[], bytes]

    @property
    def name(self) -> str:
        """The path, as messages show it."""
        return "/".join(self.parts)


@contextmanager
def image_files(path: Path) -> Generator[list[ImageFile], None, None]:
    """List the images of a folder or a zip archive by name; readable inside the ``with`` only.

    Whatever has no image's suffix is left out, as are hidden files and ``__MACOSX``.

    Raises:
        MissingFileError: if there is nothing at ``path``.
        FileError: if it cannot be read.
        DataError: if there is no image in it.
        FileFormatError: if the archive is broken, or an entry's name points out of it.
    """
    if path.is_dir():
        yield _some(_in_folder(path), path)
        return
    with opened(path, "data") as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except ARCHIVE_ERRORS as error:
            raise FileFormatError(
                f"'{path}' is no whole zip archive ({error}); give a folder, a .zip or an .npz file"
            ) from error
        with archive:
            yield _some(_in_archive(archive, path), path)


def _some(files: list[ImageFile], path: Path) -> list[ImageFile]:
    if not files:
        raise DataError(f"'{path}' holds no images; known are {', '.join(_SUFFIXES)}")
    return sorted(files, key=lambda file: file.parts)


def _in_folder(root: Path) -> list[ImageFile]:
    files: list[ImageFile] = []
    seen: set[Path] = set()
    # Class folders are often links; a link back up must not be followed for ever.
    for folder, below, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder) / name
            parts = path.relative_to(root).parts
            if _is_image(parts) and path.is_file():
                files.append(ImageFile(parts, path.stat().st_size, partial(_read_file, path)))
    return files


def _read_file(path: Path) -> bytes:
    with opened(path, "image") as stream:
        return stream.read()


def _in_archive(archive: zipfile.ZipFile, path: Path) -> list[ImageFile]:
    files: list[ImageFile] = []
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
            raise FileFormatError(
                f"'{path}' has an entry '{entry.filename}', which points out of the archive;"
                " nothing was read: make the archive again from a folder"
            )
        if not entry.is_dir() and _is_image(parts):
            read = partial(_read_entry, archive, entry, path)
            files.append(ImageFile(parts, entry.file_size, read))
    return files


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    try:
        # Reading to a given length keeps an entry from unpacking to more than it declares.
        with archive.open(entry) as stream:
            return stream.read(entry.file_size)
    except ARCHIVE_ERRORS as error:
        raise FileFormatError(
            f"'{entry.filename}' in '{path}' cannot be read ({error}); make the archive again,"
            " not encrypted"
        ) from error


def _is_image(parts: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return bool(parts) and not hidden and parts[-1].lower().endswith(_SUFFIXES)

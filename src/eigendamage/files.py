"""Files that are either whole or not there, and JSON documents that are checked on load."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eigendamage.errors import BudgetError, FileFormatError


@contextmanager
def written_beside(path: str | Path) -> Generator[Path]:
    """A path beside ``path`` to write to; renamed to it if all went well, removed if not.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(f"cannot write {final}: the folder {final.parent} does not exist")
    beside = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_together(directory: str | Path, names: Sequence[str]) -> Generator[Path]:
    """A folder beside ``directory`` to write files to, which take its place if all went well.

    A folder that is not there appears at once, with its parents. In one that is, files are
    replaced one by one in the order of ``names``, those of them that were not written are removed,
    and files of other names are left alone.

    Raises:
        NotADirectoryError: if there is a file of that name.
    """
    final = Path(directory)
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(f"cannot write into {final}: it is a file, not a folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.absolute().with_name(f".{final.absolute().name}.{os.getpid()}.part")
    beside.mkdir()
    try:
        yield beside
        if not final.exists():
            beside.replace(final)
            return
        for name in names:
            if (beside / name).exists():
                (beside / name).replace(final / name)
            else:
                (final / name).unlink(missing_ok=True)
    finally:
        rmtree(beside, ignore_errors=True)


D = TypeVar("D", bound="Document")


class Frozen(BaseModel):
    """Data that does not change and has no fields but those it declares."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(Frozen):
    """Data that is kept in a JSON file of its own; subclasses declare a ``version``."""

    def save(self, path: str | Path) -> None:
        """Write it as JSON, beside the file first and then renamed."""
        with written_beside(path) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[D], path: str | Path) -> D:
        """Read it.

        Raises:
            FileFormatError: if the file is not such a document, or of another version; the message
                names the first field that does not fit.
            FileNotFoundError: if there is no such file.
        """
        what = cls.__name__.lower()
        try:
            raw = json.loads(Path(path).read_bytes())
            if not isinstance(raw, dict) or "version" not in raw:
                raise FileFormatError(f"{path} is not a {what}: it says no version")
            return cls.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "the whole"
            raise FileFormatError(f"{path} is not a {what}: {where}: {first['msg']}") from error
        except (BudgetError, TypeError) as error:
            raise FileFormatError(f"{path} is not a {what}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} is not a {what}, nor any JSON: {error}") from error

"""JSON documents that are checked when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eigendamage.errors import BudgetError, FileError, FileFormatError, MissingFileError
from eigendamage.files import path_of, written_beside


def parsed(content: str | bytes) -> Any:
    """What a JSON document says.

    Raises:
        ValueError: if it is none, or names a field twice, of which another reader might take the
            other.
        RecursionError: if it is nested too deep.
    """
    return json.loads(content, object_pairs_hook=_once_each)


def _once_each(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the field '{twice}' twice")
    return found


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
            MissingFileError: if there is no such file.
            FileError: if it cannot be read.
        """
        what = cls.__name__.lower()
        path = path_of(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(f"there is no {what} at {path}; check the path") from error
        except OSError as error:
            raise FileError(f"cannot read the {what} at {path}: {error.strerror}") from error
        try:
            raw = parsed(content)
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
            raise FileFormatError(f"{path} is not a {what}, nor sound JSON: {error}") from error

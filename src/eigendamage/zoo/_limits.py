"""How much a data file may unpack to."""

from __future__ import annotations

from eigendamage.errors import DataError

MAX_BYTES = 4 << 30
"""The most that is unpacked from one file, and the most pixels held before normalising."""


def refuse_too_many_bytes(count: int, what: str) -> None:
    """Raise a `DataError` if ``count`` bytes of ``what`` are more than `MAX_BYTES`."""
    if count > MAX_BYTES:
        raise DataError(
            f"'{what}' would unpack to {count / 2**30:.1f} GiB, more than the"
            f" {MAX_BYTES / 2**30:.0f} GiB that are taken at once; use a limit on the number of"
            " images, a smaller size, or fewer of them in the file"
        )

"""What reading a damaged or odd archive raises."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib

ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, OSError),
)
"""RuntimeError of an entry that is encrypted or of a method or version that zipfile does not know,
ValueError of names that are no text."""

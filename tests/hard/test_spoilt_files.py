"""Files spoilt at random: read as something that is whole, or an error that names them."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import eigendamage as ed
from tests.hard.spoilt_files import SpoiltFiles

TIMES = 12


def test_a_spoilt_file_is_read_or_refused(tmp_path: Path) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    files = SpoiltFiles(tmp_path, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of odd metadata that it passes over
        for _ in range(TIMES):
            files.go_through(counts)
    assert sum(counts.values()) == TIMES * len(files.readers)
    for path in files.readers:
        refused = sum(n for (name, how), n in counts.items() if name == path.name and how != "read")
        assert refused > 0, (path.name, counts)


@pytest.mark.parametrize("side", [9_000, 12_000, 40_000])
def test_a_picture_that_unpacks_to_gigabytes_is_refused_by_its_header(
    side: int, tmp_path: Path
) -> None:
    """81 million pixels, 144 (of which Pillow warns), and more than Pillow opens at all."""
    Image.new("1", (8, 8)).save(tmp_path / "bomb.bmp")
    raw = bytearray((tmp_path / "bomb.bmp").read_bytes())
    raw[18:22] = raw[22:26] = side.to_bytes(4, "little")
    (tmp_path / "bomb.bmp").write_bytes(raw)
    with pytest.raises(ed.DataError, match=r"bomb\.bmp"):
        ed.zoo.load_images(tmp_path)

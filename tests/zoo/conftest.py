"""Where the tests find data and weights that are too big for the repository."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="module")
def shared_file():
    """Give a function from a path below the shared folder to the file; skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"needs {name} in a folder 'shared' beside the repository")
        return path

    return find

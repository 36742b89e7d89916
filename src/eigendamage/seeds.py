"""Where random draws begin."""

from __future__ import annotations

from numbers import Integral

from eigendamage.errors import EigenDamageError

_LEAST, _MOST = -(2**63), 2**64 - 1


def check_seed(seed: object) -> None:
    """Refuse what torch's generators do not take.

    Raises:
        EigenDamageError: if it is no whole number, or does not fit into 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise EigenDamageError(f"seed is {seed!r}; expected a whole number")
    if not _LEAST <= int(seed) <= _MOST:
        raise EigenDamageError(f"seed is {seed}; it must be from -2^63 to 2^64 - 1, as for torch")


def later_seed(seed: int, steps: int) -> int:
    """The seed so many further on; the largest is followed by 0."""
    later = int(seed) + steps
    return later if later <= _MOST else later - _MOST - 1


def unsigned_seed(seed: int) -> int:
    """The same for numpy, which takes none below 0: they are counted from 2^64 down."""
    return int(seed) % (_MOST + 1)

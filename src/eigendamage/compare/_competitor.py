"""The methods of a comparison, as they are named there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eigendamage.errors import EigenDamageError
from eigendamage.plan import METHODS, Budget, Unit, WeightMethod, variant_of

ALL = (*METHODS, "kron-obs:paper", "eigendamage@3")
_NAME = re.compile(r"(?P<method>[\w-]+)(:(?P<variant>[\w-]+))?(@(?P<rounds>\d+))?")


@dataclass(frozen=True)
class Competitor:
    """A method as it is named in a comparison: ``METHOD[:VARIANT][@ROUNDS]``."""

    name: str
    method: str
    variant: str | None
    rounds: int

    @classmethod
    def of(cls, name: str) -> Competitor:
        """Read a name.

        Raises:
            EigenDamageError: if it is of another form, there is no such method or variant, or a
                method that masks is to do so in rounds.
        """
        found = _NAME.fullmatch(name.strip())
        if found is None:
            raise EigenDamageError(
                f"'{name}' names no method; the form is METHOD[:VARIANT][@ROUNDS], such as "
                f"kron-obs:paper or eigendamage@3"
            )
        method, variant = found["method"], found["variant"]
        variant_of(method, variant)
        rounds = int(found["rounds"] or 1)
        if rounds < 1:
            raise EigenDamageError(f"'{name}' asks for {rounds} rounds; at least 1 is needed")
        one = cls(name.strip(), method, variant, rounds)
        if one.masks and rounds > 1:
            raise EigenDamageError(f"'{name}': masks are set once; name '{method}' without rounds")
        return one

    @property
    def masks(self) -> bool:
        """Whether it masks single weights, which saves nothing."""
        return isinstance(METHODS[self.method], WeightMethod)

    def budget(self, fraction: float, unit: Unit) -> Budget:
        """The budget that leaves a fraction; masks leave that fraction of the single weights."""
        if self.masks:
            return Budget(ratio=1 - fraction)
        return Budget(macs=fraction) if unit == "macs" else Budget(params=fraction)

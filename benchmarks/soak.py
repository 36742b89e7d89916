"""Does anything leak, and does any odd call end in anything but a result or an error with a name?

    python benchmarks/soak.py --calls 200

Draws networks, data and options of `compress` by a seed (`tests/hard/odd_calls.py`), makes the
calls one after another in one process, and checks each as the tests do: the budget is met, outputs
and gradients are finite, the model that was given is as it was bit for bit, what is saved and
loaded is equal; or the call ends in an error of the library. In between it measures the process's
memory, its open files, and the hooks and modules that are still alive. Shapes that are new fill
caches of torch and numpy, so the last of the calls are made again: what grows then is a leak. Then
it spoils files of every kind that the library reads (`tests/hard/spoilt_files.py`), and counts what
reading them ends in.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

# Each shape of a convolution stays in oneDNN's cache, up to 1024 of them: to see what else grows,
# and whether that is ours, the cache is kept small.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import torch
from recording import machine, record, versions
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hard.odd_calls import odd_call, outcome
from tests.hard.spoilt_files import SpoiltFiles

_RESULTS = Path(__file__).parent / "results" / "soak.json"
_WARM_UP = 20  # calls before the first measurement: caches of torch and of imports fill
_LEFT = ("open_files", "modules", "hooks", "tensors")  # none may be more in the end
# What may grow with a call that was made before: far less than a call has in use.
_A_CALL = {"resident_bytes": 100_000, "python_blocks": 30}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def measured() -> dict[str, int]:
    """What a leak would raise, after a garbage collection."""
    gc.collect()
    # What was freed goes back to the system, so that what stays is what is in use.
    ctypes.CDLL(None).malloc_trim(0)
    # By type: isinstance asks proxies for their class, and some warn.
    kinds = [(o, type(o)) for o in gc.get_objects()]
    alive = [o for o, kind in kinds if issubclass(kind, nn.Module)]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "python_blocks": sys.getallocatedblocks(),
        "open_files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "modules": len(alive),
        "hooks": sum(len(getattr(m, kind)) for m in alive for kind in _HOOKS),
        "tensors": sum(issubclass(kind, torch.Tensor) for _, kind in kinds),
    }


def spoilt(times: int, seed: int) -> tuple[dict[str, dict[str, int]], list[dict[str, str]]]:
    """What reading files spoilt at random ends in, by file, and what of it may not be."""
    counts: Counter[tuple[str, str]] = Counter()
    defects: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of odd metadata that it passes over
        files = SpoiltFiles(Path(folder), seed)
        for _ in range(times):
            try:
                files.go_through(counts)
            except Exception as error:  # noqa: BLE001 - every one of them is a finding
                defects.append({"error": f"{type(error).__name__}: {error}"})
                print(defects[-1], flush=True)
    names = sorted({name for name, _ in counts})
    return {n: {how: k for (m, how), k in counts.items() if m == n} for n in names}, defects


class Soak:
    """Calls one after another, and what they ended in."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.draws = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.defects: list[dict[str, str]] = []
        self.half_written: set[str] = set()
        self._made = 0

    def go(self, calls: int) -> dict[str, int]:
        """Draw calls and make them; what is left afterwards."""
        for _ in range(calls):
            self._one()
        found = measured()
        print(self._made, found, flush=True)
        return found

    def _one(self) -> None:
        call = odd_call(self.draws.choice)
        try:
            ended = outcome(call, self.folder / str(self._made))
        except Exception as error:  # noqa: BLE001 - every one of them is a finding
            ended = "DEFECT"
            self.defects.append({"call": repr(call), "error": f"{type(error).__name__}: {error}"})
            print(self.defects[-1], flush=True)
        self._made += 1
        self.outcomes[ended] += 1
        self.methods[call.method] += 1
        files = (str(file.relative_to(self.folder)) for file in self.folder.rglob("*"))
        self.half_written |= {name for name in files if ".part" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--spoilt", type=int, default=100, help="times to spoil every kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    start = time.monotonic()
    quarter = max(given.calls // 4, 1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), given.seed)
        soak.go(_WARM_UP)
        soak.outcomes.clear()
        soak.methods.clear()
        before = measured()
        quarters = [soak.go(quarter) for _ in range(3)]
        state = soak.draws.getstate()
        quarters.append(soak.go(quarter))
        outcomes, methods = Counter(soak.outcomes), Counter(soak.methods)
        again: list[dict[str, int]] = []
        for _ in range(2):
            soak.draws.setstate(state)
            again.append(soak.go(quarter))
    files, broken = spoilt(given.spoilt, given.seed)
    first, second = again
    a_call = {what: (second[what] - first[what]) / quarter for what in _A_CALL}
    defects = soak.defects + broken
    record(
        given.out,
        {
            "command": f"python benchmarks/soak.py --calls {given.calls} --spoilt {given.spoilt} "
            f"--seed {given.seed}",
            "seed": given.seed,
            "machine": machine(),
            "versions": versions(),
            "seconds": time.monotonic() - start,
            "calls": 4 * quarter,
            "warm_up": _WARM_UP,
            "outcomes": dict(outcomes.most_common()),
            "methods": dict(methods.most_common()),
            "spoilt_files": files,
            "defects": defects,
            "before": before,
            "quarters": quarters,
            "last_quarter_again": again,
            "growth_a_call": a_call,
            "most_a_call": _A_CALL,
            "hooks_left": second["hooks"],
            "open_files_left": second["open_files"] - before["open_files"],
            "files_half_written": sorted(soak.half_written),
        },
    )
    grown = {what for what in _LEFT if second[what] > before[what]}
    grown |= {what for what, most in _A_CALL.items() if a_call[what] > most}
    print(f"growth a call: {a_call}" + (f"; too much: {sorted(grown)}" if grown else ""))
    sys.exit(1 if defects or soak.half_written or grown else 0)


if __name__ == "__main__":
    main()

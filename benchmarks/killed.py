"""Is a run that is killed again and again, and started anew each time, the same as one that is not?

    python benchmarks/killed.py --kills 5

Runs `eigendamage compress --rounds 2 --epochs 1` on the bundled network and images once to its end,
and once with SIGKILL after random times, and compares the weights bit for bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from recording import machine, record, versions
from safetensors.torch import load_file

_RESULTS = Path(__file__).parent / "results" / "killed.json"


def left(rounds: Path) -> float:
    """About what fraction of a whole run is to be done, by the files that are there."""
    steps = ("round-1/report.json", "round-1/training.pt", "round-2/report.json")
    return 1 - 0.25 * sum((rounds / step).exists() for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=500, help="images for the curvature")
    parser.add_argument("--train-examples", type=int, default=4000)
    parser.add_argument("--test-examples", type=int, default=500)
    given = parser.parse_args()
    draws = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def command(out: Path) -> list[str]:
            return [
                *(sys.executable, "-m", "eigendamage", "compress", "--model", "zoo:demo_network"),
                *("--data", "zoo:fashion-mnist", "--macs", "0.5", "--rounds", "2"),
                *("--epochs", "1", "--examples", str(given.examples), "--out", str(out)),
                *("--train-examples", str(given.train_examples)),
                *("--test-examples", str(given.test_examples), "--quiet"),
            ]

        start = time.monotonic()
        subprocess.run(command(whole), check=True)
        seconds = time.monotonic() - start
        print(f"not killed: {seconds:.0f} s", flush=True)
        # A run that is killed redoes what it had begun, so moments are drawn from what is left.
        moments: list[dict[str, object]] = []
        for _ in range(given.kills):
            after = draws.uniform(0.2, 0.9) * seconds * left(killed / "rounds")
            process = subprocess.Popen(command(killed))
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
            ended = process.wait()
            files = sorted(str(p.relative_to(killed)) for p in killed.rglob("*") if p.is_file())
            moments.append({"seconds": after, "exit": ended, "files": files})
            print(f"killed after {after:.0f} s: {len(files)} files", flush=True)
        subprocess.run(command(killed), check=True)
        a, b = (load_file(out / "model.safetensors") for out in (whole, killed))
        equal = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    record(
        _RESULTS,
        {
            "command": f"python benchmarks/killed.py {' '.join(sys.argv[1:])}".rstrip(),
            "run": command(Path("OUT"))[1:],
            "machine": machine(),
            "versions": versions(),
            "seconds": seconds,
            "kills": moments,
            "tensors": len(a),
            "equal": equal,
        },
    )
    print("equal bit for bit" if equal else "DIFFERENT")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()

"""What a result depends on beside the model and the data."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from eigendamage._version import __version__
from eigendamage.distributed import world
from eigendamage.documents import Frozen


class Environment(Frozen):
    """What the numbers depend on beside the model and the data.

    With all of it equal, plan and weights are equal bit for bit on the CPU.

    Attributes:
        eigendamage: version of this library.
        torch: version of torch, with its build.
        python: version of Python.
        platform: system and architecture.
        device: of the model.
        threads: that torch computes with: sums are cut into as many parts.
        seed: of all draws.
        processor: what the device is, by name; None in reports from before it was noted.
        kernels: the instructions that torch's kernels on the CPU are for, such as AVX2.
        processes: how many shared the work out.
        deterministic: whether torch was told to use deterministic algorithms alone, without which
            a GPU may round otherwise each time.
    """

    eigendamage: str
    torch: str
    python: str
    platform: str
    device: str
    threads: int
    seed: int
    processor: str | None = None
    kernels: str | None = None
    processes: int = 1
    deterministic: bool | None = None

    @classmethod
    def here(cls, device: torch.device, seed: int) -> Environment:
        """This process."""
        return cls(
            eigendamage=__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            device=str(device),
            threads=torch.get_num_threads(),
            seed=seed,
            processor=_processor(device),
            kernels=torch.backends.cpu.get_cpu_capability(),
            processes=world(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def _processor(device: torch.device) -> str:
    """The device's name; of a CPU the model where the system tells it, else the architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"

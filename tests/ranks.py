"""Several processes of one group, for tests: nothing here needs pytest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""So that the name of the machine need not be known to any network."""


def together(work: Callable[[Path], None], folder: Path, ranks: int = 2) -> list[int | None]:
    """Run ``work``, a function of a module, in processes of one group; their exit codes.

    It is given a folder to write to. A process that takes over a minute longer than the one before
    it is ended.
    """
    context = mp.get_context("spawn")
    started = [
        context.Process(target=_run, args=(work, folder, rank, ranks)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(180)  # a busy machine may take a minute to begin
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _run(work: Callable[[Path], None], folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOOPBACK)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        work(folder)
    finally:  # gloo's threads, at the end of a process that still has a group, may abort it
        dist.destroy_process_group()

"""Several processes of one group, for tests: nothing here needs pytest."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[], Any]


def together(work: Work, folder: Path, ranks: int = 2, timeout: float = 60.0) -> list[Any]:
    """What ``work``, a function of a module, returns in each process; its error's text if it fails.

    A process that ends without either counts as None.
    """
    folder.mkdir(exist_ok=True)
    context = mp.get_context("spawn")
    started = [
        context.Process(target=_run, args=(work, folder, rank, ranks)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    found = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in found]


def _run(work: Work, folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=30),
    )
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()

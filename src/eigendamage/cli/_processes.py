"""A command in several processes, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import torch
import torch.distributed as dist

from eigendamage.distributed import rank, world
from eigendamage.errors import EigenDamageError

P = ParamSpec("P")

_PATIENCE = timedelta(hours=1)
"""How long a process waits for the others; what only the first does may take this long."""


@contextmanager
def processes() -> Generator[None]:
    """A group of the processes that torchrun started, by its environment; nothing without it.

    gloo without CUDA; with it nccl, each process with the device of its local rank. The others than
    the first print nothing on standard output.

    Raises:
        EigenDamageError: if there are fewer devices than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise EigenDamageError(
                f"process {local} of this machine has no CUDA device of its own: there are "
                f"{torch.cuda.device_count()}; give torchrun --nproc-per-node at most that, or "
                f"set CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        with ExitStack() as stack:
            if rank() > 0:
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
            yield
    except SystemExit as end:
        # Not after an error: a group whose processes are gone may not come to an end.
        if not end.code:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def home() -> torch.device:
    """Where the model is to be: the CPU, or this process's CUDA device in a group that has them."""
    if world() > 1 and dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def in_one_process(command: Callable[P, None]) -> Callable[P, None]:
    """A command that is refused where there are several processes."""

    @wraps(command)
    def alone(*args: P.args, **kwargs: P.kwargs) -> None:
        if world() > 1:
            raise EigenDamageError(
                "this command runs in one process: start it without torchrun (compress is the one "
                "that shares its work out)"
            )
        command(*args, **kwargs)

    return alone


def speaker() -> str:
    """Who an error is of, for its message: the program, and which process of several."""
    return f"eigendamage (process {rank()})" if world() > 1 else "eigendamage"

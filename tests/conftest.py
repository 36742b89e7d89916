"""What every test shares."""

from __future__ import annotations

import pytest
import torch

from tests.cases import CASES, Case


@pytest.fixture(params=list(CASES), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each model of the table in turn."""
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits

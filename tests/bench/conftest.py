"""One thread for tiny sizes: threads that wait for each other burn time, and a processor clock would count it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Run with one thread, and give torch its threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

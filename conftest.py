"""Settings of every test, doctests included."""

from __future__ import annotations

import warnings

import pytest
import torch

# Tests run side by side, one process per core.
torch.set_num_threads(1)

# PyTorch warns of itself when its forward mode is first used, in whatever test that is.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

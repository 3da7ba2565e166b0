import os

import pytest
import torch
from hypothesis import settings

# Nets this small are fastest on one thread, and tests may share the machine.
torch.set_num_threads(1)
# In continuous integration every run draws the same examples; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    "Run in parallel (pytest -n), a file's tests share a process and so its fixtures; notebooks and methods have none to share."
    for item in items:
        if item.path.stem not in ("test_nbs", "test_methods"): item.add_marker(pytest.mark.xdist_group(item.path.stem))

import os

import torch
from hypothesis import settings

# Nets this small are fastest on one thread, and tests may share the machine.
torch.set_num_threads(1)
# In continuous integration every run draws the same examples; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

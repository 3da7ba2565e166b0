"Processes that find each other again and again by one store, as after `torchrun` has started them again."
import os

import torch

from mgdarts.base.ranks import HERE, join, leave, total

seen = []
for k in range(12):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(k // 2)
    join()
    seen.append(int(total(torch.tensor([HERE.rank + 1]))))
    leave()
print(seen)

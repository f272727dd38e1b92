"""One thread: the tests' tensors are too small for more, and results do not depend on the machine's load."""

import torch

torch.set_num_threads(1)

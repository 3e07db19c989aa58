import os

# the networks of the tests are so small that threads cost more in waiting for one another than they save; set before
# torch is imported, and inherited by the command lines that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels are tested on whatever there is

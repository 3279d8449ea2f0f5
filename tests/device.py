"""The device that engines and models of tests run on; `SLIPSTREAM_TEST_DEVICE=cuda` for a GPU.

References, from `transformers` or by enumeration, stay on the CPU.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("SLIPSTREAM_TEST_DEVICE", "cpu"))

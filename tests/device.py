"""The device that engines and models of tests run on: `SLIPSTREAM_TEST_DEVICE=cuda` for a GPU's own paths.

What they are compared with, `transformers` and enumeration, stays on the CPU.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("SLIPSTREAM_TEST_DEVICE", "cpu"))

"""A checksum of the weights in use."""

import torch

from decoder.models.base import ServedModel

FINGERPRINT_CHUNK = 1 << 24
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@torch.inference_mode()
def fingerprint(model: ServedModel) -> str:
    """A 64-bit checksum of the weights on the device, cheap enough to compare around a swap.

    Depends on values and their order. Not a defence against an adversary: the sha256 of the file
    is.
    """
    total = 0
    for index, (_, tensor) in enumerate(sorted(model.weights().items())):
        words = tensor.detach().contiguous().flatten()
        words = words.view(WORDS[words.element_size()])
        for at in range(0, len(words), FINGERPRINT_CHUNK):
            part = words[at : at + FINGERPRINT_CHUNK].to(torch.int64)
            weight = torch.arange(1, len(part) + 1, device=part.device) * (2 * index + 1) + at
            total = (total * 31 + int((part * weight).sum().item())) % 2**64
    return f"{total:016x}"

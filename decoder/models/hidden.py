"""Hidden states between two layers.

Legend: B sequences, T tokens of a sequence, E hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Tokens that have passed the same layers."""

    residual_BTE: Tensor  # float32
    update_BTE: Tensor | None  # the last layer's output, not yet added; None before the first

    @property
    def count(self) -> int:
        """Tokens of each sequence."""
        return self.residual_BTE.shape[1]

    def numel(self) -> int:
        """Tokens of all sequences."""
        return self.residual_BTE.shape[:2].numel()

    @property
    def last(self) -> "HiddenStates":
        """The last token of each sequence."""
        update = None if self.update_BTE is None else self.update_BTE[:, -1:]
        return HiddenStates(self.residual_BTE[:, -1:], update)

    def after(self, earlier: "HiddenStates | None") -> "HiddenStates":
        """Appends these tokens to earlier ones that have passed the same layers."""
        if earlier is None:
            return self
        residual_BTE = torch.cat([earlier.residual_BTE, self.residual_BTE], 1)
        if earlier.update_BTE is None or self.update_BTE is None:
            return HiddenStates(residual_BTE, None)
        return HiddenStates(residual_BTE, torch.cat([earlier.update_BTE, self.update_BTE], 1))

"""Drafts in the trainer: read from artifacts in float32, written in their stored precision."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from online.artifacts import ArtifactStore
from online.errors import ArtifactError
from online.registry import Registry
from online.settings import Settings
from online.tables import Version
from online.versions import is_generic

log = logging.getLogger("slipstream.trainer")


@dataclass(frozen=True, slots=True)
class Weights:
    settings: Settings
    registry: Registry
    artifacts: ArtifactStore

    def load(self, version: Version) -> nn.Module:
        return self.read(version.sha256)

    def read(self, digest: str) -> nn.Module:
        """Loads an artifact on the trainer's device.

        Raises:
            ArtifactError: its files are missing or damaged.
        """
        folder = self.artifacts.verify(digest)
        module: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        return module.to(self.settings.trainer_device)

    def first(self, route: str) -> nn.Module | None:
        """The first draft of the route, for rehearsal; None if its artifact is gone."""
        oldest = self.registry.versions(route)[-1]
        if is_generic(oldest):
            # A cluster begins with a later draft of the default route: rehearse that route's first.
            oldest = self.registry.versions(self.settings.default_route)[-1]
        try:
            return self.load(oldest)
        except ArtifactError as error:
            log.warning("rehearsing the parent instead of the first draft: %s", error)
            return None

    def save(self, module: nn.Module, parent: Version, folder: Path) -> None:
        """Writes in the parent's stored precision, so that a route has one kind of file."""
        config = transformers.AutoConfig.from_pretrained(self.artifacts.path(parent.sha256))
        module = module.to(config.dtype or torch.float32)
        # Under the decoder's tensor names, which differ from the original files in some families.
        save: Any = module.save_pretrained
        save(folder, max_shard_size="1TB", save_original_format=False)

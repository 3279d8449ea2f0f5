"""Drafts as the trainer holds them: read from artifacts in float32, written in the precision that they come in."""

import logging
from dataclasses import dataclass
from pathlib import Path

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
        """Raises ArtifactError where the files are missing or damaged."""
        folder = self.artifacts.verify(digest)
        module: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        return module.to(self.settings.trainer_device)

    def first(self, route: str) -> nn.Module | None:
        """The draft that the route began with; None if its artifact is gone, which is no reason not to learn."""
        oldest = self.registry.versions(route)[-1]
        if is_generic(
            oldest
        ):  # a cluster's: it stands for what the default route happened to run then
            oldest = self.registry.versions(self.settings.default_route)[-1]
        try:
            return self.load(oldest)
        except ArtifactError as error:
            log.warning("the parent is rehearsed, not the first draft: %s", error)
            return None

    def save(self, module: nn.Module, parent: Version, folder: Path) -> None:
        """In the parent's stored precision, so that every version of a route is one kind of file."""
        stored = (
            transformers.AutoConfig.from_pretrained(self.artifacts.path(parent.sha256)).dtype
            or torch.float32
        )
        # Under the names that the decoder's live module has, which for some families are not those of their first
        # files.
        module.to(stored).save_pretrained(folder, max_shard_size="1TB", save_original_format=False)  # type: ignore[operator]

"""Draft weights on disk: immutable folders, named by the sha256 of their safetensors file.

ROOT/<sha256>/model.safetensors, config.json, …     a Hugging Face model folder
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from online.errors import ArtifactError

WEIGHTS = "model.safetensors"


class ArtifactStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, write: Callable[[Path], None]) -> str:
        """Publishes the folder that `write` fills. Returns its digest.

        The folder is written aside, made durable and renamed. A crash leaves the whole artifact
        or nothing. Publishing the same weights twice makes one artifact.

        Raises:
            ArtifactError: `write` made no weights, or the published artifact is damaged.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".publish-", dir=self.root))
        try:
            write(aside)
            if not (aside / WEIGHTS).is_file():
                raise ArtifactError(f"no {WEIGHTS} was written")
            for file in aside.iterdir():
                _fsync(file)
            _fsync(aside)
            aside.chmod(0o755)
            digest = file_sha256(aside / WEIGHTS)
            try:
                aside.rename(self.root / digest)
            except OSError:
                self.verify(digest)  # These weights are published already: check them.
            _fsync(self.root)
            return digest
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def path(self, digest: str) -> Path:
        return self.root / digest

    def verify(self, digest: str) -> Path:
        """The artifact's folder, after its weights were compared with the digest.

        Raises:
            ArtifactError: the artifact is missing or damaged.
        """
        weights = self.path(digest) / WEIGHTS
        try:
            found = file_sha256(weights)
        except OSError as error:
            message = f"artifact {digest[:12]} is missing: {error.strerror}"
            raise ArtifactError(message, code="artifact_missing") from error
        if found != digest:
            raise ArtifactError(f"artifact {digest[:12]} is damaged: its sha256 is {found[:12]}")
        return self.path(digest)

    def sweep(self, digests: Iterable[str], abandoned_s: float) -> list[str]:
        """Deletes these artifacts, and temporary folders older than `abandoned_s`.

        Killed publishers leave temporary folders behind. Returns the names of deleted folders.
        """
        if not self.root.is_dir():
            return []
        abandoned = [
            folder
            for folder in self.root.glob(".publish-*")
            if time.time() - folder.stat().st_mtime > abandoned_s
        ]
        gone = [folder for folder in (*map(self.path, digests), *abandoned) if folder.is_dir()]
        for folder in gone:
            shutil.rmtree(folder)
        return [folder.name for folder in gone]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

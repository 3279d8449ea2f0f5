"""Artifacts: complete or absent, and immutable."""

import os
from pathlib import Path

import pytest

from online.artifacts import ArtifactStore, file_sha256
from online.errors import ArtifactError


def weights(content: bytes = b"weights") -> object:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def test_an_artifact_is_named_by_its_weights(tmp_path: Path) -> None:
    """Publishing the same weights twice makes one artifact."""
    store = ArtifactStore(tmp_path)
    digest = store.publish(weights())  # type: ignore[arg-type]
    assert (
        store.publish(weights())
        == digest
        == file_sha256(store.verify(digest) / "model.safetensors")
    )  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == [digest]


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """No artifact and no temporary folder."""

    def crash(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ArtifactStore(tmp_path).publish(crash)
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        ArtifactStore(tmp_path).publish(lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_an_error(tmp_path: Path) -> None:
    """When verifying, and when publishing the same weights again."""
    store = ArtifactStore(tmp_path)
    digest = store.publish(weights())  # type: ignore[arg-type]
    (store.path(digest) / "model.safetensors").write_bytes(b"rotten")
    with pytest.raises(ArtifactError, match="damaged"):
        store.verify(digest)
    with pytest.raises(ArtifactError, match="damaged"):
        store.publish(weights())  # type: ignore[arg-type]
    with pytest.raises(ArtifactError) as missing:
        store.verify("0" * 64)
    assert missing.value.code == "artifact_missing"


def test_sweep_deletes_named_and_abandoned_folders(tmp_path: Path) -> None:
    """Named artifacts and old temporary folders, nothing else, and nothing twice."""
    store = ArtifactStore(tmp_path)
    kept, useless = (store.publish(weights(content)) for content in (b"kept", b"useless"))  # type: ignore[arg-type]
    old, new = tmp_path / ".publish-old", tmp_path / ".publish-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    assert sorted(store.sweep([useless], 3600)) == sorted([useless, ".publish-old"])
    assert {folder.name for folder in tmp_path.iterdir()} == {kept, ".publish-new"}
    assert store.sweep([useless], 3600) == []
    assert ArtifactStore(tmp_path / "none").sweep([useless], 0) == []

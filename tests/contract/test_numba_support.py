"""Addresses for compiled kernels, and the disk cache of compiled code."""

from pathlib import Path

import pytest
import torch

from decoder.device import numba_support
from decoder.device.numba_support import at, cache_folder, kernel_files, rows_at


def test_an_address_of_the_wrong_type_is_refused() -> None:
    """A float32 kernel once wrote into a bfloat16 buffer."""
    buffer = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        at(buffer, torch.float32)
    with pytest.raises(TypeError, match="bfloat16"):
        rows_at(buffer[None], torch.float32)
    assert at(buffer, torch.bfloat16) == buffer.data_ptr()
    assert at(None, torch.float32) == 0


def test_tensors_with_gaps_are_refused() -> None:
    """Whole rows may lie apart, the numbers of a row may not."""
    table = torch.zeros(4, 6)
    with pytest.raises(TypeError, match="contiguous"):
        at(table[:, :3], torch.float32)
    with pytest.raises(TypeError, match="contiguous"):
        rows_at(table.T, torch.float32)
    assert rows_at(table[:, :3], torch.float32) == (table.data_ptr(), 6)


def test_every_file_with_compiled_code_names_the_cache_folder() -> None:
    """Else an edit of that file could leave stale code in use."""
    decoder = Path(numba_support.__file__).parents[1]
    compiled = {path for path in decoder.rglob("*.py") if "njit" in path.read_text()}
    assert compiled <= set(kernel_files())


def test_an_edit_of_any_kernel_file_changes_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba itself notices only edits of the file that defines a kernel, not of its callees."""
    files = [tmp_path / path.name for path in kernel_files()]
    for copy, path in zip(files, kernel_files(), strict=True):
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(numba_support, "kernel_files", lambda: files)
    folders = {cache_folder()}
    for path in files:
        path.write_text(path.read_text() + "\n# an edit\n")
        folders.add(cache_folder())
    assert len(folders) == 1 + len(files)


def test_without_a_writable_folder_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only container compiles at every start, and works."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert not numba_support._enable_cache()

"""Python source code that is installed on this machine: the reference pair's text and the demo's traffic.

Nothing is downloaded and nothing is copied into the repository. What a model must not have seen is decided by hash,
so every machine with the same packages agrees on it without a list:

* a package is **held out** when `sha256("pkg:" + name)` says so (1 in 8): neither model trains on it, it is traffic;
* of the other packages and the standard library, 1 file in 16 is held out, for validation.
"""

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
_SKIP_DIRS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "pgserver",
}
_OWN_PACKAGES = {"online", "trainer", "decoder", "lab", "migrations", "tests"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    package: str
    path: Path
    key: str  # "package/relative/path.py": what is hashed, the same on every machine

    @property
    def held_out(self) -> bool:
        return is_held_out_package(self.package) or bucket("file:" + self.key, 16) == 0

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="ignore")


def bucket(key: str, buckets: int) -> int:
    """A stable bucket of `key` in [0, buckets), buckets ≤ 256."""
    return hashlib.sha256(key.encode()).digest()[0] % buckets


def is_held_out_package(package: str) -> bool:
    return package != STDLIB and bucket("pkg:" + package.lower(), 8) == 0


def installed_files() -> list[SourceFile]:
    """Every Python source file of the standard library and of the installed packages, in a stable order."""
    paths = sysconfig.get_paths()
    files = list(_walk(Path(paths["stdlib"]), lambda relative: STDLIB))
    for root in sorted({paths["purelib"], paths["platlib"]}):
        files += _walk(Path(root), lambda relative: relative.parts[0].removesuffix(".py"))
    unique = {file.key: file for file in files if file.package not in _OWN_PACKAGES}
    return [unique[key] for key in sorted(unique)]


def _walk(root: Path, package_of: Callable[[Path], str]) -> Iterator[SourceFile]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIP_DIRS.intersection(relative.parts) and path.stat().st_size > 200:
            package = package_of(relative)
            yield SourceFile(package, path, f"{package}/{relative.as_posix()}")


def cut_prompt(text: str, rng: random.Random, prompt_chars: int) -> str:
    """A completion prompt: `prompt_chars` of `text` that start at a line and end at a random place."""
    if len(text) <= prompt_chars:
        return text[: max(1, len(text) // 2)]
    start = text.rfind("\n", 0, rng.randrange(len(text) - prompt_chars)) + 1
    return text[start : start + prompt_chars]

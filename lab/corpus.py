"""Python source installed on this machine: the reference pair's text and the demo's traffic.

Nothing is downloaded or copied into the repository. Hashes decide what a model must not see, so
every machine with the same packages agrees without a list:

* 1 package in 8 is **held out**: neither embedded model trains on it, and it serves as traffic;
* of other packages and the standard library, 1 file in 16 is held out for validation.
"""

import hashlib
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STDLIB = "stdlib"
HELD_OUT_FILES = 5  # of a package of traffic, 1 file in so many gives held-out prompts only
SMALLEST_FILE = 200  # bytes
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("lib2to3", "idlelib", "turtledemo", "pgserver"),
}
_OWN_PACKAGES = {"online", "trainer", "decoder", "lab", "migrations", "tests"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    package: str
    path: Path
    key: str  # "package/relative/path.py", which is hashed: equal on every machine

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


@cache
def installed_files() -> tuple[SourceFile, ...]:
    """Every source file of the standard library and installed packages, in a stable order."""
    paths = sysconfig.get_paths()
    files = list(_walk(Path(paths["stdlib"]), lambda relative: STDLIB))
    for root in sorted({paths["purelib"], paths["platlib"]}):
        files += _walk(Path(root), lambda relative: relative.parts[0].removesuffix(".py"))
    unique = {file.key: file for file in files if file.package not in _OWN_PACKAGES}
    return tuple(unique[key] for key in sorted(unique))


def held_out_packages() -> list[str]:
    """Installed packages that neither embedded model was trained on, largest first."""
    sizes: Counter[str] = Counter()
    for file in installed_files():
        if is_held_out_package(file.package):
            sizes[file.package] += file.path.stat().st_size
    return [package for package, _ in sizes.most_common()]


def package_prompts(
    package: str, count: int, *, held_out: bool, seed: int, prompt_chars: int = 400
) -> list[str]:
    """`count` prompts cut at random from a package; held-out prompts have files of their own.

    Raises:
        ValueError: the package has no source files on that side.
    """
    files = [file for file in installed_files() if file.package == package]
    texts = [
        file.text()
        for file in files
        if (bucket("query:" + file.key, HELD_OUT_FILES) == 0) == held_out
    ]
    if not texts:
        raise ValueError(f"no source files of package {package!r} are installed")
    rng = random.Random(seed)
    # Long files hold more code, so they are cut more often.
    chosen = rng.choices(texts, weights=[len(text) for text in texts], k=count)
    return [cut_prompt(text, rng, prompt_chars) for text in chosen]


def cut_prompt(text: str, rng: random.Random, prompt_chars: int) -> str:
    """A completion prompt: `prompt_chars` of `text` from the start of a line on."""
    if len(text) <= prompt_chars:
        return text[: max(1, len(text) // 2)]
    start = text.rfind("\n", 0, rng.randrange(len(text) - prompt_chars)) + 1
    return text[start : start + prompt_chars]


def _walk(root: Path, package_of: Callable[[Path], str]) -> Iterator[SourceFile]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        skipped = _SKIPPED_FOLDERS.intersection(relative.parts)
        if not skipped and path.stat().st_size > SMALLEST_FILE:
            package = package_of(relative)
            yield SourceFile(package, path, f"{package}/{relative.as_posix()}")

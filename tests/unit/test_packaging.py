"""The files that an installed package needs besides its modules."""

import tomllib

from setuptools import find_packages

from online.processes import ROOT


def test_every_file_of_a_package_is_packaged() -> None:
    """Without its migrations, an image would take an empty database for migrated.

    Without the reference pair it would not start.
    """
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(str(ROOT), include=setuptools["packages"]["find"]["include"])
    folders = {package.replace(".", "/") for package in packages}
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, found in setuptools["package-data"].items()
        for pattern in found
    ]
    for top in sorted({folder.split("/")[0] for folder in folders}):
        for path in (ROOT / top).rglob("*"):
            file = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in file.parts:
                module = file.suffix == ".py" and file.parent.as_posix() in folders
                assert module or any(file.match(pattern) for pattern in patterns), (
                    f"{file} is in no package"
                )

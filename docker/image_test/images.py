"""The Dockerfile, built by buildah as it is, without a registry and without the network."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Final

from commands import attempt, run

__all__ = ["BASE", "TARGETS", "Builder"]

BASE: Final = "docker.io/library/python:3.11-slim-bookworm"
"""The name that the Dockerfile asks for."""

TARGETS: Final = ("cpu", "gpu", "demo")


class Builder:
    """buildah with a store of its own.

    Attributes:
        driver: of the store: overlay where the kernel mounts it here, else vfs, which copies and takes minutes longer.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Begin with an empty store in a folder."""
        self._folder = folder
        self.remove()
        folder.mkdir(parents=True)
        self.driver = "overlay" if _overlay_works(folder) else "vfs"
        where = ("--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", self.driver)
        self._buildah = ("buildah", *where)

    def import_base(self, archive: pathlib.Path) -> None:
        """Make an image of a root file system, under the name that the Dockerfile asks for."""
        container = run(*self._buildah, "from", "scratch").strip()
        run(*self._buildah, "add", "--quiet", container, archive, "/")
        run(*self._buildah, "config", "--cmd", "python3", container)
        run(*self._buildah, "commit", "--quiet", "--rm", "--format", "docker", container, BASE)

    def build(self, target: str, context: pathlib.Path) -> None:
        """Build a target from wheels alone; what targets share is built once."""
        options = ("--isolation", "chroot", "--format", "docker", "--layers", "--pull-never", "--build-arg")
        named = ("--target", target, "--tag", f"stepwire:{target}", "--file", context / "docker" / "Dockerfile")
        run(*self._buildah, "bud", *options, "PIP_NO_INDEX=1", *named, context)

    def hand_over(self, image: str, name: str) -> None:
        """Give an image to the Docker that runs here."""
        run(*self._buildah, "push", "--quiet", image, f"docker-daemon:{name}")

    def remove(self) -> None:
        """Remove the store, which holds gigabytes."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _overlay_works(folder: pathlib.Path) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        tried = pathlib.Path(name)
        for part in ("lower", "upper", "work", "merged"):
            (tried / part).mkdir()
        layers = f"lowerdir={tried}/lower,upperdir={tried}/upper,workdir={tried}/work"
        works = not attempt("mount", "-t", "overlay", "none", "-o", layers, tried / "merged").returncode
        if works:
            run("umount", tried / "merged")
        return works

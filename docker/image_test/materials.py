"""What the images are built from where no registry is reached: a base of Debian's packages, and wheels."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from commands import run

__all__ = ["Materials"]

_SUITE: Final = "bookworm"
_PACKAGES: Final = "python3,python3-venv,ca-certificates"
_LOCKS: Final = ("build", "sbom", "cpu", "gpu", "demo")
_FRESH_SECONDS: Final = 7 * 86400.0
# What images for containers leave out.
_BARE: Final = (
    "--exclude=./var/cache/apt/*",
    "--exclude=./var/lib/apt/lists/*",
    "--exclude=./usr/share/doc/*",
    "--exclude=./usr/share/man/*",
    "--exclude=./usr/share/locale/*",
)
# In memory, because packages are unpacked with a sync a file, which takes minutes on a disk.
_BOOTSTRAP: Final = """
room=$1 packages=$2 suite=$3 archive=$4
shift 4
mount -t tmpfs none "$room"
debootstrap --variant=minbase --include="$packages" "$suite" "$room/root"
tar -C "$room/root" --numeric-owner "$@" -cf "$archive" .
"""


class Materials:
    """Lie in a folder and are used again while they are fresh.

    Attributes:
        base: a tar archive of a root file system with Python.
        wheels: a folder.
        context: the folder that builders are given: the repository's files, and the wheels among them.
    """

    def __init__(self, folder: pathlib.Path, repository: pathlib.Path) -> None:
        """Name the places."""
        self.base, self.wheels, self.context = folder / "base.tar", folder / "wheels", folder / "context"
        self._repository = repository

    def gather(self) -> None:
        """Fetch base and wheels, at once because both wait for the network."""
        self.wheels.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as threads:
            for done in [threads.submit(self._bootstrap), threads.submit(self._fetch)]:
                done.result()

    def lay_out(self) -> None:
        """Make the context."""
        shutil.rmtree(self.context, ignore_errors=True)
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=self._repository)
        for name in filter(None, listed.split("\0")):
            source, target = self._repository / name, self.context / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        for wheel in self.wheels.glob("*.whl"):
            os.link(wheel, self.context / "docker" / "wheels" / wheel.name)

    def clear(self) -> None:
        """Remove the context; base and wheels stay for the next time."""
        shutil.rmtree(self.context, ignore_errors=True)

    def _bootstrap(self) -> None:
        if self.base.exists() and time.time() - self.base.stat().st_mtime < _FRESH_SECONDS:
            return
        unfinished = self.base.with_suffix(".part")
        with tempfile.TemporaryDirectory() as room:  # debootstrap takes no path with a blank, as the checkout's may be
            run("unshare", "--mount", "sh", "-euc", _BOOTSTRAP, "sh", room, _PACKAGES, _SUITE, unfinished, *_BARE)
        unfinished.replace(self.base)

    def _fetch(self) -> None:
        locks = [self._repository / "docker" / "requirements" / f"{name}.txt" for name in _LOCKS]
        digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
        fetched = self.wheels / "fetched"
        if fetched.exists() and fetched.read_text() == digest:
            return
        for listed in locks:
            options = ("--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:")
            run(sys.executable, "-m", "pip", "download", *options, "-d", self.wheels, "-r", listed)
        fetched.write_text(digest)

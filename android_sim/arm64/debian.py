"""Finds packages in a Debian archive: their versions, places and digests, from its signed index.

In: a mirror, a suite, an architecture and package names. Out: a `Package` for each name. Knows nothing of
what is in them.

The chain: `InRelease` (signed by Debian; checked where `gpgv` and Debian's keyring are installed, else it is
as good as the connection to the mirror) names the digest of `Packages.xz`, which names the digest of every
package.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.machine.prepared import Tell

from .download import download, read_small

MIRROR = "https://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
RELEASE_LIMIT_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACE = re.compile(r"pool/[A-Za-z0-9][A-Za-z0-9+._~/%:-]*\.deb")


@dataclass(frozen=True)
class Package:
    """A package in the archive.

    Attributes:
        name: of the package.
        version: of it.
        place: path below the mirror.
        size_bytes: of the file.
        sha256: of the file, in hex.
    """

    name: str
    version: str
    place: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _PLACE.fullmatch(self.place) or ".." in self.place.split("/"):
            raise SimulationError(
                f"the index places {self.name} at {self.place!r}, which is no path of an archive"
            )
        if not _SHA256.fullmatch(self.sha256) or self.size_bytes <= 0:
            raise SimulationError(
                f"the index gives {self.name} no usable size and SHA-256; try another mirror"
            )

    @property
    def file_name(self) -> str:
        """Name of the file."""
        return self.place.rpartition("/")[2]


@dataclass(frozen=True)
class Found:
    """Packages, and how far their index can be trusted.

    Attributes:
        packages: in the order of the names asked for.
        signature: what was found of the index's signature, a part of a sentence.
    """

    packages: tuple[Package, ...]
    signature: str


def find_packages(
    names: Collection[str], *, suite: str, architecture: str, folder: Path, tell: Tell, mirror: str = MIRROR
) -> Found:
    """Look packages up.

    Args:
        names: of the packages.
        suite: such as "bookworm".
        architecture: such as "arm64".
        folder: the index is kept here; an index of the same digest is not fetched again.
        tell: told of the progress.
        mirror: address of the archive.

    Raises:
        SimulationError: the mirror cannot be reached, or is not what it should be.
    """
    address = f"{mirror}/dists/{suite}"
    text, signature = _signed_text(read_small(f"{address}/InRelease", RELEASE_LIMIT_BYTES), address)
    place = f"main/binary-{architecture}/Packages.xz"
    size, sha256 = _listed(text, place, address)
    index = folder / f"Packages-{suite}-{architecture}.xz"
    download(f"{address}/{place}", index, size_bytes=size, sha256=sha256, stage="Index", tell=tell)
    found: dict[str, Package] = {}
    for entry in _stanzas(index, frozenset(names)):
        try:
            package = Package(
                entry["Package"], entry["Version"], entry["Filename"], int(entry["Size"]), entry["SHA256"]
            )
        except (KeyError, ValueError) as error:
            raise SimulationError(
                f"{address} describes {entry.get('Package')} without {error}; try another mirror"
            ) from error
        found[package.name] = package  # an archive lists one version; a later one would be newer
    if missing := [name for name in names if name not in found]:
        raise SimulationError(f"{address} has no {architecture} package {missing[0]}; try another mirror")
    return Found(tuple(found[name] for name in names), signature)


def _signed_text(content: bytes, address: str) -> tuple[str, str]:
    """The signed part of an InRelease file, and what is known of its signature.

    Raises:
        SimulationError: the signature is wrong, or the file is none.
    """
    checker = shutil.which("gpgv")
    if checker is not None and KEYRING.is_file():
        done = subprocess.run(
            [checker, "--keyring", str(KEYRING), "--status-fd", "2", "--output", "-"],
            input=content,
            capture_output=True,
            check=False,
        )
        status = done.stderr.decode(errors="replace")
        if "[GNUPG:] BADSIG" in status:
            raise SimulationError(f"{address}/InRelease has a wrong signature; try another mirror")
        # A release is signed by several keys, of which an older keyring need not know all.
        if "[GNUPG:] VALIDSIG" in status and done.stdout:
            return done.stdout.decode(errors="replace"), "signed by Debian, checked"
        if "[GNUPG:] NO_PUBKEY" not in status:
            raise SimulationError(f"{address}/InRelease is not signed; name another mirror")
        note = "not checked: the keyring does not know its keys"
    else:
        note = "not checked: no gpgv, or no keyring of Debian"
    text = content.decode(errors="replace")
    if "\nSHA256:" not in text:
        raise SimulationError(f"{address}/InRelease is no index of a Debian archive; name another mirror")
    return text.partition("-----BEGIN PGP SIGNATURE-----")[0], note


def _listed(release: str, place: str, address: str) -> tuple[int, str]:
    """Size and SHA-256 of a file that a release lists."""
    section = release.partition("\nSHA256:")[2]
    for line in section.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2] == place and fields[1].isdigit() and _SHA256.fullmatch(fields[0]):
            return int(fields[1]), fields[0]
        if line and not line.startswith(" "):
            break  # the next section
    raise SimulationError(f"{address}/InRelease does not list {place}; name another mirror")


def _stanzas(index: Path, names: frozenset[str]) -> Iterator[dict[str, str]]:
    """The entries of the named packages; lines that continue others are left out."""
    entry: dict[str, str] = {}
    wanted = False
    try:
        with lzma.open(index, "rt", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line == "\n":
                    if wanted:
                        yield entry
                    entry, wanted = {}, False
                    continue
                name, separator, value = line.partition(":")
                if name == "Package":
                    wanted = value.strip() in names
                    entry = {}
                if wanted and separator and not line.startswith(" "):
                    entry[name] = value.strip()
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise SimulationError(f"{index} cannot be read ({error}); delete it and try again") from error
    if wanted:
        yield entry

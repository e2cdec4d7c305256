"""A private Tor network on the loopback interface of a network namespace of its own.

    start.py relay|client TOR FOLDER TOR_GENCERT

Three directory authorities, two relays and a client run TOR; this process becomes the client or one of the relays. Each
has a folder below FOLDER with its control socket, the client also its SOCKS socket. Needs root.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

AUTHORITIES = ("authority1", "authority2", "authority3")
RELAYS = ("relay", "relay2")
SECONDS = 300.0
COMMON = """\
TestingTorNetwork 1
PathsNeededToBuildCircuits 0.67
TestingDirAuthVoteExit *
TestingDirAuthVoteGuard *
TestingMinExitFlagThreshold 0
ShutdownWaitLength 0
Log notice stdout
DataDirectory {folder}
ControlSocket {folder}/control
"""
RELAY = """\
Nickname {name}
Address 127.0.0.1
AssumeReachable 1
OrPort 127.0.0.1:{port}
ExitRelay 1
ExitPolicyRejectPrivate 0
ExitPolicy accept *:*
SocksPort 0
ContactInfo nobody@localhost
"""
AUTHORITY = """\
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
DirPort 127.0.0.1:{directory}
V3AuthVotingInterval 20
V3AuthVoteDelay 4
V3AuthDistDelay 4
TestingV3AuthInitialVotingInterval 20
TestingV3AuthInitialVoteDelay 4
TestingV3AuthInitialDistDelay 4
"""
CLIENT = """\
SocksPort unix:{folder}/socks
"""


class Network:
    """The folders, keys and configurations of all."""

    def __init__(self, tor: str, folder: Path, gencert: str) -> None:
        self._tor = tor
        self._gencert = gencert
        self._folder = folder
        relays = (*AUTHORITIES, *RELAYS)
        self._ports = {name: 5000 + number for number, name in enumerate(relays)}
        for name in (*relays, "client"):
            (folder / name / "keys").mkdir(parents=True)
            (folder / name).chmod(0o700)
            (folder / name / "keys").chmod(0o700)
        known = "".join(self._line_of(name) for name in AUTHORITIES)
        for name in (*relays, "client"):
            (self.torrc(name)).write_text(known + self._configuration(name))

    def torrc(self, name: str) -> Path:
        return self._folder / name / "torrc"

    def _configuration(self, name: str) -> str:
        parts = [COMMON]
        if name == "client":
            parts.append(CLIENT)
        else:
            parts.append(RELAY)
        if name in AUTHORITIES:
            parts.append(AUTHORITY)
        port = self._ports.get(name, 0)
        return "".join(parts).format(name=name, folder=self._folder / name, port=port, directory=port + 2000)

    def _line_of(self, name: str) -> str:
        """Make an authority's keys; the line by which all others know it."""
        port, folder = self._ports[name], self._folder / name
        address = f"127.0.0.1:{port + 2000}"
        subprocess.run(
            [self._gencert, "--create-identity-key", "--passphrase-fd", "0", "-m", "12", "-a", address],
            input=b"passphrase\n", cwd=folder / "keys", check=True, timeout=SECONDS, capture_output=True,
        )  # fmt: skip
        certificate = (folder / "keys" / "authority_certificate").read_text()
        identity = re.search(r"^fingerprint ([0-9A-F]{40})$", certificate, re.MULTILINE)
        said = subprocess.run(
            [
                self._tor, "--ignore-missing-torrc", "-f", "none", "--quiet", "--list-fingerprint",
                "--ORPort", str(port), "--DataDirectory", str(folder), "--Nickname", name,
            ],
            check=True, timeout=SECONDS, capture_output=True, text=True,
        ).stdout  # fmt: skip
        router = re.search(rf"^{name} ([0-9A-F ]+)$", said, re.MULTILINE)
        if identity is None or router is None:
            raise SystemExit(f"no fingerprints of {name}: {said}")
        known = f"orport={port} no-v2 v3ident={identity[1]} {address} {router[1].replace(' ', '')}"
        return f"DirAuthority {name} {known}\n"


def main(words: list[str]) -> int:
    match words:
        case [("relay" | "client") as role, tor, folder, gencert]:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=SECONDS)
            network = Network(tor, Path(folder), gencert)
            for name in (*AUTHORITIES, *RELAYS, "client"):
                if name != role:
                    output = (Path(folder) / name / "output").open("w")
                    subprocess.Popen([tor, "-f", network.torrc(name)], stdout=output, stderr=output)
            os.execv(tor, [tor, "-f", str(network.torrc(role))])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

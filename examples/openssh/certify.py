"""Certifies an ed25519 key for a user of any name, also one that ssh-keygen(1) cannot write (PROTOCOL.certkeys).

certify.py KEY NAME...    writes KEY-cert.pub; the authority's key is authority.pub beside it, made where it is missing
"""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

KIND = "ssh-ed25519"
USERS, FOR_EVER = 1, (1 << 64) - 1  # type of the certificate, end of its validity


class Authority:
    """One that certifies; its key lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, folder / "authority.pem"
        if not self._key.exists():
            _openssl("genpkey", "-algorithm", "ed25519", "-out", self._key)
        public = folder / "authority.der"
        _openssl("pkey", "-pubout", "-outform", "DER", "-in", self._key, "-out", public)
        self._public = _string(KIND) + _string(public.read_bytes()[-32:])  # RFC 8410
        (folder / "authority.pub").write_text(f"{KIND} {base64.b64encode(self._public).decode()}\n")

    def certify(self, key: Path, names: Sequence[str]) -> None:
        """Write the certificate of a key for users of these names."""
        blob = base64.b64decode(key.with_suffix(".pub").read_text().split()[1])
        kind = f"{KIND}-cert-v01@openssh.com"
        users = _string(b"".join(map(_string, names)))
        head = _string(kind) + _string(os.urandom(32)) + blob[4 + len(KIND) :] + struct.pack(">QI", 1, USERS)
        body = head + _string("a rehearsal") + users + struct.pack(">QQ", 0, FOR_EVER)
        body += 3 * _string("") + _string(self._public)  # no critical options, no extensions, nothing reserved
        signed = base64.b64encode(body + _string(_string(KIND) + _string(self._sign(body)))).decode()
        key.with_name(f"{key.name}-cert.pub").write_text(f"{kind} {signed} certified\n")

    def _sign(self, data: bytes) -> bytes:
        given, signature = self._folder / "to-sign", self._folder / "signature"
        given.write_bytes(data)
        _openssl("pkeyutl", "-sign", "-inkey", self._key, "-rawin", "-in", given, "-out", signature)
        return signature.read_bytes()


def _string(data: bytes | str) -> bytes:
    """RFC 4251, section 5."""
    raw = data.encode() if isinstance(data, str) else data
    return struct.pack(">I", len(raw)) + raw


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True)


def main(words: list[str]) -> int:
    if len(words) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    key = Path(words[0])
    Authority(key.parent).certify(key, words[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

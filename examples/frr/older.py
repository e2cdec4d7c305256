"""Makes the older build of ospfd.toml out of the new one: it names an older standard, and has another build-id.

older.py OSPFD OLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

STANDARD = b"This implementation conforms to RFC2328"
NOTE = b"\4\0\0\0\x14\0\0\0\3\0\0\0GNU\0"  # of a build-id of 20 bytes (elf.h, NT_GNU_BUILD_ID)


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    program = bytearray(Path(words[0]).read_bytes())
    for text in (STANDARD, NOTE):
        if program.count(text) != 1:
            print(f"{words[0]}: {program.count(text)} times {text!r}", file=sys.stderr)
            return 1
    end = program.index(STANDARD) + len(STANDARD)
    program[end - 4 : end] = b"1583"
    program[program.index(NOTE) + len(NOTE)] ^= 0xFF
    older = Path(words[1])
    older.write_bytes(program)
    older.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

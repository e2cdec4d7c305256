"""``python -m bench [--rounds N] [differ | pause] [NAME ...]``: both benchmarks, or one and some of its rows."""

from __future__ import annotations

import argparse

from bench import differ, pause

BENCHMARKS = {"differ": differ.main, "pause": pause.main}


def main() -> None:
    """Run what is asked for; each benchmark knows its own number of rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("names", nargs=argparse.REMAINDER, metavar="NAME", help="differ or pause, and its arguments")
    arguments = parser.parse_args()
    chosen = arguments.names[0] if arguments.names and arguments.names[0] in BENCHMARKS else ""
    rest = arguments.names[1:] if chosen else arguments.names
    if rest and not chosen:
        parser.error(f"{rest[0]} is none of {', '.join(BENCHMARKS)}")
    rounds = ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    for name, run in BENCHMARKS.items():
        if chosen in ("", name):
            run([*rounds, *rest])


if __name__ == "__main__":
    main()

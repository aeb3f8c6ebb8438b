"""Damage config.pbtxt, manifest.json, the record, signatures, labels and repository.yaml, and call all their readers.

    python tests/fuzz/fuzz_repository.py --seconds 60 [--first SEED] [--only SEED]

Anything but success or an error of ours is a finding: another exception, more than 10 s, a changed signature or
manifest accepted, a changed model file. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.repository_cases import Cases

LIMIT_S = 10


def on_alarm(*_: object) -> None:
    raise TimeoutError("hang")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, on_alarm)
    memory = Path("/dev/shm")
    seen: collections.Counter[str] = collections.Counter()
    findings: list[int] = []
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        cases = Cases(Path(folder))
        seed = options.first if options.only is None else options.only
        end = time.monotonic() + (options.seconds if options.only is None else 0)
        while True:
            signal.alarm(LIMIT_S)
            try:
                seen[cases.run(seed)] += 1
            except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                findings.append(seed)
                print(f"case {seed}:", file=sys.stderr)
                traceback.print_exc()
            signal.alarm(0)
            seed += 1
            if time.monotonic() >= end:
                break
    print(f"{sum(seen.values())} cases {dict(seen)}, {len(findings)} findings {findings[:20]}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()

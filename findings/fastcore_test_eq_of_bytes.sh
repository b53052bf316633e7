#!/usr/bin/env bash
# fastcore 2.2.41: `test_eq` compares bytes element by element, through a chain of Python calls for each. Two equal files
# of 3 MB keep a notebook's check busy for half a minute where `==` needs a millisecond. Seen on one CPU core: 100,000
# bytes in 1.0 s. `assert a == b` does not have this.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q fastcore==2.2.41
"$place/venv/bin/python" - <<'P'
import time
from fastcore.test import test_eq

def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start

a, b = bytes(100_000), bytes(bytearray(100_000))
slow = seconds(lambda: test_eq(a, b))
fast = seconds(lambda: [a == b for _ in range(100)]) / 100
print(f'test_eq: {slow:.2f} s, ==: {fast * 1e6:.0f} microseconds, {slow / fast:,.0f} times')
assert slow / fast > 1000
P

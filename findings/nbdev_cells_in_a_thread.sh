#!/usr/bin/env bash
# nbdev 3.3.26 (execnb 0.3.4): `nbdev-test` runs each cell outside of Python's main thread, which its time limit for
# cells needs (600 s by default). So code that installs a signal handler works in a Jupyter kernel (nbclient 0.11.0,
# ipykernel 7.1.0) and fails in the test:
#   ValueError: signal only works in main thread of the main interpreter
# Seen on Python 3.11. A cell that checks such code has to replace signal.signal.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q nbdev==3.3.26 execnb==0.3.4 nbclient==0.11.0 ipykernel==7.1.0
cd "$place"
mkdir nbs demo
cat > pyproject.toml <<'T'
[project]
name = "demo"
version = "0.0.1"
description = "a demo"
requires-python = ">=3.10"
[tool.nbdev]
T
cat > nbs/00_core.ipynb <<'N'
{"cells": [{"cell_type": "code", "execution_count": null, "id": "a0000001", "metadata": {}, "outputs": [],
 "source": ["import signal\n", "import threading\n", "print(threading.current_thread() is threading.main_thread())\n",
 "signal.signal(signal.SIGINT, signal.default_int_handler)"]}],
 "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
N
export PATH="$place/venv/bin:$PATH"
nbdev-test nbs --n-workers 0 > test.txt 2>&1 && tested=passes || tested=fails
jupyter execute nbs/00_core.ipynb > kernel.txt 2>&1 && kernel=passes || kernel=fails
grep -o 'ValueError: signal only works in main thread.*' test.txt | head -1
echo "in a Jupyter kernel the cell $kernel, in nbdev-test it $tested"
test "$kernel $tested" = "passes fails"

#!/usr/bin/env bash
# wandb 0.31.0: in offline mode the rows of a run wait in a process of wandb's own, and its file is written every 15
# seconds by default. A run that a machine ends with SIGKILL after some logged steps leaves a file of a few bytes: none
# of them is there, where the same run that ends by itself has them all.
# Seen below: 7 bytes after a kill, more than 1,000 after a normal end.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q wandb==0.31.0
cat > "$place/run.py" <<'P'
import os
import signal
import sys

import wandb

run = wandb.init(project='p', dir=sys.argv[1])
for step in range(1, 6):
    run.log({'loss': 1 / step}, step=step)
if sys.argv[2] == 'killed':
    os.killpg(0, signal.SIGKILL)   # as a machine that goes down, which ends wandb's process, too
run.finish()
P
sizes=()
for end in normal killed; do
    mkdir "$place/$end"
    WANDB_MODE=offline WANDB_SILENT=true setsid -w "$place/venv/bin/python" "$place/run.py" "$place/$end" "$end" || true
    sizes+=("$(find "$place/$end" -name '*.wandb' -printf '%s\n')")
done
echo "normal end: ${sizes[0]} bytes, killed: ${sizes[1]} bytes"
test "${sizes[0]}" -gt 1000
test "${sizes[1]}" -lt 100

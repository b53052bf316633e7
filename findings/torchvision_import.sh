#!/usr/bin/env bash
# torchvision 0.29.1 (torch 2.14.1): any import from torchvision, even `torchvision.io` for one JPEG decoder, loads
# torchvision.models and, through torchvision.ops, PyTorch's compiler front end torch._dynamo, which `import torch` does
# not. Seen on two CPU cores: 2.2 CPU seconds for torch, 2.0 more for torchvision. A command that only prints its help
# should not import it. The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
"$place/venv/bin/python" - <<'P'
import sys
import time
watched = 'torch._dynamo', 'torchvision.models', 'torchvision.ops'
start = time.process_time()
import torch
print(f'import torch: {time.process_time() - start:.1f} s', {name: name in sys.modules for name in watched})
assert 'torch._dynamo' not in sys.modules
start = time.process_time()
import torchvision.io
print(f'import torchvision.io: {time.process_time() - start:.1f} s more', {name: name in sys.modules for name in watched})
assert all(name in sys.modules for name in watched)
P

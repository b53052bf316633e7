#!/usr/bin/env bash
# torch 2.14.1: DistributedDataParallel warns in every process that a gradient's strides do not match its bucket's when
# a convolution has one input channel and the images' memory is channels last, as a loader of grey pictures gives them.
# The stride of an axis of length 1 can be written in several ways, and the two layouts are the same memory.
# Seen below: one channel warns, three channels and plain memory do not.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$place/warn.py" <<'P'
import sys
import warnings

import torch
from torch import distributed as dist, nn

channels, memory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Conv2d(channels, 8, 4, stride=4), gradient_as_bucket_view=True)
images = torch.randn(2, 28, 28, channels).permute(0, 3, 1, 2)
if memory == 'plain':
    images = torch.randn(2, channels, 28, 28)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    model(images).sum().backward()
strides = [w for w in caught if 'strides do not match' in str(w.message)]
print(f'{channels} input channels, {memory} memory: {len(strides)} warnings')
sys.exit(len(strides))
P
code=0
"$place/venv/bin/python" "$place/warn.py" 1 last || code=$?
test "$code" = 1
"$place/venv/bin/python" "$place/warn.py" 3 last
"$place/venv/bin/python" "$place/warn.py" 1 plain

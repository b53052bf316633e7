#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode leaves attention out on a CPU when PyTorch takes its fused kernel for it, which it does
# by itself: the operation is not in the counter's table, and nothing says so. The same model counted with the backend
# MATH has them. For a small vision transformer a third of the work is missing.
# Seen below: one head, 64 tokens, width 32: 0 operations fused, 524288 (4 n n d) written out.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$place/count.py" <<'P'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

query = torch.randn(1, 1, 64, 32)

def count():
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, query, query)
    return counter.get_total_flops()

fused = count()
with sdpa_kernel(SDPBackend.MATH):
    written_out = count()
print(f'fused {fused}, written out {written_out}')
raise SystemExit((fused, written_out) != (0, 4 * 64 * 64 * 32))
P
"$place/venv/bin/python" "$place/count.py"

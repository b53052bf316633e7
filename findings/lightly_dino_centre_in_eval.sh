#!/usr/bin/env bash
# lightly 1.6.0 (torch 2.14.1): DINOLoss moves its centre in every call, also in eval() and under torch.no_grad(). Who
# measures the loss on a validation set changes what is trained afterwards. Seen below: the centre before and after one
# call in eval mode. The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 lightly==1.6.0
"$place/venv/bin/python" -W ignore - <<'P'
import torch
from lightly.loss import DINOLoss

torch.manual_seed(0)
loss = DINOLoss(output_dim=8).eval()
views = [torch.randn(4, 8) for _ in range(2)]
before = loss.center.value.clone() if hasattr(loss.center, 'value') else loss.center.clone()
with torch.no_grad():
    loss(views, views)
after = loss.center.value if hasattr(loss.center, 'value') else loss.center
print('centre before', before.flatten().tolist())
print('centre after ', [round(v, 4) for v in after.flatten().tolist()])
assert not torch.equal(before, after)
P

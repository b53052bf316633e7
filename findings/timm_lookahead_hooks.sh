#!/usr/bin/env bash
# timm 1.0.31 with torch 2.14.1: timm.optim.Lookahead is an optimizer of torch, accepts step hooks, and calls none of
# them; those of the optimizer inside it run. Its `state` stays empty, while its state_dict() has the averages. A loop
# that counts steps in a hook, skips steps by one, or reads `optimizer.state` for a checkpoint sees nothing of it.
# Seen below: 0 calls of the outer hook, 6 of the inner one; no entry in `state`, lookahead_slow_buff in state_dict().
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6
cat > "$place/hooks.py" <<'P'
import torch
from timm.optim import Lookahead

weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
inner = torch.optim.AdamW([weight], lr=.1)
outer, calls = Lookahead(inner), dict(outer=0, inner=0)

def counter(name):
    def count(*_):
        calls[name] += 1
    return count

outer.register_step_pre_hook(counter('outer'))
inner.register_step_pre_hook(counter('inner'))
for _ in range(6):
    outer.step()
held = sorted(outer.state_dict()['state'][0])
print(f'is an optimizer of torch: {isinstance(outer, torch.optim.Optimizer)}; calls: {calls}; '
      f'entries in state: {len(outer.state)}; in state_dict(): {held}')
as_seen = isinstance(outer, torch.optim.Optimizer) and calls == dict(outer=0, inner=6) and not outer.state
raise SystemExit(not (as_seen and 'lookahead_slow_buff' in held))
P
"$place/venv/bin/python" "$place/hooks.py"

#!/usr/bin/env bash
# torch 2.14.1: AdamW with fused=True changes the weights without raising their version, so autograd does not notice
# that a value it has kept was overwritten. A graph that was built before the step and is run backward after it ends in
# an error with foreach=True, and in a wrong gradient with fused=True, without a word. Whoever uses the version of a
# tensor to see whether it has changed, to save it in the background for example, is misled in the same way.
# Seen below: an error with foreach; with fused 1.0 where 2.0 is right.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$place/gradient.py" <<'P'
import torch

def gradient(fused):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=.5, weight_decay=0., fused=fused, foreach=not fused)
    square = (weight * weight).sum()   # keeps the weight of now for the backward pass
    optimizer.step()
    weight.grad = None
    try:
        square.backward()
    except RuntimeError:
        return 'an error'
    return weight.grad.tolist()

foreach, fused = gradient(False), gradient(True)
print(f'foreach: {foreach}, fused: {fused}, right: [2.0, 2.0]')
raise SystemExit(foreach != 'an error' or fused == 'an error' or fused == [2., 2.])
P
"$place/venv/bin/python" "$place/gradient.py"

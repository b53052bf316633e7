#!/usr/bin/env bash
# torch 2.14.1 (onnx 1.23.2, onnxscript 0.7.2): torch.onnx.export(dynamo=True) translates a sort, and not a stable one.
# Shuffle masking sorts noise, and a stable sort is what makes its ties the same everywhere. Seen below: the model with
# `sort` is written, the one with `argsort(stable=True)` ends in an error about a missing translation.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2
"$place/venv/bin/python" -W ignore - <<'P'
import torch

class Sorted(torch.nn.Module):
    def forward(self, noise):
        return noise.sort(dim=1).indices

class StablySorted(torch.nn.Module):
    def forward(self, noise):
        return noise.argsort(dim=1, stable=True)

noise = torch.rand(2, 16)

def outcome(model):
    "What an export ends in."
    try:
        torch.onnx.export(model.eval(), (noise,), dynamo=True, verbose=False)
    except Exception as e:
        return f'{type(e).__name__}: {"no translation" if "sort" in str(e) else str(e)[:200]}'
    return 'written'

plain, stable = outcome(Sorted()), outcome(StablySorted())
print('sort                 ', plain)
print('argsort, stable=True ', stable)
assert plain == 'written'
assert 'no translation' in stable
P

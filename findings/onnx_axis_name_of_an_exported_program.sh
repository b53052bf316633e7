#!/usr/bin/env bash
# torch 2.14.1 (onnx 1.23.2, onnxscript 0.7.2): the name of a free axis is kept when torch.onnx.export is given a module,
# and lost when it is given the ExportedProgram that torch.export.export has made of the same module. A ViT exported both
# ways has a batch axis called "batch" in one file and by a generated symbol in the other; tools that ask for an axis
# by its name then find none. Seen below: batch, and s followed by a number.
# The installation takes some gigabytes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cat > "$place/axis.py" <<'P'
import re
import sys

import onnx
import torch
from torch import nn

folder = sys.argv[1]
patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2)).eval()
images = torch.randn(2, 3, 32, 32)
shapes = ({0: torch.export.Dim('batch', min=1, max=64)},)
program = torch.export.export(patches, (images,), dynamic_shapes=shapes)
torch.onnx.export(patches, (images,), f'{folder}/module.onnx', dynamo=True, dynamic_shapes=shapes, verbose=False)
torch.onnx.export(program, (images,), f'{folder}/program.onnx', dynamo=True, verbose=False)

def first_axis(name):
    value = onnx.load(f'{folder}/{name}.onnx').graph.input[0]
    return value.type.tensor_type.shape.dim[0].dim_param

of_module, of_program = first_axis('module'), first_axis('program')
print('from the module          ', of_module)
print('from its ExportedProgram ', of_program)
assert of_module == 'batch'
assert re.fullmatch(r's\d+', of_program)
P
"$place/venv/bin/python" -W ignore "$place/axis.py" "$place"

#!/usr/bin/env bash
# nbdev 3.3.26: `nbdev-export` makes a package's imports of itself relative, so that the package can be renamed or
# nested. It leaves an import of several lines as it is where the last line is short: `update_import` cuts the first
# line off at the column at which the last one ends, and a closing bracket alone ends at column 1. An import of several
# lines whose last line is long is made relative. The exported package works under its own name only.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q nbdev==3.3.26 execnb==0.3.4
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
export PATH="$place/venv/bin:$PATH"
python - <<'P'
import json
notebooks = dict(core=['one = two = 1'], user=['from demo.core import one', 'from demo.core import (\n    one, two,\n)',
                                             'from demo.core import (one,\n                       two)'])
for name, cells in notebooks.items():
    sources = [f'#| default_exp {name}', *(f'#| export\n{cell}' for cell in cells)]
    made = [dict(cell_type='code', execution_count=None, id=f'{name}{i}', metadata={}, outputs=[], source=[source])
            for i, source in enumerate(sources)]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    with open(f'nbs/{name}.ipynb', 'w') as f:
        json.dump(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5), f)
P
nbdev-export
grep -n 'import' demo/user.py
grep -qx 'from .core import one' demo/user.py && echo "one line is made relative"
grep -qx 'from demo.core import (' demo/user.py && echo "several lines with a short last one are not"
grep -qx 'from .core import (one,' demo/user.py && echo "several lines with a long last one are"

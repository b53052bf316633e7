#!/usr/bin/env bash
# Pillow 13.0.0: a TIFF of several 16-bit bands, each stored in a plane of its own (PlanarConfiguration 2, as satellite
# pictures often are), opens as a grey picture of the first band when it is compressed: no error, no warning, and the
# other bands are gone. The same file without compression is an error. tifffile reads both.
# Seen below: four bands; zlib: mode I;16, equal to band 0; no compression: ValueError.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cat > "$place/read.py" <<'P'
import io

import numpy as np
import tifffile
from PIL import Image

bands = np.arange(4 * 16 * 16, dtype=np.uint16).reshape(4, 16, 16)

def seen(compression):
    file = io.BytesIO()
    tifffile.imwrite(file, bands, planarconfig='separate', photometric='minisblack', compression=compression)
    assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), bands)
    try:
        img = Image.open(io.BytesIO(file.getvalue()))
        return img.mode, np.array_equal(np.asarray(img), bands[0])
    except ValueError:
        return 'an error'

answers = {compression: seen(compression) for compression in ('zlib', None)}
print(answers)
raise SystemExit(answers != {'zlib': ('I;16', True), None: 'an error'})
P
"$place/venv/bin/python" "$place/read.py"

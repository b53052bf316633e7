#!/usr/bin/env bash
# s3fs 2026.9.0 with fsspec 2026.9.0: `cat_file(path, start, end)` of every fsspec file system takes the range by
# position, and s3fs has the version of the object in the place of `start`. The same call that reads bytes 2 to 4 from
# memory or disk asks S3 for version 2 from byte 5 to the end; no name or type is checked. By name it is right.
# Seen below, without a network, as the request that would be sent: Range bytes=5- and version 2 by position,
# Range bytes=2-4 and no version by name.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0
cat > "$place/range.py" <<'P'
import fsspec
import s3fs

requests = []

class Asked(Exception):
    pass

class Store(s3fs.S3FileSystem):
    async def _call_s3(self, method, *args, **kwargs):
        requests.append((kwargs.get('Range'), kwargs.get('VersionId')))
        raise Asked

memory = fsspec.filesystem('memory')
memory.pipe_file('/photo', bytes(range(10)))
same = memory.cat_file('/photo', 2, 5) == memory.cat_file('/photo', start=2, end=5)
store = Store(anon=True, skip_instance_cache=True)
for place, named in (((2, 5), {}), ((), dict(start=2, end=5))):
    try:
        store.cat_file('bucket/photo', *place, **named)
    except Asked:
        pass
print(f'memory: the same bytes {same}; s3fs by position {requests[0]}, by name {requests[1]}')
raise SystemExit(not same or requests != [('bytes=5-', 2), ('bytes=2-4', None)])
P
"$place/venv/bin/python" "$place/range.py"

"""Random access by number in the formats that `shards` chose from: python bench/formats.py SAMPLE.tar [FORMAT ...]

The JPEGs of SAMPLE.tar eight times over; each is then asked for once, in random order, three times. Bytes only, one process, files in
the system's cache, and the median of the three. Formats that are not installed are left out; each runs in a process of its own, whose
memory is told before and after.
"""
import argparse
import importlib.util
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PER_SHARD = 1000

def files(d, raws):
    for i, b in enumerate(raws): (d/f'{i:05}.jpg').write_bytes(b)
    return lambda i: (d/f'{i:05}.jpg').read_bytes()

def arrow(d, raws, rows=1, mapped=False):
    import pyarrow as pa
    schema, opened = pa.schema(dict(image=pa.binary())), []
    for s in range(0, len(raws), PER_SHARD):
        with pa.OSFile(str(d/str(s)), 'wb') as f, pa.ipc.new_file(f, schema) as w:
            for i in range(s, min(s + PER_SHARD, len(raws)), rows): w.write_batch(pa.record_batch([raws[i:min(i + rows, s + PER_SHARD)]], schema=schema))
        opened.append(pa.ipc.open_file((pa.memory_map if mapped else pa.OSFile)(str(d/str(s)))))
    return lambda i: opened[i // PER_SHARD].get_batch(i % PER_SHARD // rows).column(0)[i % PER_SHARD % rows].as_py()

def parquet(d, raws, rows=1):
    import pyarrow as pa
    import pyarrow.parquet as pq
    opened = []
    for s in range(0, len(raws), PER_SHARD):
        pq.write_table(pa.table(dict(image=raws[s:s + PER_SHARD])), d/str(s), row_group_size=rows, compression='none', use_dictionary=False, write_page_checksum=True)
        opened.append(pq.ParquetFile(d/str(s), page_checksum_verification=True))
    return lambda i: opened[i // PER_SHARD].read_row_group(i % PER_SHARD // rows, use_threads=False)['image'][i % PER_SHARD % rows].as_py()

def array_record(d, raws):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordWriter
    w = ArrayRecordWriter(str(d/'x'), 'group_size:1,uncompressed')
    for b in raws: w.write(b)
    w.close()
    return ArrayRecordDataSource([str(d/'x')]).__getitem__

def lmdb(d, raws):
    import lmdb
    env = lmdb.open(str(d), map_size=2**32, readahead=False)
    with env.begin(write=True) as t:
        for i, b in enumerate(raws): t.put(b'%08d' % i, b)
    def get(i):
        with env.begin() as t: return t.get(b'%08d' % i)
    return get

def wids(d, raws):
    import wids
    shards = []
    for s in range(0, len(raws), PER_SHARD):
        shards.append(dict(url=str(d/f'{s}.tar'), nsamples=len(raws[s:s + PER_SHARD])))
        with tarfile.open(d/f'{s}.tar', 'w') as tar:
            for i, b in enumerate(raws[s:s + PER_SHARD]): info = tarfile.TarInfo(f'{s + i:08}.jpg'); info.size = len(b); tar.addfile(info, io.BytesIO(b))
    data = wids.ShardListDataset(shards, transformations=[], keep=True)
    return lambda i: data[i]['.jpg'].read()

def litdata(d, raws):
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter
    w = BinaryWriter(str(d), chunk_bytes='128MB')
    for i, b in enumerate(raws): w[i] = dict(image=b)
    w.done(); w.merge()
    data = StreamingDataset(str(d))
    return lambda i: data[i]['image']

FORMATS = {
    'files': (None, files), 'arrow': ('pyarrow', arrow), 'arrow-mapped': ('pyarrow', lambda *a: arrow(*a, mapped=True)),
    'parquet-1': ('pyarrow', parquet), 'parquet-16': ('pyarrow', lambda *a: parquet(*a, 16)), 'parquet-100': ('pyarrow', lambda *a: parquet(*a, 100)),
    'array_record': ('array_record', array_record), 'lmdb': ('lmdb', lmdb), 'wids': ('wids', wids), 'litdata': ('litdata', litdata)}

def resident(): return int(next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmRSS')).split()[1]) // 1024

def measure(sample, name):
    with tarfile.open(sample) as tar: raws = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')] * 8
    order, rates = random.Random(0).sample(range(len(raws)), len(raws)), []
    if name == 'parquet-100': order = order[:300]
    with tempfile.TemporaryDirectory() as d:
        get = FORMATS[name][1](Path(d), raws)
        assert all(get(i) == raws[i] for i in order[:50])
        before = resident()
        for _ in range(3):
            start = time.perf_counter()
            for i in order: get(i)
            rates.append(len(order) / (time.perf_counter() - start))
        print(f'{name:14} {sorted(rates)[1]:10,.0f} reads/s   memory {before} -> {resident()} MiB', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('sample'); p.add_argument('formats', nargs='*', default=list(FORMATS))
    a = p.parse_args()
    if len(a.formats) == 1: measure(a.sample, *a.formats)
    else:
        for name in a.formats:
            if FORMATS[name][0] and not importlib.util.find_spec(FORMATS[name][0]): print(f'{name:14} not installed'); continue
            subprocess.run([sys.executable, __file__, a.sample, name], check=False)

"""Random access by number in the formats that `shards` chose from: python bench/formats.py SAMPLE.tar [FORMAT ...]

The JPEGs of SAMPLE.tar eight times over; each is then asked for once, in random order, three times. Bytes only, one
process, files in the system's cache, and the median of the three. Formats that are not installed are left out; each
runs in a process of its own, which reports its memory before and after.
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
from functools import partial
from pathlib import Path

PER_SHARD = 1000

def shards_of(raws):
    "(number of the first, files) of each shard."
    return [(start, raws[start:start + PER_SHARD]) for start in range(0, len(raws), PER_SHARD)]

def files(d, raws):
    for i, raw in enumerate(raws):
        (d/f'{i:05}.jpg').write_bytes(raw)
    return lambda i: (d/f'{i:05}.jpg').read_bytes()

def arrow(d, raws, rows=1, mapped=False):
    import pyarrow as pa
    schema, opened = pa.schema(dict(image=pa.binary())), []
    opener = pa.memory_map if mapped else pa.OSFile
    for start, shard in shards_of(raws):
        file = str(d/str(start))
        with pa.OSFile(file, 'wb') as f, pa.ipc.new_file(f, schema) as writer:
            for i in range(0, len(shard), rows):
                writer.write_batch(pa.record_batch([shard[i:i + rows]], schema=schema))
        opened.append(pa.ipc.open_file(opener(file)))

    def read(i):
        shard, place = divmod(i, PER_SHARD)
        return opened[shard].get_batch(place // rows).column(0)[place % rows].as_py()
    return read

def parquet(d, raws, rows=1):
    import pyarrow as pa
    import pyarrow.parquet as pq
    opened = []
    for start, shard in shards_of(raws):
        file = d/str(start)
        pq.write_table(pa.table(dict(image=shard)), file, row_group_size=rows, compression='none',
                       use_dictionary=False, write_page_checksum=True)
        opened.append(pq.ParquetFile(file, page_checksum_verification=True))

    def read(i):
        shard, place = divmod(i, PER_SHARD)
        return opened[shard].read_row_group(place // rows, use_threads=False)['image'][place % rows].as_py()
    return read

def array_record(d, raws):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(str(d/'x'), 'group_size:1,uncompressed')
    for raw in raws:
        writer.write(raw)
    writer.close()
    return ArrayRecordDataSource([str(d/'x')]).__getitem__

def lmdb(d, raws):
    import lmdb
    env = lmdb.open(str(d), map_size=2**32, readahead=False)
    with env.begin(write=True) as t:
        for i, raw in enumerate(raws):
            t.put(b'%08d' % i, raw)

    def read(i):
        with env.begin() as t:
            return t.get(b'%08d' % i)
    return read

def wids(d, raws):
    import wids
    shards = []
    for start, shard in shards_of(raws):
        file = d/f'{start}.tar'
        shards.append(dict(url=str(file), nsamples=len(shard)))
        with tarfile.open(file, 'w') as tar:
            for i, raw in enumerate(shard):
                info = tarfile.TarInfo(f'{start + i:08}.jpg')
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    data = wids.ShardListDataset(shards, transformations=[], keep=True)
    return lambda i: data[i]['.jpg'].read()

def litdata(d, raws):
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter
    writer = BinaryWriter(str(d), chunk_bytes='128MB')
    for i, raw in enumerate(raws):
        writer[i] = dict(image=raw)
    writer.done()
    writer.merge()
    data = StreamingDataset(str(d))
    return lambda i: data[i]['image']

FORMATS = {   # name -> (package, writer, which returns the reader)
    'files': (None, files),
    'arrow': ('pyarrow', arrow),
    'arrow-mapped': ('pyarrow', partial(arrow, mapped=True)),
    'parquet-1': ('pyarrow', parquet),
    'parquet-16': ('pyarrow', partial(parquet, rows=16)),
    'parquet-100': ('pyarrow', partial(parquet, rows=100)),
    'array_record': ('array_record', array_record),
    'lmdb': ('lmdb', lmdb),
    'wids': ('wids', wids),
    'litdata': ('litdata', litdata),
}

def resident_mib():
    "Memory of this process."
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('VmRSS')).split()[1]) // 1024

def measure(sample, name):
    "Write the files in one format, read them in random order, and print the rate."
    with tarfile.open(sample) as tar:
        raws = [tar.extractfile(m).read() for m in tar if m.name.endswith('.JPEG')] * 8
    order, rates = random.Random(0).sample(range(len(raws)), len(raws)), []
    if name == 'parquet-100':
        order = order[:300]
    with tempfile.TemporaryDirectory() as d:
        _, write = FORMATS[name]
        read = write(Path(d), raws)
        assert all(read(i) == raws[i] for i in order[:50])
        before = resident_mib()
        for _ in range(3):
            start = time.perf_counter()
            for i in order:
                read(i)
            rates.append(len(order) / (time.perf_counter() - start))
        print(f'{name:14} {sorted(rates)[1]:10,.0f} reads/s   memory {before} -> {resident_mib()} MiB', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sample')
    parser.add_argument('formats', nargs='*', default=list(FORMATS))
    args = parser.parse_args()
    if len(args.formats) == 1:
        measure(args.sample, *args.formats)
        return
    for name in args.formats:
        package, _ = FORMATS[name]
        if package and not importlib.util.find_spec(package):
            print(f'{name:14} not installed')
            continue
        subprocess.run([sys.executable, __file__, args.sample, name], check=False)

if __name__ == '__main__':
    main()

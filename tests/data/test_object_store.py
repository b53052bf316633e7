"""Packing to an object store and training from it: killed, refused, cut and slow connections, a full disk.

The store is moto's server, which speaks S3, on this machine; the addresses are `s3://...`, read through s3fs. A proxy
before it fails on purpose. All need `pip install -e '.[s3test]'`, which `dev` does not contain. Runs that are killed,
stalls with no, one and two workers, signals, and the libraries' own settings: `pytest -m slow` with this file.
"""
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from PIL import Image
from stores import Proxy, start_server
from support import begin_command, exit_code, fork

from mae_nb.base import stores
from mae_nb.base.signals import Monitor
from mae_nb.base.stores import Address, StoreError
from mae_nb.data.packing import pack_source
from mae_nb.data.shards import open_pack
from mae_nb.tasks import pretrain, visualize  # noqa: F401  here, and not in each fork

for name in ('s3fs', 'moto', 'flask_cors', 'pyarrow'):
    pytest.importorskip(name, reason="needs pip install -e '.[s3test]'")

slow = pytest.mark.slow
ASKS_TWICE = json.dumps(dict(config_kwargs=dict(read_timeout=2, connect_timeout=5, retries=dict(max_attempts=1))))
TRAIN = ('--model', 'mae_vit_nano_patch4_32', '--set', 'amp=False', '--bs', '20', '--epochs', '3', '--set',
         'warmup_epochs=0', '--save-every', '1')


@pytest.fixture(scope='module')
def server():
    process, port = start_server()
    yield SimpleNamespace(port=port, proxy=Proxy(port))
    process.kill()
    process.wait()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Forty small pictures in two classes."
    folder = tmp_path_factory.mktemp('pictures')/'photos'
    for i in range(40):
        place = folder/('odd' if i % 2 else 'even')
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place/f'{i:03}.png')
    return folder


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    "A new bucket behind the proxy, and how to look into it."
    for name, value in (('AWS_ENDPOINT_URL', f'http://127.0.0.1:{server.proxy.server_port}'), ('FSSPEC_S3', ASKS_TWICE),
                        ('AWS_ACCESS_KEY_ID', 'nobody'), ('AWS_SECRET_ACCESS_KEY', 'nothing'),
                        ('AWS_DEFAULT_REGION', 'us-east-1'), ('MAE_NB_DOWNLOADS', str(tmp_path/'downloads'))):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, 's3', json.loads(ASKS_TWICE))   # which reads the environment once
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    monkeypatch.setattr(fsspec.get_filesystem_class('s3'), 'retries', 2)   # of five
    server.proxy.clear()
    fs, bucket = fsspec.filesystem('s3'), f'b{time.monotonic_ns()}'
    fs.mkdir(bucket)
    yield SimpleNamespace(fs=fs, proxy=server.proxy, uri=f's3://{bucket}/x', path=f'{bucket}/x',
                          cache=tmp_path/'downloads')
    server.proxy.released.set()


def packed_bytes(store):
    store.fs.invalidate_cache()
    return {name.rsplit('/', 1)[-1]: store.fs.cat_file(name) for name in store.fs.ls(store.path, detail=False)}


def folder_bytes(folder): return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.fixture
def packed(store, pictures, tmp_path):
    "The pictures packed to the store and to a folder, each in five shards."
    index = pack_source(pictures, tmp_path/'packed', per_shard=8, num_workers=0)
    store.fs.put(str(tmp_path/'packed'), f's3://{store.path}', recursive=True)
    store.proxy.clear()
    return index

# ---- packing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [pytest.param(0, marks=slow), 2])
def test_packing_to_a_store_is_packing_to_a_folder(store, pictures, forked, tmp_path, workers):
    words = 'mae-pack', pictures, store.uri, '--per-shard', 8, '--num-workers', workers
    got = forked(*words)
    assert got.code == 0 and f'packed folder  {store.uri}' in got.out, got
    pack_source(pictures, tmp_path/'packed', per_shard=8, num_workers=0)
    assert packed_bytes(store) == folder_bytes(tmp_path/'packed')
    assert not list((store.cache/'sending').iterdir())
    assert forked('mae-pack', store.uri).code == 0   # checked
    store.fs.pipe_file(f'{store.path}/train-00002.arrow', b'other')
    got = forked('mae-pack', store.uri)
    assert got.code == 2 and '1 of 5 shards in s3://' in got.line and 'train-00002.arrow has 5 bytes' in got.line
    assert forked(*words).code == 0   # mended
    assert packed_bytes(store) == folder_bytes(tmp_path/'packed')


def kill_when(pid, result, ready):
    "SIGKILL as soon as something is true."
    end = time.monotonic() + 60
    while not ready() and time.monotonic() < end:
        time.sleep(.005)
    os.kill(pid, signal.SIGKILL)
    assert result().code == -signal.SIGKILL


@slow
def test_a_killed_packing_resumes_to_the_same_bytes(store, pictures, packed, forked, tmp_path):
    "Killed while the third shard is on its way, and while the list is."
    target, words = f'{store.uri}-again', ('--per-shard', 8, '--num-workers', 0)
    for name in ('PUT /{}/train-00002.arrow', 'PUT /{}/mae_pack.json'):
        waiting = name.format(target.removeprefix('s3://'))
        store.proxy.fail(waiting, 'wait')
        pid, result = begin_command(tmp_path, 'mae-pack', pictures, target, *words)
        kill_when(pid, result, lambda: store.proxy.count('wait'))
        store.proxy.clear()
        store.proxy.released.set()
    got = forked('mae-pack', pictures, target, *words)
    assert got.code == 0, got
    sent = [request for request, _ in store.proxy.requests if request.startswith('PUT') and '.arrow' in request]
    assert len(sent) == 3, sent   # two were on the list
    whole = packed_bytes(store)
    store.path += '-again'
    assert packed_bytes(store) == whole


def test_a_killed_first_moment_of_packing_is_no_obstacle(pictures, tmp_path):
    (tmp_path/'packed').mkdir()
    (tmp_path/'packed'/'mae_pack.json.part').write_text('{"plan": ')
    assert pack_source(pictures, tmp_path/'packed', num_workers=0)['complete']

# ---- training ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def whole_run(pictures, tmp_path_factory):
    "The run from the folder, which nobody disturbs."
    place = tmp_path_factory.mktemp('whole')
    pack_source(pictures, place/'x', per_shard=8, num_workers=0)
    got = begin_command(place, 'mae-pretrain', 'x', *TRAIN, '--num-workers', '0', '--out', 'run')[1]()
    assert got.code == 0, got
    return place/'run'


def weights(run): return (run/'model.safetensors').read_bytes(), (run/'metrics.csv').read_bytes()


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=slow)])
def test_a_run_from_a_store_that_fails_now_and_then_is_the_same_to_the_byte(store, packed, whole_run, forked, tmp_path,
                                                                            workers):
    for fault in (500, 503, 'cut'):
        store.proxy.fail(f'GET /{store.path}/train', fault, 1)
    got = forked('mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run')
    assert got.code == 0, got
    assert [store.proxy.count(fault) for fault in (500, 503, 'cut')] == [1, 1, 1]
    assert weights(tmp_path/'run') == weights(whole_run)


@slow
@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_run_from_a_store_resumes_to_the_same_bytes(store, packed, whole_run, forked, tmp_path, workers):
    "Killed in the middle of a shard's download."
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', 'wait')
    words = 'mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run', '--resume', 'auto'
    pid, result = begin_command(tmp_path, *words)
    kill_when(pid, result, lambda: store.proxy.count('wait'))
    store.proxy.clear()
    store.proxy.released.set()
    got = forked(*words)
    assert got.code == 0, got
    assert weights(tmp_path/'run') == weights(whole_run)
    assert not [f for f in store.cache.rglob('*.part')]


@pytest.mark.parametrize('workers, fault, words', [
    *(pytest.param(n, 500, 'InternalError', marks=slow) for n in (0, 2)),
    pytest.param(2, 403, 'may not be used: ', marks=slow), pytest.param(0, 'cut', 'Not enough data', marks=slow),
    (2, 'half', 'Read timeout'), pytest.param(2, 'silent', 'Read timeout', marks=slow),
    *(pytest.param(n, 'half', 'Read timeout', marks=slow) for n in (0, 1))])
def test_a_store_that_goes_on_failing_ends_the_run_with_its_address(store, packed, forked, tmp_path, workers, fault,
                                                                    words):
    """In one line, and no other picture takes the place of one that did not come.

    A batch has several pictures of the shard, and is not read on when the first of them has failed: a stall would be
    waited for as often."""
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', fault)
    got = forked('mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run')
    assert got.code == 1 and f'{store.uri}/train-00003.arrow' in got.line and words in got.line, got
    assert 'another image replaces it' not in got.out, got
    tries = dict(half=2, cut=2).get(fault, 1 if fault == 403 else 4)   # of one process: s3fs's twice botocore's
    assert 1 <= store.proxy.count(fault) <= tries * max(2 * workers, 1)   # two batches of a worker


@slow
@pytest.mark.parametrize('workers', [0, 2])
def test_a_shard_that_is_missing_or_another_one_ends_the_run(store, packed, forked, tmp_path, workers):
    words = 'mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run'
    store.fs.pipe_file(f'{store.path}/train-00003.arrow', b'another')
    for reason in ('is not what was packed: put it there again', 'does not exist: run the same mae-pack again'):
        got = forked(*words)
        assert got.code == 1 and f'{store.uri}/train-00003.arrow {reason}' in got.line, got
        assert 'another image replaces it' not in got.out, got
        store.fs.rm(f'{store.path}/train-00003.arrow')
        shutil.rmtree(tmp_path/'run')


@slow
def test_a_check_of_the_data_ends_with_the_address_too(store, packed, forked):
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', 500)
    got = forked('mae-check', store.uri, '--num-workers', 2)
    assert got.code == 1 and f'{store.uri}/train-00003.arrow: the object store fails' in got.line, got


def test_no_call_takes_longer_than_its_limit(store, packed, tmp_path, monkeypatch):
    "Whatever the libraries' own limits are: bytes that come one by one, and a server that does not read."
    monkeypatch.setitem(fsspec.config.conf, 's3', dict(config_kwargs=dict(read_timeout=600)))
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    monkeypatch.setattr(stores, 'PATIENCE', 3.)
    place, row = Address(store.uri), packed['shards']['train-00003.arrow']
    store.proxy.fail('GET', 'drip')
    with pytest.raises(StoreError, match='train-00003.arrow: the object store fails, .*: not done within 3 s'):
        place.fetch('train-00003.arrow', tmp_path/'cache'/'x', row['sha256'], row['bytes'])
    assert [f.suffix for f in (tmp_path/'cache').iterdir()] in ([], ['.lock'])
    store.proxy.fail('PUT', 'deaf')
    monkeypatch.setattr(stores, 'SLOWEST', 1e9)
    with pytest.raises(StoreError, match='/x/big: the object store fails, .*: not done within 3 s'):
        place.write('big', 'x' * 2**25)   # more than the system keeps for the server


# ---- signals while a worker waits for a file -----------------------------------------------------------------------

def children(pid): return [int(n) for n in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def is_alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_until(ready):
    end = time.monotonic() + 120
    while not ready() and time.monotonic() < end:
        time.sleep(.01)
    assert ready()


@slow
@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='needs /proc')
@pytest.mark.parametrize('signum, workers', [('SIGTERM', 0), ('SIGTERM', 1), ('SIGTERM', 2), ('SIGINT', 2),
                                             ('SIGKILL', 2)])
def test_workers_that_wait_for_a_file_end_with_the_run(store, packed, tmp_path, monkeypatch, signum, workers):
    "PyTorch would wait for each of them, here for ten minutes."
    import torch.utils.data._utils
    monkeypatch.setitem(fsspec.config.conf, 's3', dict(config_kwargs=dict(read_timeout=600)))
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 600)
    monkeypatch.setattr(Monitor, 'end_after', 1.)
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', 'half')
    pid, result = begin_command(tmp_path, 'mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run')
    wait_until(lambda: store.proxy.count('half'))
    known = children(pid)
    assert len(known) == workers
    start = time.monotonic()
    os.kill(pid, signal.Signals[signum])
    code = result().code
    wait_until(lambda: not any(map(is_alive, known)))
    print(f'{signum} with {workers} workers: all gone after {time.monotonic() - start:.1f} s')
    assert code == dict(SIGTERM=143, SIGINT=130, SIGKILL=-9)[signum]


# ---- one by one ----------------------------------------------------------------------------------------------------

def test_each_fault_is_asked_again(store, packed, tmp_path):
    names = [f for f in packed['shards']]
    for number, fault in enumerate((500, 503, 'cut', 'silent', 'half')):
        store.proxy.fail('GET', fault, 1)
        row = packed['shards'][names[number]]
        file = Address(store.uri).fetch(names[number], tmp_path/'cache'/names[number], row['sha256'])
        assert file.stat().st_size == row['bytes'] and store.proxy.count(fault) == 1
        store.proxy.released.set()


@pytest.mark.parametrize('fault, words', [(500, 'InternalError'), (503, 'SlowDown'),
                                          pytest.param('cut', 'Not enough data', marks=slow),
                                          pytest.param('half', 'Read timeout', marks=slow)])
def test_a_store_that_goes_on_failing_is_named(store, packed, tmp_path, fault, words):
    store.proxy.fail('GET', fault)
    with pytest.raises(StoreError, match=f'train-00000.arrow: the object store fails, .*: .*{words}'):
        Address(store.uri).fetch('train-00000.arrow', tmp_path/'cache'/'x', '')
    assert store.proxy.count(fault) >= 2


def test_sending_is_asked_again_and_then_named(store, pictures):
    for fault in (500, 503):
        store.proxy.fail('PUT', fault, 1)
    assert pack_source(pictures, store.uri, per_shard=20, num_workers=0)['complete']
    store.proxy.fail('PUT', 500)
    with pytest.raises(StoreError, match='mae_pack.json: the object store fails, also when asked .*InternalError'):
        pack_source(pictures, f'{store.uri}2', num_workers=0)


@slow
def test_what_may_not_be_read_or_does_not_exist_is_one_line(store, packed, forked):
    store.proxy.fail('GET', 403)
    got = forked('mae-pretrain', store.uri, *TRAIN)
    assert got.code == 2 and 'may not be used' in got.line and 'AccessDenied' in got.line, got
    store.proxy.clear()
    got = forked('mae-pretrain', f'{store.uri}/no', *TRAIN)
    assert got.code == 2 and '/x/no is no packed folder: it has no mae_pack.json' in got.line, got
    got = forked('mae-pack', store.uri.replace('/x', '-none/x'))
    assert got.code == 2 and 'is no packed folder' in got.line, got


@slow
def test_a_bucket_that_does_not_exist_is_one_line(store, pictures, forked):
    got = forked('mae-pack', pictures, store.uri.replace('/x', '-none/x'), '--num-workers', 0)
    assert got.code == 2 and 'cannot be written: The specified bucket does not exist' in got.line, got

# ---- the cache -----------------------------------------------------------------------------------------------------

@slow
def test_a_full_disk_under_the_cache_is_one_line(store, packed, tmp_path):
    "Files may not grow beyond 4 kB; with room again the cache works."
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    words = 'mae-pretrain', store.uri, *TRAIN, '--num-workers', 0, '--out', 'run'
    _, result = begin_command(tmp_path, *words, before=limit)
    got = result()
    assert got.code == 1 and 'cannot be copied to' in got.line and 'no space left on the disk' in got.line, got
    assert 'MAE_NB_DOWNLOADS' in got.line and not list(store.cache.rglob('*.part'))
    assert open_pack(store.uri)['train'].items[0][1:4] == b'PNG'


@slow
def test_two_killed_downloads_leave_a_cache_that_works(store, packed, tmp_path):
    "SIGKILL in the middle of a body: the part is written anew, and the lock of the dead holds nobody up."
    place, name = tmp_path/'cache', 'train-00001.arrow'
    row = packed['shards'][name]

    def cut():
        def get_file(self, path, part, **_):
            with open(part, 'wb') as f:
                f.write(b'half of it')
            os.kill(os.getpid(), signal.SIGKILL)

        fsspec.get_filesystem_class('s3').get_file = get_file
        Address(store.uri).fetch(name, place/name, row['sha256'])

    for _ in range(2):
        assert exit_code(fork(cut, tmp_path/'log')) == -signal.SIGKILL, (tmp_path/'log').read_text()
        assert not (place/name).exists() and (place/f'{name}.part').exists()
    assert Address(store.uri).fetch(name, place/name, row['sha256']).stat().st_size == row['bytes']
    assert not list(place.glob('*.part'))

# ---- with the libraries' own settings -------------------------------------------------------------------------------

@slow
@pytest.mark.parametrize('fault, tries', [(500, 5), (503, 25), ('cut', 5)])
def test_how_often_the_libraries_ask(store, packed, tmp_path, monkeypatch, fault, tries):
    monkeypatch.setitem(fsspec.config.conf, 's3', {})
    monkeypatch.setattr(fsspec.get_filesystem_class('s3'), 'retries', 5)
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    store.proxy.fail('GET', fault)
    with pytest.raises(StoreError, match='the object store fails'):
        Address(store.uri).fetch('train-00000.arrow', tmp_path/'cache'/'x', '')
    assert store.proxy.count(fault) == tries

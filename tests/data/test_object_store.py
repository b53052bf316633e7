"""Packing to an object store and training from it: killed, refused, cut and slow connections, a full disk.

The store is moto's server, which speaks S3, on this machine; the addresses are `s3://...`, read through s3fs.
`pytest -m slow tests/data/test_object_store.py` also counts how often the libraries ask again with their own settings.
"""
import json
import os
import signal
import time
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from PIL import Image
from stores import Proxy, start_server
from support import begin_command, exit_code, fork

from mae_nb.base.stores import Address, StoreError
from mae_nb.data.packing import pack_source
from mae_nb.data.shards import open_pack

for name in ('s3fs', 'moto', 'flask', 'pyarrow'):
    pytest.importorskip(name, reason='needs pip install s3fs "moto[server,s3]"')

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
def test_a_killed_run_from_a_store_resumes_to_the_same_bytes(store, packed, whole_run, forked, tmp_path, workers):
    "Killed in the middle of a shard's download; then the store fails now and then."
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', 'wait')
    words = 'mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run', '--resume', 'auto'
    pid, result = begin_command(tmp_path, *words)
    kill_when(pid, result, lambda: store.proxy.count('wait'))
    store.proxy.clear()
    store.proxy.released.set()
    for fault in (500, 503, 'cut'):
        store.proxy.fail('GET', fault, 1)
    got = forked(*words)
    assert got.code == 0, got
    assert [store.proxy.count(fault) for fault in (500, 503, 'cut')] == [1, 1, 1]
    assert weights(tmp_path/'run') == weights(whole_run)
    assert not [f for f in store.cache.rglob('*.part')]


@pytest.mark.parametrize('workers, fault, words', [
    pytest.param(0, 500, 'InternalError', marks=slow), (2, 500, 'InternalError'),
    pytest.param(0, 'cut', 'Not enough data', marks=slow)])
def test_a_store_that_goes_on_failing_ends_the_run_with_its_address(store, packed, forked, tmp_path, workers, fault,
                                                                    words):
    "In one line, and no other picture takes the place of one that did not come."
    store.proxy.fail('GET /' + store.path + '/train-00003.arrow', fault)
    got = forked('mae-pretrain', store.uri, *TRAIN, '--num-workers', workers, '--out', 'run')
    assert got.code == 1 and f'{store.uri}/train-00003.arrow: the object store fails, also when' in got.line, got
    assert words.lower() in got.line.lower() and 'another image replaces it' not in got.out, got
    assert 2 <= store.proxy.count(fault) <= 30


def test_each_fault_is_asked_again(store, packed, tmp_path):
    names = [f for f in packed['shards']]
    for number, fault in enumerate((500, 503, 'cut', 'silent', 'half')):
        store.proxy.fail('GET', fault, 1)
        row = packed['shards'][names[number]]
        file = Address(store.uri).fetch(names[number], tmp_path/'cache'/names[number], row['sha256'])
        assert file.stat().st_size == row['bytes'] and store.proxy.count(fault) == 1
        store.proxy.released.set()


def test_sending_is_asked_again_and_then_named(store, pictures):
    for fault in (500, 503):
        store.proxy.fail('PUT', fault, 1)
    assert pack_source(pictures, store.uri, per_shard=20, num_workers=0)['complete']
    store.proxy.fail('PUT', 500)
    with pytest.raises(StoreError, match='mae_pack.json: the object store fails, also when asked .*InternalError'):
        pack_source(pictures, f'{store.uri}2', num_workers=0)


def test_what_may_not_be_read_or_does_not_exist_is_one_line(store, packed, forked):
    store.proxy.fail('GET', 403)
    got = forked('mae-pretrain', store.uri, *TRAIN)
    assert got.code == 2 and 'may not be used' in got.line and 'AccessDenied' in got.line, got
    store.proxy.clear()
    got = forked('mae-pretrain', f'{store.uri}/no', *TRAIN)
    assert got.code == 2 and '/x/no is no packed folder: it has no mae_pack.json' in got.line, got
    got = forked('mae-pack', store.uri.replace('/x', '-none/x'))
    assert got.code == 2 and 'is no packed folder' in got.line, got


def test_a_bucket_that_does_not_exist_is_one_line(store, pictures, forked):
    got = forked('mae-pack', pictures, store.uri.replace('/x', '-none/x'), '--num-workers', 0)
    assert got.code == 2 and 'cannot be written: The specified bucket does not exist' in got.line, got

# ---- the cache -----------------------------------------------------------------------------------------------------

def test_a_full_disk_under_the_cache_is_one_line(store, packed, tmp_path):
    "Files may not grow beyond 4 kB; with room again the cache works."
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    words = 'mae-pretrain', store.uri, *TRAIN, '--num-workers', 0, '--out', 'run'
    _, result = begin_command(tmp_path, *words, before=limit)
    got = result()
    assert got.code == 1 and 'no space left on the disk while copying s3://' in got.line, got
    assert 'MAE_NB_DOWNLOADS' in got.line and not list(store.cache.rglob('*.part'))
    assert open_pack(store.uri)['train'].items[0][1:4] == b'PNG'


def test_two_killed_downloads_leave_a_cache_that_works(store, packed, tmp_path):
    "SIGKILL in the middle of a body: the part is written anew, and the lock of the dead holds nobody up."
    place, name = tmp_path/'cache', 'train-00001.arrow'
    row = packed['shards'][name]

    def cut():
        def get_file(self, path, part):
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
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    store.proxy.fail('GET', fault)
    with pytest.raises(StoreError, match='the object store fails'):
        Address(store.uri).fetch('train-00000.arrow', tmp_path/'cache'/'x', '')
    assert store.proxy.count(fault) == tries

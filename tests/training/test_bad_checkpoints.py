"""Checkpoints that are not what was written are refused with one kind of error, and nothing in them is run."""
import hashlib
import json
import os
import random

import pytest
import torch
from tiny_runs import numbered

from mae_nb.training.state import BadCheckpoint, newest_checkpoint, read_checkpoint
from mae_nb.weights.reading import checkpoints_in

LENGTHS = 0, 2, 2**20, 2**40, 2**63, 2**64 - 1

def mutated(content, other, draw):
    "A file's bytes with flipped bits, cut, grown, or with another file's header."
    content = bytearray(content)
    kind = draw.choice(('flip', 'cut', 'grow', 'header', 'length'))
    if kind == 'flip':
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 'cut':
        del content[draw.randrange(len(content)):]
    elif kind == 'grow':
        place = draw.randrange(len(content) + 1)
        content[place:place] = draw.randbytes(draw.randint(1, 3000))
    elif kind == 'header':
        n = 8 + int.from_bytes(other[:8], 'little')
        content[:n] = other[:n]
    else:
        content[:8] = draw.choice(LENGTHS).to_bytes(8, 'little')
    return bytes(content)

def named_by_hash(folder, content):
    "A file whose name fits its bytes."
    file = folder/f'step-000000002-{hashlib.sha256(content).hexdigest()[:16]}.safetensors'
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file

def check_harmless(file):
    "A file with a fitting name either is refused, or holds tensors and plain data."
    try:
        tensors, config = read_checkpoint(file)
    except BadCheckpoint:
        return
    assert isinstance(config, dict) and all(isinstance(v, torch.Tensor) for v in tensors.values())

@pytest.mark.parametrize('count', [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_checkpoints(count, tmp_path, capsys):
    numbered(tmp_path, 1, 2)
    second, first = checkpoints_in(tmp_path)
    good, other, draw = second.read_bytes(), first.read_bytes(), random.Random(0)
    for i in range(count):
        bad = good
        while bad == good:
            bad = mutated(good, other, draw)
        second.write_bytes(bad)
        with pytest.raises(BadCheckpoint, match=second.name):
            read_checkpoint(second)
        assert newest_checkpoint(tmp_path)[0] == first and second.name in capsys.readouterr().out, i
        file = named_by_hash(tmp_path/'named', bad)
        check_harmless(file)
        file.unlink()

def test_names_that_do_not_fit(tmp_path, capsys):
    numbered(tmp_path, 1, 2)
    second, first = checkpoints_in(tmp_path)
    for name in ('step-000000003-0123456789abcdef', 'step-000000003-' + first.stem[-16:]):
        renamed = second.with_name(f'{name}.safetensors')
        renamed.write_bytes(second.read_bytes())
        assert newest_checkpoint(tmp_path)[0] == second and name in capsys.readouterr().out
        renamed.unlink()
    for file in (first, second):
        file.write_bytes(b'')
    with pytest.raises(BadCheckpoint, match='none of its 2 checkpoints is whole'):
        newest_checkpoint(tmp_path)

# ---- files from someone else ---------------------------------------------------------------------------------------

def header(text, body=b''): return len(text).to_bytes(8, 'little') + text + body
def config(text): return header(json.dumps({'__metadata__': {'config': text}}).encode())

@pytest.fixture
def offer(tmp_path):
    "Read bytes as a checkpoint whose name fits them: they must be refused."
    def refused(content):
        file = named_by_hash(tmp_path, content)
        with pytest.raises(BadCheckpoint):
            read_checkpoint(file)
        file.unlink()
    return refused

@pytest.mark.parametrize('text', ['[' * 100_000, '{"a":' * 50_000, '3', '[]', 'null', '"x"'], ids=lambda x: x[:6])
def test_a_config_that_is_no_table(text, offer): offer(config(text))

class Boom:
    "A pickle of it would end the process."
    def __reduce__(self): return os._exit, (9,)

def test_checkpoints_from_someone_else(offer, tmp_path):
    "Pickles, folders, absurd shapes and configs under a name that fits: one kind of error, and nothing is run."
    torch.save(Boom(), tmp_path/'pickle')
    offer((tmp_path/'pickle').read_bytes())
    for text in ('', 'nonsense', '\ud800'):
        offer(config(text))
    offer(header(b'{"w":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,64000000000000000000]}}'))
    offer(header(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]},'
                 b'"__metadata__":{"config":"{}"}}'))
    for content in (header(b'{}'), header(b'[]'), header(b'{"__metadata__":{"x":"1"}}'), b''):
        offer(content)

def test_folders_and_links_are_no_checkpoints(tmp_path):
    place = tmp_path/'step-000000001-0123456789abcdef.safetensors'
    place.mkdir()
    with pytest.raises(BadCheckpoint):
        read_checkpoint(place)
    place.rmdir()
    place.symlink_to(place)
    with pytest.raises(BadCheckpoint):
        read_checkpoint(place)

"""Weights that do not fit: one clear line, and a model as it was; and published files that arrive over a bad line."""
import argparse
import http.server
import pickle
import threading
import zipfile
from contextlib import contextmanager

import pytest
import timm
import torch
from foreign_models import (
    OfficialShape,
    official_file,
    relative,
    same,
    shaken,
    small_classifier,
    small_mae,
    snapshot,
    timm_vit,
)
from safetensors.torch import save_file
from transformers import ViTForImageClassification

from mae_nb.base.errors import UsageError
from mae_nb.base.files import md5
from mae_nb.model.mae import create_mae
from mae_nb.weights.building import load_mae
from mae_nb.weights.convert import save_hf, save_official
from mae_nb.weights.layouts import from_official, to_hf, to_official
from mae_nb.weights.loading import fill, load_timm, load_weights, save_model
from mae_nb.weights.published import CHECKPOINTS, Checkpoint
from mae_nb.weights.reading import open_weights

# files

class Trap:
    "Unpickling this runs code."
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return exec, (f'open({self.file!r}, "w").close()',)

def damaged_files(folder, state):
    "Name -> what the error says, of files that were cut, changed or are no weights."
    good = official_file(folder/'good.pth', state).read_bytes()
    save_file(state, folder/'good.safetensors')
    good_tensors = (folder/'good.safetensors').read_bytes()
    bit = bytearray(good)
    bit[len(bit) // 2] ^= 1
    contents = {
        'cut.pth': (good[:20_000], 'cannot be read'),
        'short.safetensors': (good_tensors[:-100], 'cannot be read'),
        'header.safetensors': (good_tensors[:10] + bytes(50) + good_tensors[60:], 'cannot be read'),
        'damaged.pth': (bytes(200) + good[200:], 'cannot be read'),
        'bit.pth': (bytes(bit), 'the checksum of .* is wrong'),
        'text.pth': (b'<html>404 Not Found</html>', 'cannot be read'),
    }
    for name, (data, _) in contents.items():
        (folder/name).write_bytes(data)
    with zipfile.ZipFile(folder/'archive.pth', 'w') as archive:
        archive.writestr('data', 'nothing')
    return {name: words for name, (_, words) in contents.items()} | {'archive.pth': 'cannot be read'}

def traps(folder, state):
    "Name -> what the error says, of pickles that run code."
    torch.save(dict(model=state, args=argparse.Namespace(model=Trap(folder/'ran'))), folder/'trap.pth')
    (folder/'old_trap.pth').write_bytes(pickle.dumps(dict(model=Trap(folder/'ran')), protocol=2))
    return dict.fromkeys(['trap.pth', 'old_trap.pth'], 'is not opened: it wants to call .*exec')

def other_models(folder, state):
    "Name -> what the error says, of weights that are whole and of another model."
    contents = {
        'narrow.pth': (dict(model=OfficialShape(dim=64).state_dict()), 'create the model with the size'),
        'deep.pth': (dict(model=OfficialShape(depth=5).state_dict()), 'blocks: 5 in the weights and 3 in the model'),
        'patch.pth': (OfficialShape(chans=4, patch=8).state_dict(), 'has shape'),
        'resnet.pth': (timm.create_model('resnet18').state_dict(), 'none of the .* tensors has a name'),
        'words.pth': (state | {'blocks.0.attn.qkv.weight': 'text'}, 'holds no state dict'),
        'integers.pth': (state | {'blocks.0.norm1.weight': torch.zeros(96, dtype=torch.long)}, 'is not a tensor'),
    }
    for name, (content, _) in contents.items():
        torch.save(content, folder/name)
    return {name: words for name, (_, words) in contents.items()}

MODELS = [small_mae, lambda: small_mae().encoder, small_classifier]

@pytest.mark.parametrize('make', MODELS, ids=['mae', 'encoder', 'classifier'])
def test_wrong_weights_change_nothing(make, official_state, tmp_path):
    "One line that names the file, and every tensor as it was."
    (tmp_path/'empty').mkdir()
    model = make()
    before, trainable = snapshot(model), {k: p.requires_grad for k, p in model.named_parameters()}
    absent = {'gone.pth': 'no such weights file', 'empty': 'holds no model.safetensors'}
    wrong = [f(tmp_path, official_state) for f in (damaged_files, traps, other_models)]
    for name, words in (wrong[0] | wrong[1] | wrong[2] | absent).items():
        with pytest.raises(UsageError, match=words) as e:
            load_weights(model, tmp_path/name)
        assert isinstance(e.value, FileNotFoundError) == (name in absent)
        assert str(tmp_path/name) in str(e.value) and len(str(e.value).splitlines()) == 1, name
        assert same(before, model.state_dict()) and not hasattr(model, 'not_loaded'), name
    assert trainable == {k: p.requires_grad for k, p in model.named_parameters()}
    assert not (tmp_path/'ran').exists()
    pickle.loads((tmp_path/'old_trap.pth').read_bytes())
    assert (tmp_path/'ran').exists()       # the trap was a real one

# models

def test_another_target_is_refused(official_state, tmp_path):
    "A file that states its target goes into no model of another target, but its encoder goes anywhere."
    save_model(small_mae(target='pixels'), tmp_path/'ours.safetensors')
    save_hf(small_mae(target='pixels'), tmp_path/'hf')
    official_file(tmp_path/'official.pth', official_state, norm_pix_loss=False)
    torch.save(dict(model=official_state), tmp_path/'mae_visualize_vit_base.pth')                # a published name
    model = small_mae()
    before = snapshot(model)
    for file in ('ours.safetensors', 'hf', 'official.pth', 'mae_visualize_vit_base.pth'):
        with pytest.raises(UsageError, match=r'(attention heads|predict pixels and the model norm_pixels)') as e:
            load_weights(model, tmp_path/file)
        assert len(str(e.value).splitlines()) == 1
        assert same(before, model.state_dict())
    load_weights(small_mae(target='pixels').encoder, tmp_path/'hf')

@pytest.mark.parametrize('pool, other', [('avg', 'cls'), ('cls', 'avg')])
def test_a_head_behind_another_pooling_is_refused(pool, other):
    theirs = timm_vit(num_classes=10, pool='avg' if pool == 'avg' else 'token')
    model = small_classifier(pool=other)
    before = snapshot(model)
    with pytest.raises(UsageError, match=f"with another pooling, .* create it with pool='{pool}'"):
        load_timm(model, theirs.state_dict())
    assert same(before, model.state_dict())
    assert load_timm(model, theirs.state_dict(), skip='head.').missing[-2:] == ['head.weight', 'head.bias']

def test_other_heads_are_refused(tmp_path):
    "The same shapes mean another model with another number of heads."
    save_hf(small_mae(), tmp_path/'hf')
    save_model(small_mae(), tmp_path/'ours.safetensors')
    for file in ('hf', 'ours.safetensors'):
        with pytest.raises(UsageError, match='3 attention heads and the model has 6'):
            load_weights(small_mae(num_heads=6), tmp_path/file)
        with pytest.raises(UsageError, match='4 attention heads in the decoder and the model has 8'):
            load_weights(small_mae(decoder_heads=8), tmp_path/file)

def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model, file = small_mae(), tmp_path/'x.pth'
    save_official(model, file)
    first = file.read_bytes()
    def full(*args, **kwargs):
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space'):
        save_official(model, file)
    assert file.read_bytes() == first and [f.name for f in tmp_path.iterdir()] == ['x.pth']

def test_what_other_libraries_have_no_place_for(tmp_path):
    state = small_mae().state_dict()
    for extra in ('encoder.mask_token', 'target.basis', 'decoder.blocks.0.cross.kv.weight'):
        for translate in (to_official, to_hf):
            with pytest.raises(UsageError, match=f'{extra} has no place'):
                translate(state | {extra: torch.zeros(1)})
    with pytest.raises(UsageError, match='knows square images only'):
        save_hf(small_mae(img_size=(224, 448)), tmp_path/'hf')
    with pytest.raises(UsageError, match='has no average pooling'):
        to_hf({k if 'head' in k or 'fc_norm' in k else f'encoder.{k}': v
               for k, v in small_classifier(pool='avg').state_dict().items()})
    clf = shaken(small_classifier(pool='cls', img_size=(224, 448)))               # these transformers' ViT knows
    save_hf(clf, tmp_path/'hf')
    imgs = torch.randn(1, 3, 224, 448)
    theirs = ViTForImageClassification.from_pretrained(tmp_path/'hf').eval()
    with torch.no_grad():
        assert relative(theirs(imgs).logits, clf(imgs)) < 1e-5

def test_from_official_leaves_the_model_alone_on_partial_fill(official_state):
    "An encoder that loads without its decoder: the decoder stays as it was, and is named."
    model = small_mae()
    before = snapshot(model)
    encoder = {k: v for k, v in from_official(official_state).items() if k.startswith('encoder.')}
    report = fill(model, encoder)
    assert report.missing == model.not_loaded
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in report.missing)

# the registry

@contextmanager
def half_line(data):
    "A server that sends at most half of the file and hangs up: its address, and from where it was asked to send."
    starts = []
    class Line(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:start + len(data) // 2 + 1])
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Line)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/x.pth', starts
    finally:
        server.shutdown()
        server.server_close()

def test_a_published_checkpoint_in_one_line(tmp_path, monkeypatch):
    "load_mae(name): fetched over a line that breaks, checked, and the target known from the name."
    nano = create_mae('mae_vit_nano_patch4_28', target='pixels')
    torch.save(dict(model=to_official(nano.state_dict())), tmp_path/'x.pth')
    data, good = (tmp_path/'x.pth').read_bytes(), md5(tmp_path/'x.pth')[:6]
    monkeypatch.setenv('MAE_NB_WEIGHTS', str(tmp_path/'weights'))
    with half_line(data) as (url, starts):
        for known in ('ffffff' if good != 'ffffff' else '000000', good):
            entry = Checkpoint(url, 'official', 'mae', 'mae_vit_nano_patch4_28', 'pixels', 'none', known, 'here',
                               'mae_small.pth')
            monkeypatch.setitem(CHECKPOINTS, 'mae_small', entry)
            if known != good:
                with pytest.raises(ValueError, match='is not the file of mae_small: its MD5 begins'):
                    load_mae('mae_small')
                assert list((tmp_path/'weights').iterdir()) == []   # a wrong file is not kept
        model = load_mae('mae_small', img_size=28)
    assert model.config['target'] == 'pixels' and same(model.state_dict(), nano.state_dict())
    assert starts == [0, len(data) // 2 + 1] * 2
    assert same(load_mae('mae_small', img_size=28).state_dict(), nano.state_dict())     # from disk, with no server
    assert open_weights('mae_small').options == dict(name='mae_vit_nano_patch4_28', target='pixels')

def test_registry_says_what_is_not_known():
    hashes = {c.md5 for k, c in CHECKPOINTS.items() if '_full' in k or 'visualize' in k or '/' in k}
    assert hashes == {None}
    licences = [c.licence for k, c in CHECKPOINTS.items() if k.startswith('facebook/')]
    assert all('Apache 2.0' in x and 'CC BY-NC 4.0' in x for x in licences)
    for name, checkpoint in CHECKPOINTS.items():
        if 'visualize' in name or 'facebook/' in name:
            assert checkpoint.target == 'pixels'
        else:
            assert checkpoint.target == (None if 'finetuned' in name else 'norm_pixels')

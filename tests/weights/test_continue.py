"""Training that begins with weights: what was loaded, and what became of a head, is said in plain lines."""
import shutil

import torch

from mae_nb.model.classifier import create_classifier
from mae_nb.weights.building import load_classifier, load_mae
from mae_nb.weights.loading import save_model

SHORT = '--max-steps', '1', '--bs', '20', '--num-workers', '0', '--set', 'amp=False'
STILL = '--set', 'base_lr=1e-12'   # a step that moves weights by less than 1e-9
MODEL = 'mae_vit_nano_patch4_32'
DATA = dict(name='photos', mean=[.5] * 3, std=[.3] * 3)

def near(a, b): return torch.allclose(a, b, rtol=0, atol=1e-9)

def test_pretraining_begins_with_weights_and_resumes_without_them(forked, tmp_path, photos):
    first = forked('mae-pretrain', 'photos', '--model', MODEL, *SHORT, '--out', 'first')
    assert first.code == 0, first.err
    again = forked('mae-pretrain', 'photos', '--init', 'first', *SHORT, *STILL, '--seed', '1', '--out', 'again')
    assert again.code == 0 and 'tensors loaded' in again.out, again
    before, after = (load_mae(tmp_path/name).state_dict() for name in ('first', 'again'))
    assert all(near(before[k], after[k]) for k in before)
    shutil.rmtree(tmp_path/'first')
    resumed = forked('mae-pretrain', '--resume', 'again')
    assert resumed.code == 0, resumed.err
    other = forked('mae-pretrain', 'photos', '--init', 'again', '--model', 'mae_vit_nano_patch4_28', *SHORT)
    assert other.code == 2 and 'again is of mae_vit_nano_patch4_32 and not of' in other.line
    gone = forked('mae-pretrain', 'photos', '--init', 'first', *SHORT)
    assert gone.code == 2 and 'no such weights file' in gone.line

def test_a_head_is_kept_where_the_classes_are_the_same(forked, tmp_path, photos):
    trained = create_classifier(MODEL, 2)
    torch.nn.init.normal_(trained.head.weight)
    for classes, words in ((['even', 'odd'], 'is kept: the 2 classes are the same'),
                           (['odd', 'even'], 'is dropped, and a new one is trained: its classes are others')):
        save_model(trained, tmp_path/'trained.safetensors', DATA | dict(classes=classes))
        run = forked('mae-finetune', 'photos', 'trained.safetensors', *SHORT, *STILL, '--out', words[3:7])
        assert run.code == 0 and words in run.out, run
        head = load_classifier(tmp_path/words[3:7]).head.weight
        assert near(head, trained.head.weight) == ('kept' in words)

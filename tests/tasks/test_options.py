"""Options of a run: resumed from its folder, also where an earlier version wrote it."""
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from fastcore.docments import docments

from mae_nb import commands
from mae_nb.tasks.finetune import FinetuneOptions
from mae_nb.tasks.pretrain import PretrainOptions, pretrain_setup
from mae_nb.tasks.probes import ProbeOptions
from mae_nb.tasks.replay import replay
from mae_nb.training.runs import RunOptions, begun_options, make_run, read_options
from mae_nb.weights.building import load_mae

EARLIER = Path(__file__).parent/'earlier_run'   # the config.json of a run that version 0.0.1 made before RunOptions

def as_before(run):
    "Rewrite a run's config as earlier versions wrote it: the command and its flags, and no options."
    config = json.loads((run/'config.json').read_text())
    flags = config.pop('options')
    config['command'] = dict(name='mae_pretrain', flags={k: v for k, v in flags.items() if k != 'json'})
    (run/'config.json').write_text(json.dumps(config))

class Cut(Callback):
    "Ends the process's training in the n-th batch."
    order = 90
    def __init__(self, n, error=KeyboardInterrupt):
        self.n, self.error = n, error

    def before_batch(self):
        if self.training and self.train_iter == self.n:
            raise self.error

class Break(Callback):
    "Makes one weight infinite."
    def before_fit(self):
        self.model.encoder.blocks[1].mlp.fc2.weight.data[0, 0] = float('inf')

def test_an_earlier_run_s_options():
    expected = RunOptions('fashion', set=['mask_ratio=0.6'], max_steps=20, bs=64, seed=4, num_workers=0)
    assert begun_options(EARLIER, RunOptions) == expected
    assert read_options(EARLIER)[0] == 'mae-pretrain'

def test_an_earlier_run_is_resumed(forked, tmp_path, photos):
    "Cut off in its third step, with a config as earlier versions wrote it: the same weights in the end."
    options = RunOptions(str(photos), model='mae_vit_nano_patch4_32', set=['amp=False', 'warmup_epochs=0'], bs=20,
                         max_steps=6, save_every=2, num_workers=0)
    straight, cut = replace(options, out=str(tmp_path/'straight')), replace(options, out=str(tmp_path/'cut'))
    pretrain_setup(straight).fit_recipe()
    learn = pretrain_setup(cut)
    learn.add_cb(Cut(3))
    with pytest.raises(KeyboardInterrupt):
        learn.fit_recipe()
    as_before(tmp_path/'cut')
    got = forked('mae-pretrain', '--resume', 'cut')
    assert got.code == 0 and 'resumes at epoch 0, batch 2' in got.out, got
    whole, resumed = ((tmp_path/run/'model.safetensors').read_bytes() for run in ('straight', 'cut'))
    assert whole == resumed
    assert load_mae(tmp_path/'cut').mask_ratio == .75

def test_an_earlier_run_s_bad_step_is_replayed(tmp_path, photos):
    options = RunOptions(str(photos), model='mae_vit_nano_patch4_32', set=['amp=False', 'warmup_epochs=0'], bs=10,
                         epochs=1, out=str(tmp_path/'sick'), num_workers=0)
    learn = pretrain_setup(options)
    learn.add_cb(Break())
    with pytest.raises(FloatingPointError):
        learn.fit_recipe()
    as_before(tmp_path/'sick')
    found = replay(next((tmp_path/'sick'/'bad_steps').iterdir()))
    assert found['first_bad_module'] == 'encoder.blocks.1.mlp.fc2'

def test_a_run_s_config_holds_its_options(tmp_path):
    "Defaults, tuples and paths come back as they were."
    options = FinetuneOptions('fashion', weights=str(tmp_path), set=('amp=False', 'clip=1.'), bs=32)
    run = make_run(tmp_path/'run', dict(task='finetune', options=options.as_config()))
    assert begun_options(run, FinetuneOptions) == options

PAIRS = [(PretrainOptions, commands.mae_pretrain), (FinetuneOptions, commands.mae_finetune),
         (ProbeOptions, commands.mae_probe)]

@pytest.mark.parametrize('kind, command', PAIRS)
def test_options_and_flags_agree(kind, command):
    "Every flag but debug is a field with the same default; what a subclass adds has the flag's help."
    helps, flags = docments(kind) | docments(RunOptions), docments(command, full=True)
    known = {f.name: f for f in fields(kind)}
    for name, flag in flags.items():
        if name in ('debug', 'return'):
            continue
        default = () if name in ('set', 'log') else flag.default
        assert name in known and known[name].default == default, name
        if kind is PretrainOptions or name not in {f.name for f in fields(RunOptions)}:
            assert helps[name] == flag.docment, name

"""Training commands in several processes: under torchrun, from a notebook, and through Slurm's queue.

Fast are a pretraining in two forks with torchrun's variables, and one under torchrun that is killed (a whole one:
tutorial 03 in test_kernel). Whatever trains under torchrun: `pytest -m slow tests/training/test_torchrun.py`."""
import os
import signal
import subprocess
import time

import pytest
from ranks import assert_same_metrics, free_port, results, spread, starter
from support import BIN, Said

from mae_nb.training.distributed import PARALLEL, submit

QUICK = '--set', 'amp=False', '--set', 'warmup_epochs=1', '--num-workers', '0', '--epochs', '2', '--bs', '20'
NANO = '--model', 'mae_vit_nano_patch4_32', *QUICK
slow = pytest.mark.slow

@pytest.fixture
def torchrun(tmp_path):
    "Run a command in several processes."
    def run(*words, options=('--nproc-per-node', '2'), **env):
        command = [BIN/'torchrun', *options, '--master-port', str(free_port()), BIN/words[0], *map(str, words[1:])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | env, timeout=120)
        return Said(done.stdout, done.stderr, done.returncode)
    return run

def assert_once(text, *words): assert [text.count(w) for w in words] == [1] * len(words), text

def rows(run): return (run/'metrics.csv').read_text().splitlines() if (run/'metrics.csv').exists() else []

BEGUN = 'pretraining mae_vit_nano', 'train_loss', '(10 a batch x 2 processes x 1 accumulated)'

def check_pretraining(out, err, forked, tmp_path):
    "The first process reports; one run folder, with the metrics of one process."
    assert 'Warning' not in err, err
    assert_once(out, *BEGUN, 'peak memory')
    assert [f.name for f in (tmp_path/'runs').iterdir()] == ['pretrain-1']
    assert len(rows(tmp_path/'runs'/'pretrain-1')) == 3
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'one').code == 0
    assert_same_metrics(tmp_path/'runs'/'pretrain-1', tmp_path/'one')

def test_pretraining_in_two_processes(forked, photos, tmp_path, monkeypatch):
    "As torchrun starts them, but in forks."
    monkeypatch.chdir(tmp_path)
    runs = spread(2, starter('mae-pretrain', 'photos', *NANO), tmp_path/'say')
    results(runs)
    output = ''.join(r.output for r in runs)
    check_pretraining(output, output, forked, tmp_path)

@slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_pretraining_under_torchrun(torchrun, forked, photos, tmp_path, parallel):
    got = torchrun('mae-pretrain', 'photos', *NANO, '--parallel', parallel)
    assert got.code == 0, got.err
    check_pretraining(got.out, got.err, forked, tmp_path)

FILES = {'classes.csv', 'metrics.csv', 'model.safetensors', 'config.json'}

def check_supervised(got, run):
    "A run with labels, in several processes: its files, and each validation image counted once."
    assert got.code == 0 and 'Warning' not in got.err, got.err
    assert_once(got.out, 'train_loss', 'peak memory', 'has no validation set')
    assert FILES <= {f.name for f in run.iterdir()}
    assert sum(int(line.split(',')[1]) for line in (run/'classes.csv').read_text().splitlines()[1:]) == 12

@slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_finetuning_under_torchrun(torchrun, forked, photos, tmp_path, parallel):
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'mae').code == 0
    words = 'mae-finetune', 'photos', 'mae', '--set', 'mixup=0', '--set', 'cutmix=0', *QUICK
    got = torchrun(*words, '--parallel', parallel, '--out', 'finetune')
    check_supervised(got, tmp_path/'finetune')
    assert forked(*words, '--out', 'alone').code == 0
    assert_same_metrics(tmp_path/'finetune', tmp_path/'alone')

@slow
def test_probing_under_torchrun(torchrun, forked, photos, tmp_path):
    "Its batch norm sees its own part of a batch, so its metrics are not those of one process."
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'mae').code == 0
    words = 'mae-probe', 'linear', 'photos', 'mae', *QUICK
    got = torchrun(*words, '--out', 'probe', '--json', 'probe.json')
    check_supervised(got, tmp_path/'probe')
    assert (tmp_path/'probe.json').is_file()
    assert forked(*words, '--out', 'alone').code == 0

@pytest.mark.parametrize('words, message', [
    (('mae-pretrain', 'photos', *NANO, '--bs', '21'), 'batch_size 21 does not divide into 2 parts'),
    (('mae-pretrain', 'photos', *NANO, '--out', 'photos'), 'photos exists already and is not empty'),
    (('mae-finetune', 'photos', 'gone.safetensors', '--epochs', '1'), 'gone.safetensors'),
])
@slow
def test_wrong_arguments_under_torchrun(torchrun, photos, words, message):
    start, got = time.time(), torchrun(*words)
    assert got.code == 1 and message in got.err and time.time() - start < 40, got.err

# ---- killed processes -----------------------------------------------------------------------------------------------

def children(pid):
    "The processes that a process has started."
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
    return [int(p) for p in listed.stdout.split()]

@pytest.fixture
def kill_one(photos, tmp_path):
    """A pretraining in two processes, one of which is killed after an epoch: torchrun's exit code, its output,
    and the seconds it took to end."""
    def run(epochs, *options, **env):
        words = 'photos', *NANO, '--epochs', str(epochs), '--out', 'run', '--resume', 'auto'
        command = [BIN/'torchrun', '--standalone', '--nproc-per-node', '2', *options, BIN/'mae-pretrain', *words]
        log, end = tmp_path/'log', time.time() + 100
        with open(log, 'w') as f:
            agent = subprocess.Popen(command, cwd=tmp_path, stdout=f, stderr=f, env=os.environ | env)
        while len(rows(tmp_path/'run')) < 2:
            assert time.time() < end and agent.poll() is None, log.read_text()
            time.sleep(.1)
        start = time.time()
        os.kill(children(agent.pid)[-1], signal.SIGKILL)
        return agent.wait(120), log.read_text(), time.time() - start
    return run

def test_a_killed_process_ends_torchrun(kill_one):
    code, output, seconds = kill_one(1000)
    assert code == 1 and 'Signal 9 (SIGKILL)' in output and seconds < 30, output
    assert_once(output, *BEGUN)

@slow
def test_torchrun_starts_a_run_again(kill_one, tmp_path):
    # else the new processes find the old ones' addresses
    code, output, _ = kill_one(40, '--max-restarts', '1', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    assert code == 0 and 'resumes at epoch' in output, output
    assert len(rows(tmp_path/'run')) == 41

@slow
@pytest.mark.parametrize('parallel', PARALLEL)
def test_two_machines_train_one_model(forked, photos, tmp_path, parallel):
    "Two torchrun agents that find each other by address alone."
    options = ('--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-id', 'run',
               '--rdzv-endpoint', f'localhost:{free_port()}')
    command = [BIN/'torchrun', *options, BIN/'mae-pretrain', 'photos', *NANO, '--out', 'two', '--parallel', parallel]
    start = lambda: subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    machines = [start(), start()]
    outputs = [m.communicate(timeout=150)[0] for m in machines]
    assert [m.returncode for m in machines] == [0, 0], outputs
    assert_once(''.join(outputs), 'train_loss', '2 processes', 'peak memory')
    assert forked('mae-pretrain', 'photos', *NANO, '--out', 'one').code == 0
    assert_same_metrics(tmp_path/'two', tmp_path/'one')

# ---- from a notebook, and through Slurm's queue ---------------------------------------------------------------------

NOTEBOOK = """
import warnings; warnings.filterwarnings('ignore')
import torch
torch.set_num_threads(2)
from accelerate import notebook_launcher
from mae_nb.base.keyed import seeded
from mae_nb.base.processes import process_group, processes
from mae_nb.data.datasets import fashion
from mae_nb.data.loader import get_dls
from mae_nb.model.mae import create_mae
from mae_nb.tasks.pretrain import pretrain_learner
from mae_nb.training.presets import RECIPES
from mae_nb.training.recipes import mae_options, override
from mae_nb.training.runs import make_run

def train(out):
    with process_group():
        images, test = fashion()
        r = override(RECIPES['pretrain_fashion'], dict(epochs=2, warmup_epochs=1, batch_size=40))
        dls = get_dls((images.take(range(220)), test.take(range(51))), r, img_size=28, device='cpu')
        model = seeded(0, create_mae, 'mae_vit_nano_patch4_28', in_chans=1, **mae_options(r))
        pretrain_learner(dls, model, r, out=make_run(out, dict(processes=processes()))).fit_recipe()

train('one')
notebook_launcher(train, ('two',), num_processes=2, use_port='PORT')
"""

@slow
def test_a_notebook_that_has_trained_starts_two_processes(tmp_path):
    "accelerate's launcher forks a kernel whose threads have worked already."
    pytest.importorskip('accelerate')
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    cell = nbformat.v4.new_code_cell(NOTEBOOK.replace('PORT', str(free_port())))
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=100, kernel_name='python3',
                                     resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute()
    assert '"processes": 2' in (tmp_path/'two'/'config.json').read_text()
    assert_same_metrics(tmp_path/'one', tmp_path/'two')

@slow
def test_a_job_for_slurm(photos, forked, tmp_path, monkeypatch):
    "submitit's local executor: two processes train, are preempted, come back, and go on."
    pytest.importorskip('submitit')
    monkeypatch.chdir(tmp_path)
    words = 'photos', *NANO, '--epochs', '40', '--resume', 'auto', '--out'
    command = [BIN/'mae-pretrain', *words, 'two']
    job = submit(command, tmp_path/'slurm', per_node=2, cluster='local', gpus_per_node=0)
    try:
        preempt(job, tmp_path/'two')
        job.results()
    finally:
        job.cancel()   # of no effect on a job that has ended
    assert 'resumes at epoch' in job.stdout() + job.task(0).stdout(), job.stderr()
    assert forked('mae-pretrain', *words, 'one').code == 0
    assert_same_metrics(tmp_path/'two', tmp_path/'one')

def preempt(job, run):
    "Let a job train three epochs, and signal each of its processes as Slurm does."
    end = time.time() + 120
    while len(rows(run)) < 4:
        assert time.time() < end and job.state == 'RUNNING', job.stderr()
        time.sleep(.1)
    for task in children(job._process.pid):
        for pid in (task, *children(task)):
            os.kill(pid, signal.SIGUSR2)

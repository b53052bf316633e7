"""A run outlives the terminal that it writes to, and an answer its reader."""
import os
import subprocess
import sys

import pytest
from support import ROOT

CODE = '''
import signal, sys, time
from mae_nb.command_line import Signs
signal.signal(signal.SIGHUP, signal.SIG_IGN)   # as nohup does
Signs.quiet = .1
with Signs():
    print('begun', flush=True)
    sys.stdin.readline()                       # the terminal ends
    print('more', flush=True)
    time.sleep(.7)                             # a sign of life has nowhere to go, either
    print('more', file=sys.stderr, flush=True)
    open(sys.argv[1], 'w').write('done')
'''


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='needs a terminal')
def test_a_terminal_that_ends(tmp_path):
    reader, writer = os.openpty()
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    run = subprocess.Popen([sys.executable, '-c', CODE, tmp_path/'note'], stdin=subprocess.PIPE, stdout=writer,
                           stderr=writer, env=env, start_new_session=True)
    os.close(writer)
    assert os.read(reader, 5) == b'begun'
    os.close(reader)
    run.communicate(b'\n', timeout=60)
    assert run.returncode == 0 and (tmp_path/'note').read_text() == 'done'


@pytest.mark.parametrize('question', ['--help', '--version', '--list-recipes'])
def test_an_answer_that_nobody_reads(question):
    "As in `mae-show --help | head -1`: no traceback, whatever is left."
    reader, writer = os.pipe()
    os.close(reader)
    code = 'from mae_nb.commands import mae_show; mae_show()'
    run = subprocess.run([sys.executable, '-c', code, question], stdout=writer, stderr=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, '')

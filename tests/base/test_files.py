"""A file is the old one or the new one, whatever happens while it is written."""
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_nb.base.files import flush_to_disk, md5, sha256, write_atomically

ERRORS = st.sampled_from([KeyboardInterrupt, SystemExit, OSError, RuntimeError])

def contents(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}

@settings(max_examples=50, deadline=None)
@given(st.none() | st.binary(), st.binary(), st.none() | ERRORS, st.integers(0, 9))
def test_a_file_is_the_old_one_or_the_new_one(old, new, error, written):
    with TemporaryDirectory() as folder:
        file = Path(folder)/'weights.bin'
        before = {} if old is None else {file.name: old}
        if old is not None:
            file.write_bytes(old)
        try:
            with write_atomically(file) as part:
                assert part.parent == file.parent
                part.write_bytes(new[:written])
                if error:
                    raise error
                part.write_bytes(new)
        except BaseException as e:
            assert type(e) is error
        assert contents(folder) == (before if error else {file.name: new})

@pytest.mark.parametrize('step', ['pathlib.Path.chmod', 'os.fsync', 'os.replace'])
def test_a_failing_system_leaves_the_old_file(step, tmp_path):
    (tmp_path/'a').write_text('old')
    with pytest.raises(OSError, match='broken'), patch(step, side_effect=OSError('broken')):
        with write_atomically(tmp_path/'a') as part:
            part.write_text('new')
    assert contents(tmp_path) == {'a': b'old'}

def test_a_killed_writer_leaves_the_old_file(tmp_path):
    "Not even Python may clean up; what remains is found under another name, and the next writer replaces it."
    (tmp_path/'a').write_text('old')
    code = ("import os; from mae_nb.base.files import write_atomically\n"
            "with write_atomically('a') as part: part.write_text('ne'); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path)
    assert done.returncode == -9
    assert contents(tmp_path) == {'a': b'old', 'a.part': b'ne'}
    with write_atomically(tmp_path/'a') as part:
        part.write_text('new')
    assert contents(tmp_path) == {'a': b'new'}

def test_the_bytes_come_before_the_name_and_the_folder_last(tmp_path):
    calls = []
    with patch('mae_nb.base.files.flush_to_disk', lambda path: calls.append(Path(path).name)), \
         patch('os.replace', lambda old, new: calls.append(f'{old.name} -> {new.name}')):
        with write_atomically(tmp_path/'a') as part:
            part.write_text('new')
    assert calls == ['a.part', 'a.part -> a', tmp_path.name]

def test_others_may_read_the_file(tmp_path):
    with write_atomically(tmp_path/'a') as part:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))   # as safetensors makes its files
    assert stat.S_IMODE((tmp_path/'a').stat().st_mode) == 0o644

@pytest.mark.parametrize('kind', [str, Path])
def test_names_may_be_text_or_paths(kind, tmp_path):
    file = kind(tmp_path/'a')
    with write_atomically(file) as part:
        part.write_text('new')
    flush_to_disk(file)
    flush_to_disk(kind(tmp_path))
    assert sha256(file) == hashlib.sha256(b'new').hexdigest()

@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 30_000))
def test_checksums_are_those_of_the_whole_file(piece, times):
    with TemporaryDirectory() as folder:
        file = Path(folder)/'a'
        file.write_bytes(piece * times)
        assert sha256(file) == hashlib.sha256(piece * times).hexdigest()
        assert md5(file) == hashlib.md5(piece * times).hexdigest()

def test_a_missing_file_is_an_error(tmp_path):
    for function in (flush_to_disk, sha256, md5):
        with pytest.raises(FileNotFoundError, match='gone'):
            function(tmp_path/'gone')

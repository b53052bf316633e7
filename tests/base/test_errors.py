"""Errors keep their kind, and every one of them fits into a line."""
import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_nb.base.errors import MissingFile, MissingPackage, UsageError, disk_is_full, one_line, require

FULL = [errno.ENOSPC, errno.EFBIG, errno.EDQUOT]

@given(st.text())
def test_any_message_becomes_one_line_that_is_not_empty(text):
    for kind in (UsageError, MissingFile, MissingPackage, RuntimeError, OSError):
        line = one_line(kind(text))
        assert line and line.splitlines() == [line] and line == ' '.join(line.split())

@given(st.lists(st.from_regex(r'[a-zA-Z0-9]{1,9}', fullmatch=True), min_size=1))
def test_the_words_of_a_message_stay(words):
    assert one_line(UsageError('\n\t '.join(words))) == ' '.join(words)

@pytest.mark.parametrize('number', FULL)
@pytest.mark.parametrize('file', [None, 'runs/base/checkpoints/100.safetensors'])
def test_a_full_disk_is_named_with_its_file(number, file):
    e = OSError(number, os.strerror(number), file)
    assert disk_is_full(e)
    assert one_line(e).startswith('no space left on the disk')
    assert file is None or file in one_line(e)

@pytest.mark.parametrize('number', sorted(set(errno.errorcode) - set(FULL)))
def test_no_other_error_of_the_system_is_a_full_disk(number):
    assert not disk_is_full(OSError(number, os.strerror(number), 'file'))

def test_a_full_disk_is_known_by_its_text_too():
    "The writer of safetensors files gives no number."
    for text in ('No space left on device (os error 28)', 'File too large (os error 27)', 'Quota (os error 122)'):
        assert disk_is_full(OSError(f'I/O error: {text}'))

def test_errors_of_the_caller_are_what_python_raises_too():
    assert issubclass(MissingFile, FileNotFoundError) and issubclass(MissingPackage, ImportError)
    for kind in (MissingFile, MissingPackage):
        assert issubclass(kind, UsageError) and issubclass(kind, ValueError)
        with pytest.raises(UsageError, match='^why$'):
            raise kind('why')

@pytest.mark.parametrize('extra, wanted', [(None, 'pip install no_such_package'),
                                           ('hub', 'in the folder of mae_nb, pip install -e ".[hub]"')])
def test_a_missing_package_is_named_with_the_command_that_installs_it(extra, wanted):
    with pytest.raises(MissingPackage) as e:
        require('no_such_package.with_a_part', extra)
    assert str(e.value) == f'no_such_package is not installed: {wanted}'
    assert require('os.path') is os.path

"""Names are found, and wrong ones are met with what exists."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_nb.base.errors import UsageError
from mae_nb.base.names import pick, to_pair

NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)

@given(NAMES, st.data())
def test_a_known_name_is_itself(known, data):
    name = data.draw(st.sampled_from(known))
    assert pick(name, known, 'thing') == name
    assert pick(name, dict.fromkeys(known), 'thing') == name
    assert pick(name, iter(known), 'thing') == name

@given(NAMES, st.text(max_size=12))
def test_an_unknown_name_is_answered_with_known_ones_only(known, name):
    if name in known:
        return
    with pytest.raises(UsageError) as e:
        pick(name, known, 'thing')
    message = str(e.value)
    start = f'unknown thing {name!r}: '
    nearest, every = [f'did you mean {k!r}?' for k in known], 'known: ' + ', '.join(map(repr, known))
    assert message.startswith(start) and message.removeprefix(start) in (*nearest, every)

@given(st.lists(st.sampled_from('abcdefghijklmnopqrstuvwxyz'), min_size=5, unique=True), st.data())
def test_a_name_with_two_letters_in_the_wrong_order_is_recognised(letters, data):
    i = data.draw(st.integers(0, len(letters) - 2))
    name = ''.join(letters)
    typo = name[:i] + name[i + 1] + name[i] + name[i + 2:]
    with pytest.raises(UsageError) as e:
        pick(typo, [name, '0123456789'], 'thing')
    assert str(e.value).endswith(f'did you mean {name!r}?')

@pytest.mark.parametrize('name', [None, 3, 2.5, ('a', 'b')])
def test_what_is_no_text_is_no_name(name):
    with pytest.raises(UsageError, match='unknown thing'):
        pick(name, ['grey', 'rgb'], 'thing')

@given(st.integers(), st.integers())
def test_one_number_or_two(rows, columns):
    assert to_pair(rows) == (rows, rows)
    for pair in ((rows, columns), [rows, columns]):
        assert to_pair(pair) == (rows, columns)
        assert to_pair(to_pair(pair)) == (rows, columns)

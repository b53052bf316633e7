"""`mae-check` reports the same whoever reads, and an interrupted check ends soon."""
import time

import pytest
from made_images import encode, made_image

from mae_nb.data import check
from mae_nb.data.datasets import folder_set


@pytest.fixture
def images(tmp_path):
    "Good files, copies, one that breaks off, one that is none, and one that shows nothing."
    whole = encode(made_image(0, 60, 80))
    for i in range(70):
        place = tmp_path/'photos'/('odd' if i % 2 else 'even')
        place.mkdir(parents=True, exist_ok=True)
        data = {3: whole, 4: whole, 5: whole[:len(whole) // 2], 6: b'%PDF-1.4', 7: b''}.get(i)
        (place/f'{i:02}.jpg').write_bytes(encode(made_image(i, 40 + i, 50)) if data is None else data)
    return folder_set(tmp_path/'photos')


def test_threads_and_processes_report_the_same(images):
    reports = [check.check_data(dict(train=images), readers) for readers in (0, 1, 2, check.MOST_THREADS + 1)]
    assert all(report == reports[0] for report in reports)
    part = reports[0]['parts']['train']
    assert [bad['file'][-6:] for bad in part['bad']] == ['06.jpg', '05.jpg', '07.jpg'] and part['images'] == 70
    assert any('a PDF document' in bad['reason'] for bad in part['bad'])
    assert [[name[-6:] for name in group] for group in reports[0]['duplicates']] == [['04.jpg', '03.jpg']]


def test_an_interrupted_check_does_not_read_the_rest():
    "Of 200 blocks of files, those that are open are read to their end."
    class Slow:
        read = 0
        def __len__(self): return 200 * 32
        def __getitem__(self, i):
            Slow.read += 1
            time.sleep(.001)

    blocks = check._read_in_threads(Slow(), 2)
    next(blocks)
    blocks.close()   # as an exception in the loop over them does
    assert 32 <= Slow.read <= 32 * 20

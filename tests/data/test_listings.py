"""What a run notes of its data: the same for every kind of source, whatever was asked to be compared."""
from pathlib import Path

import numpy as np

from mae_nb.base.files import read_table
from mae_nb.data.archives import TarMembers
from mae_nb.data.datasets import ImageSet
from mae_nb.data.fingerprint import compare_listings, list_data


def test_members_of_a_tar_are_listed_with_their_sizes():
    members = TarMembers(Path('train.tar'), [('a.jpg', 0, 3), ('b.jpg', 3, 4), ('c.jpg', 7, 9)])
    listing = list_data([ImageSet('imagenet/train', members[[0, 2]], np.array([0, 1]), ['cat', 'dog'])])
    assert listing.sizes.tolist() == [3, 9] and listing.titles == ['imagenet/train/cat', 'imagenet/train/dog']


def test_pixels_in_memory_are_the_same_however_they_are_compared():
    "A run that began with data_check=sizes may resume with data_check=contents."
    pixels = np.zeros((3, 4800, 4800, 3), dtype=np.uint8)   # more than 128 MiB
    images = ImageSet('large', pixels, np.arange(3) % 2, ['cat', 'dog'])
    assert compare_listings(list_data([images]), list_data([images], True)) == []


def test_a_quoted_field_keeps_its_line_break(tmp_path):
    (tmp_path/'table.csv').write_text('file,reason\n"a\nb.jpg",truncated\n')
    assert read_table(tmp_path/'table.csv', 'file') == [dict(file='a\nb.jpg', reason='truncated')]

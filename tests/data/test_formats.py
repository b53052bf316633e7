"""HEIC, AVIF and JPEG XL: read where their packages are, turned upright once, whole or not at all."""
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mae_nb.data.datasets import folder_set
from mae_nb.data.formats import image_endings, readable_formats
from mae_nb.data.images import read_image

PHOTO = Image.fromarray(load_sample_image('flower.jpg')).resize((160, 96))
TURNS = Image.Transpose   # orientation -> how the picture is stored
STORED = {1: None, 2: TURNS.FLIP_LEFT_RIGHT, 3: TURNS.ROTATE_180, 4: TURNS.FLIP_TOP_BOTTOM, 5: TURNS.TRANSPOSE,
          6: TURNS.ROTATE_90, 7: TURNS.TRANSVERSE, 8: TURNS.ROTATE_270}


def saved(kind, turn, **options):
    "A file whose picture is stored turned, with the orientation that turns it upright."
    if kind not in readable_formats():
        pytest.skip(f'{kind} is not read here: its package is an extra')
    exif = Image.Exif()
    exif[0x112] = turn
    stored = PHOTO if STORED[turn] is None else PHOTO.transpose(STORED[turn])
    file = io.BytesIO()
    stored.save(file, kind, exif=exif.tobytes(), quality=95, **options)
    return file


def is_upright(file):
    pixels = read_image(file).permute(1, 2, 0).numpy().astype(int)
    return pixels.shape == (96, 160, 3) and abs(pixels - np.array(PHOTO)).mean() < 5


@pytest.mark.parametrize('turn', STORED)
@pytest.mark.parametrize('kind', ['HEIF', 'AVIF', 'WEBP'])
def test_upright_once(kind, turn):
    assert is_upright(saved(kind, turn))


@pytest.mark.parametrize('turn', STORED)
def test_a_jpeg_inside_of_jpeg_xl_is_upright(tmp_path, turn):
    "Made from a photograph's own JPEG, whose note still counts."
    pytest.importorskip('pillow_jxl')
    (tmp_path/'turned.jpg').write_bytes(saved('JPEG', turn).getvalue())
    with Image.open(tmp_path/'turned.jpg') as im:
        im.save(tmp_path/'turned.jxl', lossless_jpeg=True)
    assert is_upright(io.BytesIO((tmp_path/'turned.jxl').read_bytes()))


def test_a_note_in_jpeg_xl_has_no_effect():
    "ISO 18181: the orientation is in the codestream, which the decoder follows, and not in the notes."
    file = saved('JXL', 6)
    assert read_image(file).shape == (3, 160, 96)   # as it was stored


@pytest.mark.parametrize('kind', ['HEIF', 'AVIF', 'JXL'])
def test_half_a_file_is_an_error(kind):
    data = saved(kind, 1).getvalue()
    for share in (.1, .5, .9):
        with pytest.raises(Exception) as error:   # whatever their decoders raise: the loader names the file
            read_image(io.BytesIO(data[:int(share * len(data))]))
        assert str(error.value)


def test_files_of_telephones_are_images_of_a_folder(tmp_path):
    (tmp_path/'cat').mkdir()
    (tmp_path/'cat'/'1.HEIC').write_bytes(saved('HEIF', 6).getvalue())
    (tmp_path/'cat'/'2.jxl').write_bytes(saved('JXL', 1).getvalue())
    images = folder_set(tmp_path)
    assert {'.heic', '.jxl'} <= image_endings() and len(images) == 2
    assert [tuple(images.read(i).shape) for i in range(2)] == [(3, 96, 160)] * 2

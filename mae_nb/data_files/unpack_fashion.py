"""All 70,000 images of Fashion-MNIST as PNG files: python mae_nb/data_files/unpack_fashion.py FOLDER OUT"""
# FOLDER holds the four original .gz files, as for make_fashion.py. OUT gets train/ and val/ with a folder for each
# class, which every command takes; `--in-chans 1` keeps the images grey.
import sys
from pathlib import Path

from make_fashion import CLASSES, read_idx
from PIL import Image

PARTS = {'train': 'train', 't10k': 'val'}


def main(folder, out):
    "A PNG file for each image."
    for part, name in PARTS.items():
        labels = read_idx(Path(folder)/f'{part}-labels-idx1-ubyte.gz', 8)
        images = read_idx(Path(folder)/f'{part}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
        for label, title in enumerate(CLASSES):
            place = Path(out)/name/title.replace('/', ' or ')
            place.mkdir(parents=True, exist_ok=True)
            for i in (labels == label).nonzero()[0]:
                Image.fromarray(images[i]).save(place/f'{i:05}.png')


if __name__ == '__main__':
    main(*sys.argv[1:])

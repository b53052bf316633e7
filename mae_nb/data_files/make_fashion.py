"""Make mae_nb/data_files/fashion.npz: python mae_nb/data_files/make_fashion.py FOLDER [OUT]"""
# FOLDER holds the four original .gz files (Debian's package dataset-fashion-mnist puts them into
# /usr/share/datasets/fashion-mnist). The script takes the first 1,000 training and the first 200 test images of each
# class, in the files' order; the result is the same, byte for byte, each time.
import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

CLASSES = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']

def read_idx(path, header):
    "The bytes of an IDX file behind its header."
    return np.frombuffer(gzip.open(path).read(), np.uint8, offset=header)

def first_per_class(folder, part, count):
    "Images and labels of the first `count` of each class."
    labels = read_idx(folder/f'{part}-labels-idx1-ubyte.gz', 8)
    images = read_idx(folder/f'{part}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
    return images[keep], labels[keep]

def main(folder, out='mae_nb/data_files/fashion.npz'):
    train_x, train_y = first_per_class(folder, 'train', 1000)
    test_x, test_y = first_per_class(folder, 't10k', 200)
    arrays = dict(train_images=train_x, train_labels=train_y, test_images=test_x, test_labels=test_y)
    arrays['classes'] = np.array(CLASSES)
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for name, a in arrays.items():
            buf = io.BytesIO()
            np.save(buf, a, allow_pickle=False)
            info = zipfile.ZipInfo(f'{name}.npy', (1980, 1, 1, 0, 0, 0))
            z.writestr(info, buf.getvalue(), zipfile.ZIP_DEFLATED)

if __name__ == '__main__':
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Masked autoencoders, taught in notebooks and trained with fastai

Modules:

- `mae_nb.data_files.make_fashion`: Make mae_nb/data_files/fashion.npz: the class-balanced part of Fashion-MNIST that ships with the package."""

import warnings

__version__ = "0.0.1"
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)  # fastai's import

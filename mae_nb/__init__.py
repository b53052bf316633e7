"""Masked autoencoders, taught in notebooks and trained with fastai"""

import warnings

__version__ = "0.0.1"
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)  # fastai's import

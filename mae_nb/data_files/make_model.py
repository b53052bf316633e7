"""Make a shipped model: python mae_nb/data_files/make_model.py RUN mae_nb/data_files/NAME.safetensors"""
import sys

from mae_nb.weights.loading import write_own
from mae_nb.weights.reading import open_weights


def main(run, out):
    "The weights of a pretraining in half precision, with what builds its model and what it was trained on."
    weights = open_weights(run)
    write_own({name: tensor.half() for name, tensor in weights.state.items()}, out, weights.options, weights.data)


if __name__ == '__main__':
    main(*sys.argv[1:])

"""What the demo's probes read off a model that was pretrained for longer: the demo's readout, draws and penalties.

    python bench/longer.py [--weights mae_nano_fashion] [--seeds 3] [--json FILE]

The rows of raw pixels are the demo's own for the same seeds, as a check. bench/results/demo/longer.json has the numbers
that the chapter `demo` and tutorial 01 name.
"""
import argparse
import json
from pathlib import Path

from mae_nb.base.devices import machine
from mae_nb.data.datasets import load_source
from mae_nb.tasks.demo import DEMOS, compare_features
from mae_nb.weights.building import load_mae


def parse(words):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', default='mae_nano_fashion')
    parser.add_argument('--data', default='fashion', choices=DEMOS)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--json')
    return parser.parse_args(words)

def main(words=None):
    args = parse(words)
    train, test = load_source(args.data)
    encoders = {args.weights: load_mae(args.weights).encoder}
    table = []
    for seed in range(args.seeds):
        print(f'seed {seed}')
        found = compare_features(train, test, encoders, DEMOS[args.data], seed)
        table += [entry | dict(seed=seed) for entry in found]
    if args.json:
        result = dict(table=table, data=args.data, weights=args.weights) | machine()
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')

if __name__ == '__main__':
    main()

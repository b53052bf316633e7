"""The results of `bench/gpu/run.sh` as Markdown.

    python bench/gpu/table.py [FOLDER]     bench/results/gpu by default
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))   # for `step`, which lies beside

from step import table as step_table


def learners_table(result):
    "A line for each task's learner."
    lines = ['| learner | steps | finite losses | steps that wait between log lines | loss, first and last five |',
             '|---|---|---|---|---|']
    for r in result['rows']:
        if 'finite' in r:
            finite = 'all' if r['finite'] else 'no'
            lines.append(f"| {r['row']} | {r['steps']} | {finite} | {r['waiting_steps']} | "
                         f"{r['first']:.3f}, {r['last']:.3f} |")
    for r in result['rows']:
        if 'same_bits' in r:
            same = 'the same bits' if r['same_bits'] else f"at most {r['largest_difference']:.1e} apart"
            lines.append(f"\nkilled and resumed, {r['steps']} steps: weights are {same} as of a run left alone")
    return '\n'.join(lines) + '\n'

def cifar_table(result):
    "The pace of each way to compile, and what was reached."
    lines = [f"{result['model']['name']} on {result['machine']['device_name']}", '', '| compile | images/s | MFU |',
             '|---|---|---|']
    lines += [f"| {way} | {row['images_per_second']:,.0f} | {row['mfu']:.1%} |"
              for way, row in result['pace'].items() if 'error' not in row]
    for name in ('pretrain_seconds', 'linear_probe', 'knn', 'finetune_seconds', 'finetune'):
        if name in result:
            lines.append(f'\n{name}: {result[name]}')
    return '\n'.join(lines) + '\n'

def feed_table(result):
    "Images a second by who decodes."
    rows = [f"| {r['row']} | {r['images_per_second']:,.0f} | {r['data_wait']:.0%} |" for r in result['rows']]
    return '\n'.join(['| data | images/s | waiting for data |', '|---|---|---|', *rows]) + '\n'

TABLES = dict(steps=step_table, learners=learners_table, cifar=cifar_table, feed=feed_table)

def main(words=None):
    words = sys.argv[1:] if words is None else words
    folder = Path(words[0]) if words else Path(__file__).parents[1]/'results'/'gpu'
    for name, as_text in TABLES.items():
        file = folder/f'{name}.json'
        text = as_text(json.loads(file.read_text())) if file.exists() else 'not measured yet\n'
        print(f'## {name}\n\n{text}')

if __name__ == '__main__':
    main()

"""Colours that survive colour blindness, text of at least 8 points, and pictures with a text, in every notebook.

The three kinds of colour blindness are simulated (Machado 2009, full severity, by colorspacious). A distance is that of
CAM02-UCS, in which 1 is about the smallest difference that anybody sees."""
import itertools
import json
import re

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from support import ROOT

from mae_nb.tasks.masks import IGNORE
from mae_nb.tasks.pixels import overlay, overlay_colours, palette
from mae_nb.tasks.visualize import HIDDEN_COLOUR

colorspacious = pytest.importorskip('colorspacious', reason='pip install colorspacious')
KINDS = None, 'protanomaly', 'deuteranomaly', 'tritanomaly'   # None: all three cones
APART = 10          # colours that must be told apart in a picture
NOTEBOOKS = sorted(f for folder in ('nbs', 'tutorials') for f in (ROOT/folder).rglob('*.ipynb')
                   if '.ipynb_checkpoints' not in f.parts)
TEXT = re.compile(r'(?:#\| .+\n)*?#\| fig-alt: >\n((?:#\|   .+\n)+)')   # folded, after other directives


def seen(colour, kind):
    "A colour (r, g, b) in [0, 1] as somebody sees it who lacks one kind of cones."
    if kind is None:
        return np.asarray(colour)
    space = dict(name='sRGB1+CVD', cvd_type=kind, severity=100)
    return np.clip(colorspacious.cspace_convert(np.asarray(colour), space, 'sRGB1'), 0, 1)


def distance(first, second):
    "The smallest distance of two colours over all kinds of sight."
    pairs = [(seen(to_rgb(first), kind), seen(to_rgb(second), kind)) for kind in KINDS]
    return min(float(colorspacious.deltaE(*pair)) for pair in pairs)


def code_cells():
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text())['cells']:
            if cell['cell_type'] == 'code':
                yield str(file.relative_to(ROOT)), cell, ''.join(cell['source'])


def test_the_simulation_confuses_what_is_known_to_be_confused():
    assert distance('C2', 'C3') < APART < distance('C0', 'C1')        # matplotlib's green and red; blue and orange
    assert distance((1, 0, 0), (0, .45, 0)) < .3 * float(colorspacious.deltaE((1, 0, 0), (0, .45, 0)))


def test_hidden_patches_are_told_from_any_other_colour_beside_them():
    for other in ('white', 'black', '0.5', '0.75', 'C1'):
        assert distance(HIDDEN_COLOUR, other) > APART, other


def closest_classes(colours):
    "The smallest distance of two of some colours (n, 3) of 0 to 255."
    return min(distance(*pair) for pair in itertools.combinations(np.asarray(colours) / 255, 2))


@pytest.mark.parametrize('grey', (0, 64, 128, 192, 255))
def test_classes_of_an_overlay_can_be_told_apart(grey):
    "Those of 0 to 8 and the ignored pixels, laid over a picture of any brightness."
    numbers = np.array([[*range(9), IGNORE]])
    mixed = overlay(torch.full((3, *numbers.shape), grey, dtype=torch.uint8), numbers)
    assert closest_classes(mixed[0]) > APART
    assert closest_classes(overlay_colours()[numbers[0]]) > APART
    assert closest_classes(.3 * grey + .7 * palette()[:9]) < APART / 2   # VOC's colours could not


def test_colours_that_one_cell_names_can_be_told_apart():
    confused = {}
    for file, cell, text in code_cells():
        names = sorted(set(re.findall(r"""['"](C\d)['"]""", text)))
        pairs = [pair for pair in itertools.combinations(names, 2) if distance(*pair) < APART]
        if pairs:
            confused[f'{file} {cell["id"]}'] = pairs
    assert confused == {}


def ends_and_steps(name):
    "The smallest distance of a colour map's ends, and of any two of nine colours of it, over all kinds of sight."
    colours = colormaps[name](np.linspace(.02, .98, 9))[:, :3]
    return distance(colours[0], colours[-1]), min(distance(*pair) for pair in itertools.combinations(colours, 2))


def test_colour_maps_keep_their_order():
    "Those of the notebooks with a scale; a label's colour is not one."
    used = {}
    for file, _, text in code_cells():
        for name in re.findall(r"""cmap=['"](\w+)['"]""", text):
            used.setdefault(name, set()).add(file)
    bad = set()
    for name in used.keys() - {'Pastel1', 'tab10', 'tab20'}:
        ends, step = ends_and_steps(name)
        if ends < 2 * APART or step < 3:
            bad |= used[name]
    assert bad == set() and len(used) >= 8


def test_text_has_at_least_eight_points():
    small = {f'{file} {cell["id"]}' for file, cell, text in code_cells()
             if re.search(r'(?:font|label)size=[1-7]\b(?!\.?\d)', text)}
    assert small == set()


def pictured():
    "The code cells that keep a picture, as (place, source)."
    for file, cell, text in code_cells():
        if any('image/png' in o.get('data', {}) for o in cell['outputs']):
            yield f'{file} {cell["id"]}', text


def described(text):
    "Whether a cell's first lines hold a text of at least eight words."
    found = TEXT.match(text)
    return bool(found) and len(found[1].replace('#|', '').split()) >= 8


def test_every_picture_has_a_text():
    cells = dict(pictured())
    assert len(cells) > 250
    assert [place for place, text in cells.items() if not described(text)] == []


def test_a_text_is_missed_where_there_is_none():
    words = '#|   The loss falls from two to one\n#|   within ten steps.\n'
    assert described(f'#| fig-alt: >\n{words}plot()')
    assert described(f'#| slow\n#| fig-alt: >\n{words}plot()')
    for text in ('plot()', f'plot()\n#| fig-alt: >\n{words}', '#| fig-alt: >\n#|   A curve.\nplot()',
                 f'#| fig-cap: >\n{words}plot()'):
        assert not described(text)

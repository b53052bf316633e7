"""Pictures with controls: in Python, and moved by a reader in a real browser (`pytest -m slow`)."""
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from browsing import bring_into_view, chromium, jupyter_lab, run_all
from support import ROOT

CHAPTERS = [ROOT/'nbs'/name for name in (
    'tasks/28b_explorer.ipynb', 'tasks/29_widgets.ipynb', 'course/playground.ipynb')]
NAMES = 'explore_masking', 'explore_shuffle', 'explore_reconstruction', 'explore_attention', 'explore_neighbours'
WITHOUT = '''
import sys
sys.modules['ipywidgets'] = None
from matplotlib.figure import Figure
from mae_nb.tasks import explorer
explorer.has_front_end = lambda: False
from mae_nb.tasks.widgets import explore_masking, explore_shuffle
for picture in (explore_masking(), explore_shuffle()):
    assert isinstance(picture, Figure)
'''


def test_without_ipywidgets_there_are_pictures():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kept_outputs_are_pictures_that_need_no_kernel():
    "A view whose model is gone shows an error in Jupyter; what is kept must be readable everywhere."
    for file in CHAPTERS:
        outputs = [o for c in json.loads(file.read_text())['cells'] for o in c.get('outputs', [])]
        kinds = {kind for o in outputs for kind in o.get('data', {})}
        assert 'image/png' in kinds and not [kind for kind in kinds if 'widget' in kind], file


def test_the_playground_has_every_widget():
    text = CHAPTERS[-1].read_text()
    assert [name for name in NAMES if f'"{name}()"' not in text] == []


# ---- in Chromium ---------------------------------------------------------------------------------------------------

browsing = pytest.mark.skipif(not shutil.which('chromedriver'), reason='no Chromium with its driver')
PICTURE = '.jp-OutputArea-output .widget-hbox img'
STILL = '''
const img = document.querySelectorAll(arguments[0])[arguments[1]];
return img ? [img.alt, img.src.length, img.src.slice(-2000), img.naturalWidth] : null'''


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The playground in Jupyter Lab, all cells run, in headless Chromium."
    webdriver = pytest.importorskip('selenium.webdriver', reason='pip install selenium')
    folder = tmp_path_factory.mktemp('browser')
    shutil.copytree(ROOT/'nbs'/'course', folder/'course', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    with jupyter_lab(folder, 'course/playground.ipynb') as address, chromium(folder/'profile', webdriver) as driver:
        driver.get(address)
        run_all(driver, lambda: len(driver.find_elements('css selector', PICTURE)) == len(NAMES))
        yield driver


def picture(page, number):
    "What one of the pictures shows: its text, and its bytes."
    found = page.execute_script(STILL, PICTURE, number)
    assert found and found[3] > 100, 'the picture was not drawn'
    return found


def until_it_changes(page, number, before, words=''):
    "Wait for another picture, whose text has some words."
    end = time.monotonic() + 60
    while time.monotonic() < end:
        now = picture(page, number)
        if now[1:] != before[1:] and words in now[0]:
            return now
        time.sleep(.2)
    raise AssertionError(f'still {picture(page, number)[0]!r}, not {words!r}')


def screenshot(page, name, number):
    if folder := os.environ.get('SCREENSHOTS'):
        image = page.find_elements('css selector', PICTURE)[number]
        bring_into_view(page, image)
        time.sleep(.5)
        page.save_screenshot(f'{folder}/{name}.png')


def panel(page, number):
    "The output that holds one of the pictures."
    image = page.find_elements('css selector', PICTURE)[number]
    return image.find_element('xpath', 'ancestor::div[contains(@class, "jp-OutputArea-output")]')


def press(page, element, *keys):
    "Give an element the focus and type, as somebody without a mouse does."
    bring_into_view(page, element)
    page.execute_script('arguments[0].focus()', element)
    element.send_keys(*keys)


def choose(page, number, menu, option):
    "Choose from one of a picture's lists."
    from selenium.webdriver.support.ui import Select
    element = panel(page, number).find_elements('css selector', 'select')[menu]
    bring_into_view(page, element)
    Select(element).select_by_visible_text(option)


def click(page, element):
    bring_into_view(page, element)
    element.click()


@pytest.mark.slow
@browsing
def test_a_slider_moves_and_the_picture_changes(page):
    from selenium.webdriver.common.keys import Keys
    before = picture(page, 0)
    screenshot(page, 'masking_before', 0)
    assert '49 of 196 patches are visible' in before[0]
    handle = panel(page, 0).find_elements('css selector', '.noUi-handle')[0]
    press(page, handle, Keys.ARROW_LEFT)
    after = until_it_changes(page, 0, before, '58 of 196 patches are visible')   # .70
    screenshot(page, 'masking_after', 0)
    choose(page, 0, 1, 'block')
    until_it_changes(page, 0, after, 'hidden by the sampler block')


@pytest.mark.slow
@browsing
def test_the_list_is_shuffled_step_by_step(page):
    from selenium.webdriver.common.keys import Keys
    before = picture(page, 1)
    handle = panel(page, 1).find_elements('css selector', '.noUi-handle')[0]
    press(page, handle, Keys.ARROW_RIGHT)
    after = until_it_changes(page, 1, before, 'unshuffled: each token is back in its place')
    assert after[0].count('mask token') == 12
    screenshot(page, 'shuffle_after', 1)


@pytest.mark.slow
@browsing
def test_a_mask_is_drawn_by_hand(page):
    before = picture(page, 2)
    screenshot(page, 'reconstruction_before', 2)
    buttons = panel(page, 2).find_elements('css selector', '.widget-gridbox button')
    assert len(buttons) == 64 and '16 of 64 patches are seen' in before[0]
    hidden = next(b for b in buttons if 'mod-active' in b.get_attribute('class'))
    assert re.fullmatch(r'row \d, column \d', hidden.get_attribute('title'))
    click(page, hidden)
    after = until_it_changes(page, 2, before, '17 of 64 patches are seen')
    press(page, hidden, ' ')   # the keyboard does the same
    after = until_it_changes(page, 2, after, '16 of 64 patches are seen')
    pattern = panel(page, 2).find_element('xpath', './/button[text()="block"]')
    click(page, pattern)
    after = until_it_changes(page, 2, after, '16 of 64 patches are seen')
    choose(page, 2, 0, 'roof')
    until_it_changes(page, 2, after, 'roof: 16 of 64')
    screenshot(page, 'reconstruction_after', 2)


@pytest.mark.slow
@browsing
def test_a_patch_is_clicked_and_its_attention_shown(page):
    before = picture(page, 3)
    screenshot(page, 'attention_before', 3)
    click(page, panel(page, 3).find_elements('css selector', '.widget-gridbox button')[9])
    after = until_it_changes(page, 3, before, 'the patch in row 2, column 2 looks most at')
    screenshot(page, 'attention_after', 3)
    assert len(panel(page, 3).find_elements('css selector', '.widget-gridbox button.mod-active')) == 1
    choose(page, 3, 1, '2')
    until_it_changes(page, 3, after, 'head 2')


@pytest.mark.slow
@browsing
def test_neighbours_follow_the_picture(page):
    from selenium.webdriver.common.keys import Keys
    before = picture(page, 4)
    press(page, panel(page, 4).find_elements('css selector', '.noUi-handle')[0], Keys.ARROW_RIGHT)
    after = until_it_changes(page, 4, before, 'picture 18 ')
    choose(page, 4, 0, 'pixels')
    until_it_changes(page, 4, after, 'the nearest by pixels')
    screenshot(page, 'neighbours_after', 4)

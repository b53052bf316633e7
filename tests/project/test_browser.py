"""The book in a real browser, opened by the README's line. Needs Chromium, its driver and `pip install selenium`."""
import os
import re
import shlex
import shutil

import pytest
from browsing import chromium, free_port, served
from support import BIN, ROOT

webdriver = pytest.importorskip('selenium.webdriver', reason='pip install selenium')
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NO_DRIVER = 'no Chromium with its driver (Debian: chromium, chromium-driver)'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which('chromedriver'), reason=NO_DRIVER)]


def readme_line():
    "The command after the last && of the README's jupyter line."
    return shlex.split(re.search(r'&& (jupyter lab .*\.ipynb)', (ROOT/'README.md').read_text())[1])


@pytest.fixture
def lab(tmp_path):
    "Jupyter Lab as the README starts it, on a free port and without a browser of its own; its address."
    port, log = free_port(), tmp_path/'log'
    more = f'--ServerApp.port={port}', '--no-browser', '--IdentityProvider.token=book', '--allow-root'
    env = os.environ | dict(
        PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}',
        JUPYTERLAB_SETTINGS_DIR=str(tmp_path/'lab'), JUPYTER_DATA_DIR=str(tmp_path/'data'))
    with served([*readme_line(), *more], log, lambda: 'is running at' in log.read_text(), env, ROOT):
        yield f'http://127.0.0.1:{port}/lab/tree/nbs/course/00_introduction.ipynb?token=book'


@pytest.fixture
def browser(tmp_path):
    "Headless Chromium."
    with chromium(tmp_path/'profile', webdriver) as driver:
        yield driver


def code_cell(browser, text):
    "The first code cell with some text."
    cells = browser.find_elements(By.CSS_SELECTOR, '.jp-CodeCell')
    return next(c for c in cells if text in c.text)


def test_the_first_chapter_opens_and_runs(lab, browser):
    "Headings and kept pictures are on the page; the import cell runs in a kernel."
    browser.get(lab)
    wait = WebDriverWait(browser, 90)
    wait.until(lambda b: 'Pretrain, then fine-tune' in b.find_element(By.TAG_NAME, 'body').text)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, '.jp-RenderedImage img'))
    image = browser.find_element(By.CSS_SELECTOR, '.jp-RenderedImage img')
    wait.until(lambda b: b.execute_script('return arguments[0].naturalWidth', image) > 300)
    if folder := os.environ.get('SCREENSHOTS'):
        browser.save_screenshot(f'{folder}/introduction.png')
    code_cell(browser, 'import torch').find_element(By.CSS_SELECTOR, '.cm-content').click()
    browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda b: re.search(r'\[\d+\]:', code_cell(b, 'import torch').text))

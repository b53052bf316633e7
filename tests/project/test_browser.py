"""The book in a real browser, opened by the README's line. Needs Chromium, its driver and `pip install selenium`."""
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

webdriver = pytest.importorskip('selenium.webdriver', reason='pip install selenium')
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which('chromedriver'), reason='no Chromium with its driver (Debian: chromium, chromium-driver)')]

def readme_line():
    "The command behind the last && of the README's jupyter line."
    return shlex.split(re.search(r'&& (jupyter lab .*\.ipynb)', (ROOT/'README.md').read_text())[1])

@pytest.fixture
def lab(tmp_path):
    "Jupyter Lab as the README starts it, on a free port and without a browser of its own; its address."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    more = f'--ServerApp.port={port}', '--no-browser', '--IdentityProvider.token=book', '--allow-root'
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', JUPYTERLAB_SETTINGS_DIR=str(tmp_path/'lab'), JUPYTER_DATA_DIR=str(tmp_path/'data'))
    with open(tmp_path/'log', 'w') as log: server = subprocess.Popen([*readme_line(), *more], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            if 'is running at' in (tmp_path/'log').read_text() or server.poll() is not None: break
            time.sleep(.5)
        assert server.poll() is None, (tmp_path/'log').read_text()
        yield f'http://127.0.0.1:{port}/lab/tree/nbs/course/00_introduction.ipynb?token=book'
    finally: server.terminate(); server.wait(30)

@pytest.fixture
def browser(tmp_path):
    "Headless Chromium."
    options = webdriver.ChromeOptions()
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking', '--no-first-run', '--window-size=1300,1800', f'--user-data-dir={tmp_path/"profile"}'):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()

def test_the_first_chapter_opens_and_runs(lab, browser):
    "Headings and kept pictures are on the page; the import cell runs in a kernel."
    browser.get(lab)
    wait = WebDriverWait(browser, 90)
    wait.until(lambda b: 'Pretrain, then fine-tune' in b.find_element(By.TAG_NAME, 'body').text)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, '.jp-RenderedImage img'))
    image = browser.find_element(By.CSS_SELECTOR, '.jp-RenderedImage img')
    wait.until(lambda b: b.execute_script('return arguments[0].naturalWidth', image) > 300)
    if folder := os.environ.get('SCREENSHOTS'): browser.save_screenshot(f'{folder}/introduction.png')
    cell = next(c for c in browser.find_elements(By.CSS_SELECTOR, '.jp-CodeCell') if 'import torch' in c.text)
    cell.find_element(By.CSS_SELECTOR, '.cm-content').click()
    from selenium.webdriver.common.keys import Keys
    browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda b: re.search(r'\[\d+\]:', next(c for c in b.find_elements(By.CSS_SELECTOR, '.jp-CodeCell') if 'import torch' in c.text).text))

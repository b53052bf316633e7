"""Headless Chromium and Jupyter Lab for the tests that look at pages as a reader does."""
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from support import BIN, ROOT

FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
         '--disable-background-networking', '--no-first-run')


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def served(words: list, log: Path, ready, env: dict | None = None, cwd: Path | None = None):
    "A server that runs until the end of the block; `ready` says when it answers."
    with open(log, 'w') as file:
        server = subprocess.Popen(words, env=env, cwd=cwd, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while not ready() and server.poll() is None and time.monotonic() < end:
            time.sleep(.3)
        assert server.poll() is None and ready(), log.read_text()
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:   # Jupyter waits for its kernels
            server.kill()
            server.wait(30)


@contextmanager
def jupyter_lab(folder: Path, notebook: str):
    "Jupyter Lab on a folder; the address of one of its notebooks."
    port, log = free_port(), folder/'lab.log'
    words = [str(BIN/'jupyter'), 'lab', f'--ServerApp.root_dir={folder}', f'--ServerApp.port={port}', '--no-browser',
             '--IdentityProvider.token=book', '--allow-root']
    settings = folder/'settings'/'@jupyterlab'/'notebook-extension'/'tracker.jupyterlab-settings'
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')   # else the page holds only the cells that are in sight
    env = os.environ | dict(
        PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', PYTHONPATH=str(ROOT),
        JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), JUPYTER_DATA_DIR=str(folder/'data'))
    with served(words, log, lambda: 'is running at' in log.read_text(), env):
        yield f'http://127.0.0.1:{port}/lab/tree/{notebook}?token=book'


@contextmanager
def chromium(profile: Path, webdriver, width: int = 1300, height: int = 1800, **preferences):
    "A headless browser."
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f'--window-size={width},{height}', f'--user-data-dir={profile}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    try:
        yield driver
    finally:
        driver.quit()


def bring_into_view(driver, element):
    driver.execute_script('arguments[0].scrollIntoView({block: "center"})', element)


READY = """
const kernel = document.querySelector('.jp-Toolbar-kernelName')
const idle = document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')
return !!idle && kernel.textContent != 'No Kernel'
"""


def run_all(driver, done, seconds: float = 240):
    "Run all cells of the notebook that is open, until `done()`."
    from selenium.webdriver.support.ui import WebDriverWait
    wait = WebDriverWait(driver, seconds)
    wait.until(lambda d: d.find_elements('css selector', '.jp-Notebook .jp-MarkdownCell'))
    wait.until(lambda d: d.execute_script(READY))
    driver.find_element('css selector', '.jp-Notebook .jp-MarkdownCell').click()
    driver.find_element('xpath', '//div[contains(@class, "lm-MenuBar-itemLabel") and text()="Run"]').click()
    item = '//div[contains(@class, "lm-Menu-itemLabel") and text()="Run All Cells"]'
    wait.until(lambda d: d.find_elements('xpath', item))[0].click()
    wait.until(lambda d: done())

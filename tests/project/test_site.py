"""The site: what notebooks become; the built pages, and a reader who clicks through them (`pytest -m slow`).

`SITE=folder` takes a site that is built already; `SCREENSHOTS=folder` keeps what Chromium shows."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT/'docs'))
pytest.importorskip('latex2mathml', reason='pip install -e ".[site]"')
import build  # noqa: E402
import notebooks  # noqa: E402
import reference  # noqa: E402
from hooks import on_page_content  # noqa: E402

PLAYGROUND = ROOT/'nbs'/'course'/'playground.ipynb'


# ---- what notebooks become -----------------------------------------------------------------------------------------

def test_a_page_has_the_notebook_s_prose_code_and_described_pictures(tmp_path):
    page = notebooks.Page(PLAYGROUND, tmp_path, 'someone/book')
    text = page.text()
    assert '(../tasks/29_widgets.md)' in text and '.ipynb)' not in text
    assert '![A flower, and the same picture with all but 49 of its 196 patches coloured violet.]' in text
    assert 'explore_masking()' in text and '#|' not in text and 'warnings.filterwarnings' not in text
    assert len([*tmp_path.rglob('*.png')]) == page.pictures == 5


def test_links_that_no_page_has_lead_to_the_repository_or_nowhere(tmp_path):
    for repo, expected in (('a/b', '[settings](https://github.com/a/b/blob/HEAD/settings.ini)'), (None, 'settings')):
        page = notebooks.Page(ROOT/'nbs'/'index.ipynb', tmp_path, repo)
        assert page.with_links('[settings](../settings.ini)') == expected
    assert page.with_links('[all](all.ipynb#by-hand)') == '[all](all.md#by-hand)'
    assert page.with_links('[`all`](all.ipynb)') == '[`all`](all.md)'
    assert page.with_links('`[x](all.ipynb)` [web](https://x.org)') == '`[x](all.ipynb)` [web](https://x.org)'


def test_a_picture_without_a_text_gets_the_sentence_that_leads_to_it():
    cell = dict(source=['plt.plot()'])
    prose = '## Loss\n\nIt falls. The [loss](a.ipynb) of **both** runs:'
    assert notebooks.alternative_text(cell, prose) == 'Figure: The loss of both runs'
    described = dict(source=['#| fig-alt: >\n', '#|   Two lines that\n', '#|   fall.\n', 'plt.plot()'])
    assert notebooks.alternative_text(described, prose) == 'Two lines that fall.'


def test_outputs_become_text_that_markdown_leaves_alone(tmp_path):
    page = notebooks.Page(PLAYGROUND, tmp_path, None)
    stream = dict(output_type='stream', text=['a < b\n', '\n', '**c**\n'])
    assert page.output(stream, {}, '') == '<pre class="output">a &lt; b\n&#8203;\n**c**</pre>'
    table = dict(data={'text/html': ['<table>\n', '\n', '    <tr>'], 'text/plain': ['x']})
    assert page.output(table, {}, '') == '<div class="output">\n<table>\n<tr>\n</div>'
    view = {'application/vnd.jupyter.widget-view+json': [], 'text/plain': ['VBox']}   # needs a kernel: not shown
    assert page.output(dict(data=view), {}, '') == '<pre class="output">VBox</pre>'


def test_formulas_become_mathml():
    text = on_page_content(r'<p>The <span class="arithmatex">\(\frac{1}{n}\)</span>.</p>')
    assert text.startswith('<p>The <math') and '<mfrac>' in text and r'\frac' not in text
    assert 'display="block"' in on_page_content(r'<div class="arithmatex">\[x &lt; 1\]</div>')


def test_colab_s_first_cell_installs_the_package():
    file = ROOT/'nbs'/'model'/'01_patches.ipynb'
    notebook = notebooks.runnable(file, 'someone/book')
    first = ''.join(notebook['cells'][0]['source'])
    assert 'git clone --quiet --depth 1 https://github.com/someone/book' in first
    assert '%pip install --quiet -e "project[widgets]"' in first and '%cd project/nbs/model' in first
    assert notebook['cells'][1:] == json.loads(file.read_text())['cells']
    text = build.add_buttons('# patches\n\ntext', file, 'someone/book')
    assert 'github/someone/book/blob/gh-pages/colab/nbs/model/01_patches.ipynb' in text
    assert 'mybinder.org/v2/gh/someone/book/HEAD?urlpath=lab/tree/nbs/model/01_patches.ipynb' in text


def places(nav):
    "Every page of a navigation."
    if isinstance(nav, str):
        return [nav]
    return [p for row in nav for p in (places(row) if isinstance(row, str) else sum(map(places, row.values()), []))]


def test_every_page_is_in_the_navigation_once():
    found = places(build.navigation())
    expected = [notebooks.page_of(f).as_posix() for f in notebooks.all_notebooks()]
    assert len(found) == len(set(found)) and set(expected) < set(found)
    course = places(build.navigation()[1]['Course'])
    assert course[:3] == ['course/00_introduction.md', 'course/01_before.md', 'model/01_patches.md']


def test_the_api_shows_each_parameter_with_its_comment():
    text = reference.api_page('mae_nb.model.patches', '../../model/01_patches.md')
    assert '## patchify\n\nCut images into flat, non-overlapping patches.' in text
    assert 'imgs:torch.Tensor,   # images (b, c, h, w)' in text.replace('  #', '   #').replace('    #', '   #')
    text = reference.api_page('mae_nb.model.masking', 'x.md')
    assert 'ids_keep: torch.Tensor     # (b, k)' in text and '_rectangles' not in text
    assert len(reference.modules()) > 60 and len(reference.commands()) >= 15


# ---- the built pages -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the whole site, with badges for a repository."
    if folder := os.environ.get('SITE'):
        return Path(folder).resolve()
    pytest.importorskip('material', reason='pip install -e ".[site]"')
    out = tmp_path_factory.mktemp('site')
    words = [sys.executable, '-W', 'ignore', ROOT/'docs'/'build.py', '--repo', 'someone/book', '--out', out]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Parts(HTMLParser):
    "What a page links to, what it loads, its anchors, and its pictures' texts."
    def __init__(self, file):
        super().__init__()
        self.links, self.loads, self.ids, self.pictures = [], [], set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs:
            self.ids.add(attrs['id'])
        if tag == 'a' and 'href' in attrs:
            self.links.append(attrs['href'])
        if tag == 'link' and attrs.get('rel') not in ('canonical', 'next', 'prev', 'alternate'):
            self.loads.append(attrs.get('href', ''))
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'audio', 'embed') and 'src' in attrs:
            self.loads.append(attrs['src'])
        if tag == 'img':
            self.pictures.append(attrs.get('alt'))


@pytest.fixture(scope='module')
def pages(site):
    return {file: Parts(file) for file in sorted(site.rglob('*.html'))}


@pytest.mark.slow
def test_links_and_anchors_of_the_site_exist(site, pages):
    missing = []
    for file, parts in pages.items():
        for link in parts.links + parts.loads:
            address = urlsplit(link)
            if address.scheme or link.startswith('//') or file.name == '404.html':
                continue
            target = (file.parent/unquote(address.path)).resolve() if address.path else file
            target = target/'index.html' if target.is_dir() else target
            anchor = unquote(address.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids | {'__tabbed'}):
                missing.append((file.name, link))
    assert missing == [] and len(pages) > 150


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site, pages):
    foreign = [(file.name, link) for file, parts in pages.items() for link in parts.loads
               if urlsplit(link).netloc]
    styles = [(file.name, url) for file in site.rglob('*.css')
              for url in re.findall(r'url\(["\']?((?:https?:)?//[^)"\']+)|@import', file.read_text())]
    assert foreign == [] and styles == []


@pytest.mark.slow
def test_every_picture_of_the_site_has_a_text(pages):
    texts = [(file.name, alt) for file, parts in pages.items() for alt in parts.pictures]
    assert len(texts) > 200
    assert [pair for pair in texts if not pair[1] or len(pair[1]) < 12] == []


@pytest.mark.slow
def test_no_formula_is_left_as_tex(pages):
    texts = [(file, file.read_text()) for file in pages]
    assert [file.name for file, text in texts if 'class="arithmatex"' in text] == []
    assert sum(text.count('<math') for _, text in texts) > 50


# ---- in Chromium ---------------------------------------------------------------------------------------------------

SIZES = {'phone': (390, 844), 'desktop': (1300, 900)}
LOADED = 'return performance.getEntriesByType("resource").map(e => e.name).concat(location.href)'
OVERFLOW = 'return document.scrollingElement.scrollWidth - document.documentElement.clientWidth'


@pytest.fixture(scope='module')
def address(site, tmp_path_factory):
    from browsing import free_port, served
    port = free_port()
    words = [sys.executable, '-m', 'http.server', str(port), '--bind', '127.0.0.1', '--directory', str(site)]

    def ready():
        import socket
        with socket.socket() as s:
            return s.connect_ex(('127.0.0.1', port)) == 0

    with served(words, tmp_path_factory.mktemp('server')/'log', ready):
        yield f'http://127.0.0.1:{port}/'


@pytest.fixture(params=SIZES)
def reader(request, tmp_path):
    "Chromium, as wide as a phone or a desktop."
    if not shutil.which('chromedriver'):
        pytest.skip('no Chromium with its driver (Debian: chromium, chromium-driver)')
    webdriver = pytest.importorskip('selenium.webdriver', reason='pip install selenium')
    from browsing import chromium
    width, height = SIZES[request.param]
    with chromium(tmp_path/'profile', webdriver) as driver:
        driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
            width=width, height=height, deviceScaleFactor=1, mobile=request.param == 'phone'))
        driver.size = request.param
        yield driver


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, 'nothing came'
        time.sleep(.2)
    return found


def keep(reader, name):
    if folder := os.environ.get('SCREENSHOTS'):
        reader.save_screenshot(f'{folder}/{name}_{reader.size}.png')


@pytest.mark.slow
def test_a_reader_clicks_through_the_site(reader, address):
    "Front page, a chapter, its pictures; the search; the other colours; nothing from elsewhere, nothing too wide."
    reader.get(address)
    keep(reader, 'front')
    assert reader.execute_script(OVERFLOW) <= 0
    link = reader.find_element('css selector', '.md-content a[href*="03_masking"]')
    reader.execute_script('arguments[0].scrollIntoView({block: "center"})', link)
    link.click()
    wait_for(lambda: reader.current_url.endswith('model/03_masking.html'))
    image = reader.find_element('css selector', '.md-content img')
    reader.execute_script('arguments[0].scrollIntoView({block: "center"})', image)
    wait_for(lambda: reader.execute_script('return arguments[0].naturalWidth', image) > 100)
    keep(reader, 'chapter')
    assert reader.execute_script(OVERFLOW) <= 0
    scheme = 'return document.body.dataset.mdColorScheme'
    before = reader.execute_script(scheme)
    reader.execute_script('document.querySelector("form[data-md-component=palette] label:not([hidden])").click()')
    wait_for(lambda: reader.execute_script(scheme) != before)
    keep(reader, 'chapter_dark')
    for page in ('api/model/patches.html', 'reference/commands.html', 'training/03_optim.html',
                 'course/playground.html'):
        reader.get(address + page)
        keep(reader, 'dark_' + Path(page).stem)
        assert reader.execute_script(OVERFLOW) <= 0, page
        assert reader.execute_script(scheme) != before   # the choice is remembered
        hosts = {urlsplit(name).netloc for name in reader.execute_script(LOADED)} - {''}
        assert hosts == {urlsplit(address).netloc}, page


@pytest.mark.slow
def test_a_reader_finds_a_chapter_by_its_words(reader, address):
    reader.get(address)
    reader.execute_script('document.querySelector("label[for=__search]").click()')
    box = reader.find_element('css selector', 'input.md-search__input')
    wait_for(lambda: box.is_displayed())
    box.send_keys('unshuffle')
    wait_for(lambda: [a for a in reader.find_elements('css selector', '.md-search-result__link') if a.is_displayed()])
    keep(reader, 'search')
    targets = [a.get_attribute('href') for a in reader.find_elements('css selector', '.md-search-result__link')]
    assert any('03_masking' in t or '06_decoder' in t or '29_widgets' in t for t in targets)

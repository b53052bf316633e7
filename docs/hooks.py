"""What mkdocs does for every page: formulas become MathML, which browsers show and screen readers read themselves."""
import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.S)


def on_page_content(text: str, **_) -> str:
    "A page's HTML without TeX."
    def as_mathml(found):
        return convert(html.unescape(found[3]), display='block' if found[2] == '[' else 'inline')
    return FORMULA.sub(as_mathml, text)

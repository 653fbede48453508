"""Formulas become MathML when the pages are built: no script, no network, and a wrong formula fails the build."""

import re
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
_converter = LatexToMathML(fancy_error=False)
# \bigr)^2 puts the sized bracket into the base of the superscript, where browsers set it on the line instead of around
# its axis: the superscript gets an invisible bracket of the same height for its base.
_RAISED = re.compile(r"(\\[bB]igg?r\s*(\\[|a-zA-Z]+|[^\\]))\s*(?=[\^_])")

_WIDE = 55  # characters of LaTeX; what is longer may not fit a phone, and scrolls
# Browsers may break a line before and after any formula. What touches it stays with it.
_TOUCHING = re.compile(r'([(\["“]*)(<span class="formula">.*?</span>)([-–’s,.;:)\]"”?]*)', re.DOTALL)


def to_mathml(latex: str, *, block: bool) -> str:
    """One formula as a <math> element.

    Raises:
        LatexError: if it is not a formula of LaTeX.
    """
    raised = _RAISED.sub(lambda match: rf"{match[1]}{{\vphantom{{{match[1].replace('r', '', 1)}}}}}", latex)
    return _converter.convert_with_local_state(raised.strip(), displaystyle=block)


def _element(node: nodes.Element, *, block: bool) -> str:
    latex = node.astext()
    try:
        return to_mathml(latex, block=block)
    except LatexError as error:
        logger.warning("formula %r: %s", latex, error, location=node, type="mathml")
        return f"<code>{nodes.Text(latex)}</code>"


def _visit_inline(translator: Any, node: nodes.math) -> None:
    kind = "wide formula" if len(node.astext()) > _WIDE else "formula"
    translator.body.append(f'<span class="{kind}">{_element(node, block=False)}</span>')
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    # A wide formula scrolls; a region that scrolls must be reachable by keyboard, and have a name.
    translator.body.append(
        f'<div class="formula" tabindex="0" role="group" aria-label="formula">{_element(node, block=True)}</div>\n'
    )
    raise nodes.SkipNode


def keep_together(body: str) -> str:
    """The page with brackets and punctuation on the same line as the formula that they touch."""
    return _TOUCHING.sub(
        lambda found: f'<span class="unbroken">{found[0]}</span>' if found[1] or found[3] else found[0], body
    )


def _on_page(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    if "body" in context:
        context["body"] = keep_together(context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer as html_math_renderer = "mathml"."""
    app.connect("html-page-context", _on_page)
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

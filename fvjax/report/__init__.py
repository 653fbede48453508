"""Pages: what a run found, as one HTML file that needs no network, no server and no other file.

A page is made of a verdict and of sections, and knows how it was made:

    verdict = [Sentence("The flow memorizes its pairs.", "bad", "Own target nearest for 94 of 100 sources.")]
    sections = [Section("Variance", [Picture(figure_svg(figure), "Variance over time.", "One curve, highest at 1/2.")])]
    page = Page("Rotation by 150 degrees", "The flow returns its pairs.", verdict, sections, config, environment())
    Path("report.html").write_text(page.to_html(), encoding="utf-8")
"""

from fvjax.report._content import LEVELS as LEVELS
from fvjax.report._content import Picture as Picture
from fvjax.report._content import Section as Section
from fvjax.report._content import Sentence as Sentence
from fvjax.report._content import Table as Table
from fvjax.report._environment import environment as environment
from fvjax.report._figure import figure_svg as figure_svg
from fvjax.report._page import Page as Page

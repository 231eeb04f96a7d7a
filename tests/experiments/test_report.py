"""The report is one well-formed page that loads nothing; the figures show what they should."""

import io
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import plotting
from experiments.report import Claim, Figure, Section, SideBySide, Table, Text, write_report

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects the text and the attributes, and checks that every tag is closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.images, self.references = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())


def image_bytes(kind: str, frames: int = 1) -> bytes:
    out = io.BytesIO()
    images = [Image.new("RGB", (5, 3), (50 * i, 0, 0)) for i in range(frames)]
    images[0].save(out, kind, save_all=frames > 1, append_images=images[1:])
    return out.getvalue()


def test_a_report_says_what_was_found_and_needs_nothing_else(tmp_path):
    png = tmp_path / "figure.png"
    png.write_bytes(image_bytes("PNG"))
    gif = image_bytes("GIF", frames=3)
    path = write_report(
        tmp_path / "report.html",
        "Internal RL <tiny>",
        "First & second.\n\nAnother paragraph.",
        [
            Claim("solves the task", "0.81 > 0.5", True),
            Claim("raw RL does", "0.02", False),
            Claim("on ants", "not run", None),
        ],
        [
            Section(
                "Learning",
                [
                    Text("Some text."),
                    Table(
                        ("name", "success", "n"),
                        [("a", 0.12345, 1234), ("b", None, True), ("c", np.float32(0.5), np.int32(7))],
                        "T",
                    ),
                    Figure(png, 'Success "rate".'),
                    SideBySide([Figure(gif, "Before"), Figure(gif, "After")]),
                ],
            )
        ],
    )
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    for text in (
        ["Internal RL <tiny>", "First & second.", "Another paragraph.", "Some text."],
        ["solves the task", "0.81 > 0.5", "✓ holds", "✗ does not hold", "not decided"],
        ["0.123", "1,234", "–", "yes", "0.5", "7", "T", "Before", "After"],
    ):
        assert set(text) <= set(page.text)
    assert [image["alt"] for image in page.images] == ['Success "rate".', "Before", "After"]
    assert [reference.split(",")[0] for reference in page.references] == [
        "data:image/png;base64",
        "data:image/gif;base64",
        "data:image/gif;base64",
    ]
    assert "http" not in source
    assert "url(" not in source
    assert 'name="viewport"' in source
    assert "prefers-color-scheme: dark" in source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "report.html"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Figure(b"\xff\xd8\xff\xe0 a jpeg"), "expected a PNG or GIF"),
        (Table(("a", "b"), [(1,)]), "has 1 cells"),
    ],
)
def test_a_bad_block_leaves_the_earlier_report(tmp_path, block, message):
    path = write_report(tmp_path / "report.html", "Earlier", "", [], [])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_report(path, "Later", "", [], [Section("S", [block])])
    assert path.read_bytes() == before


def test_a_band_shows_median_and_quartiles(tmp_path):
    fig, axes = plotting.figure(1, 2)
    ax = axes[0, 0]
    values_SX = np.arange(5.0)[:, None] * np.array([1.0, 2.0, 3.0])
    plotting.line_with_band(ax, np.arange(3), values_SX, "five seeds")
    plotting.line_with_band(ax, np.arange(3), values_SX[:1], "one seed")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2, 4, 6])
    assert len(ax.collections) == 1
    band = ax.collections[0].get_datalim(ax.transData)
    np.testing.assert_allclose([band.ymin, band.ymax], [1, 9])
    assert ax.lines[0].get_color() == plotting.COLORS[0] != ax.lines[1].get_color()
    paths = [plotting.save(fig, tmp_path / name) for name in ("a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.size == (1350, 450)
    assert ax.get_legend() is not None
    assert axes[0, 1].get_legend() is None


def test_a_band_of_the_wrong_shape():
    _, axes = plotting.figure()
    with pytest.raises(ValueError, match=r"values have shape \(3,\) and x \(3,\)"):
        plotting.line_with_band(axes[0, 0], np.arange(3), np.arange(3.0))


def test_plotting_never_loads_pyplot(tmp_path):
    code = (
        "import sys; from experiments import plotting; assert 'matplotlib' not in sys.modules; "
        f"plotting.save(plotting.figure()[0], {str(tmp_path / 'x.png')!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

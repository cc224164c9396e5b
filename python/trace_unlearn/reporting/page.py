"""One self-contained HTML page: headings, text, tables and figures; styles inside, pictures as data, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trace_unlearn.files import staged_file, write_text
from trace_unlearn.values import show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light; --ink: #1f2937; --muted: #5b6472; --line: #e5e7eb; --soft: #f7f8fa; --accent: #0b63ce; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
.subtitle { color: var(--muted); margin-bottom: 1.4rem; }
.verdict { border-left: 4px solid var(--accent); background: var(--soft); padding: .4rem 1.1rem; margin: 1rem 0; }
.verdict p { max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0;
  padding: 0; }
.tiles > div { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--muted); font-size: .83rem; line-height: 1.3; }
.tiles dd { margin: .15rem 0 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .9rem 0 1.3rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem; }
th, td { padding: .32rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; background: var(--soft); }
thead th { white-space: normal; vertical-align: bottom; overflow-wrap: anywhere; }
tbody th { background: white; font-weight: 400; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
table.text td, table.text th { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
figure { margin: 1rem 0 1.5rem; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .9rem; max-width: 46rem; margin-top: .35rem; }
details summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; border-top: 1px solid var(--line);
  padding-top: .8rem; }
/* On a phone the names wrap, and stay in sight while a wide table scrolls: a number is always beside them. */
@media (max-width: 40rem) {
  main { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  table { font-size: .82rem; }
  th, td { padding: .28rem .45rem; }
  thead th { min-width: 3.5rem; }
  th:first-child { position: sticky; left: 0; max-width: 42vw; overflow-wrap: anywhere; }
}
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


class Page:
    """Collects the parts of a page; `write` puts report.html and the PNG of every figure into a folder.

    Example:
        >>> page = Page("Report", "of a run")
        >>> page.table("Losses", ["set", "NLL"], [["forget", 1.25]])
        >>> "<td>1.250</td>" in page.render()
        True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')
        self._pictures: dict[str, bytes] = {}

    def heading(self, text: str, level: int = 2) -> None:
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def verdict(self, sentences: Sequence[str]) -> None:
        """Paragraphs that stand out: what the page amounts to."""
        text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        self._parts.append(f'<div class="verdict">{text}</div>')

    def tiles(self, figures: Sequence[tuple[str, object]]) -> None:
        """Key figures, each with what it is."""
        cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(show(value))}</dd></div>" for name, value in figures)
        self._parts.append(f'<dl class="tiles">{cells}</dl>')

    def table(
        self,
        caption: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        text: bool = False,
        folded: bool = False,
    ) -> None:
        """A table whose first column names the rows; `text` aligns left and wraps, `folded` shows the caption only."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(show(row[0]))}</th>'
            + "".join(f"<td>{escape(show(cell))}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        table = (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
            + ('<table class="text">' if text else "<table>")
            + ("" if folded else f"<caption>{escape(caption)}</caption>")
            + f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        self._parts.append(f"<details><summary>{escape(caption)}</summary>{table}</details>" if folded else table)

    def figure(self, name: str, figure: Figure, *, alt: str, caption: str) -> None:
        """A picture, also written as NAME.png; `alt` says what it shows to who cannot see it."""
        from trace_unlearn.reporting.plots import png

        self._pictures[f"{name}.png"] = data = png(figure)
        source = base64.b64encode(data).decode("ascii")
        width, height = (round(100 * inches) for inches in figure.get_size_inches())
        self._parts.append(
            f'<figure><img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{source}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def render(self, footer: str = "") -> str:
        """The page as HTML."""
        body = "\n".join(self._parts) + (f"\n<footer>{escape(footer)}</footer>" if footer else "")
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, folder: Path, footer: str = "") -> Path:
        """Write the figures and then report.html into `folder`, each atomically; returns the page's path."""
        for name, data in self._pictures.items():
            with staged_file(folder / name) as temporary:
                temporary.write_bytes(data)
        write_text(folder / "report.html", self.render(footer))
        return folder / "report.html"

"""The report of `data check` as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from cluster.harmony import CHANNEL_LABELS
from cluster.languages import CATALOGUE, UNDETERMINED
from training.data.check import Excerpt, Report
from training.data.figures import Agreement, Bar, Figures
from training.data.findings import Finding, Kind
from training.data.inspection import name
from training.data.terminal import counted, overview_rows, printable

FINDINGS = 200
"""findings listed of each kind"""
TOOLS = 40

STYLE = """
:root { color-scheme: light dark; --ink: #1d2429; --soft: #5d6870; --line: #dde2e6; --paper: #fbfbf9; --card: #fff;
  --accent: #2f6f8f; --error: #b3302b; --warning: #96690a; --good: #2c7a4b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7e9; --soft: #9aa5ad; --line: #333c43; --paper: #14181b; --card: #1c2226; --accent: #7db9d6;
    --error: #ef8a80; --warning: #e0b355; --good: #7fcb9b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.verdict { font-weight: 600; margin: 1rem 0; } .error { color: var(--error); } .warning { color: var(--warning); }
.good { color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .75rem .35rem 0; text-align: start; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .875rem; } .number { text-align: end; }
svg { width: 100%; max-width: 44rem; height: auto; display: block; color: var(--accent); font-size: 11px; }
svg text { fill: currentColor; } .swatch { display: inline-block; width: .7rem; height: .7rem;
  border-radius: .2rem; margin-inline-end: .5rem; }
.share { display: flex; height: 1rem; border-radius: .5rem; overflow: hidden; margin: .5rem 0 1rem; }
details, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem 1rem;
  margin: .6rem 0; }
summary { cursor: pointer; } summary b { font-variant-numeric: tabular-nums; }
ol { padding-inline-start: 1.25rem; margin: .6rem 0 0; } li { margin: .5rem 0; }
.place { font-family: ui-monospace, monospace; font-size: .85rem; color: var(--soft); }
blockquote { margin: .3rem 0; padding-inline-start: .7rem; border-inline-start: 3px solid var(--line);
  white-space: pre-wrap; }
"""

_LABEL_COLOURS = {
    "system": "#8795a1",
    "developer": "#6d8299",
    "user": "#5a7fb0",
    "tool": "#8f78ad",
    "history": "#a3a79b",
    "prompt": "#b9bfc4",
    "analysis": "#c98a3a",
    "commentary": "#b3678c",
    "final": "#4f9a6c",
    "unparsed": "#b3302b",
}


def render_page(report: Report) -> str:
    """The whole page."""
    figures = report.figures
    parts = [
        f"<h1>Data check</h1><p dir='auto'>{_text(report.path)}</p>",
        f"<p class='soft'>Tokens are counted by the tokenizer of {_text(report.tokenizer)}.</p>",
        _verdict(report),
        _table(("", ""), overview_rows(figures), numbers=()),
    ]
    if figures.lengths:
        parts += ["<h2>Tokens per sample</h2>", _histogram(figures.lengths.histogram), *_labels(figures)]
    if figures.languages:
        parts += _languages(figures)
    if figures.tools:
        parts.append("<h2>Tools called</h2>")
        parts.append(_table(("tool", "calls"), list(figures.tools.items())[:TOOLS], numbers=(1,)))
    parts += ["<h2>Findings</h2>", *(_kind(*found) for found in report.log.by_kind())]
    if not report.log.counts:
        parts.append("<p class='good'>Nothing was found.</p>")
    if report.excerpts:
        parts += ["<h2>Samples</h2>", "<p class='soft'>The first that thinks in each language.</p>"]
        parts += map(_excerpt, report.excerpts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Data check: {_text(report.path)}</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


class _Markup(str):
    """HTML of our own, which is not escaped again."""


def _text(text: object) -> str:
    """Data as HTML text or attribute value."""
    return text if isinstance(text, _Markup) else escape(printable(str(text)), quote=True)


def _verdict(report: Report) -> str:
    errors = f"<span class='{'error' if report.errors else 'good'}'>{counted(report.errors, 'error')}</span>"
    warnings = f"<span class='{'warning' if report.warnings else 'good'}'>{counted(report.warnings, 'warning')}</span>"
    return f"<p class='verdict'>{errors} · {warnings}</p>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int]) -> str:
    def cell(tag: str, index: int, value: object) -> str:
        shown = (f"{value:,}" if value else "·") if isinstance(value, int) else value
        kind = " class='number'" if index in numbers else " dir='auto'"
        return f"<{tag}{kind}>{_text(shown)}</{tag}>"

    def line(tag: str, values: Sequence[object]) -> str:
        return f"<tr>{''.join(cell(tag, index, value) for index, value in enumerate(values))}</tr>"

    head = f"<thead>{line('th', headers)}</thead>" if any(headers) else ""
    return f"<div class='scroll'><table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table></div>"


def _histogram(bars: Sequence[Bar]) -> str:
    """Bars as inline SVG; the axis names the first, the middle and the last."""
    width, height, gap = 640, 170, 2
    step = width / len(bars)
    most = max(bar.count for bar in bars)
    drawn = []
    for index, bar in enumerate(bars):
        tall = bar.count / most * (height - 40)
        drawn.append(
            f"<rect x='{index * step:.1f}' y='{height - 20 - tall:.1f}' width='{max(step - gap, 1):.1f}' "
            f"height='{tall:.1f}' rx='1.5' fill='#c88a3a'>"
            f"<title>{bar.low:,} to {bar.high:,} tokens: {bar.count:,}</title></rect>"
        )
    marks = {0: "start", len(bars) // 2: "middle", len(bars) - 1: "end"}
    for index, anchor in marks.items():
        at = index * step + {"start": 0, "middle": step / 2, "end": step - gap}[anchor]
        drawn.append(f"<text x='{at:.1f}' y='{height - 5}' text-anchor='{anchor}'>{_range(bars[index])}</text>")
    drawn.append(f"<text x='0' y='11'>up to {most:,} samples</text>")
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='Tokens per sample'>{''.join(drawn)}</svg>"


def _range(bar: Bar) -> str:
    return f"{bar.low:,}–{bar.high:,}"


def _labels(figures: Figures) -> Iterable[str]:
    total = sum(figures.tokens_by_label.values())
    yield "<h2>Tokens by who wrote them</h2>"
    stretches = (
        f"<span style='width:{tokens / total:.2%};background:{_LABEL_COLOURS[label]}' title='{_text(label)}'></span>"
        for label, tokens in figures.tokens_by_label.items()
    )
    yield f"<div class='share'>{''.join(stretches)}</div>"
    rows = [
        (_swatch(label), tokens, f"{tokens / total:.1%}", "trained" if label in CHANNEL_LABELS else "context")
        for label, tokens in figures.tokens_by_label.items()
    ]
    yield _table(("label", "tokens", "share", ""), rows, numbers=(1, 2))


def _swatch(label: str) -> _Markup:
    return _Markup(f"<span class='swatch' style='background:{_LABEL_COLOURS[label]}'></span>{_text(label)}")


def _languages(figures: Figures) -> Iterable[str]:
    yield "<h2>Languages</h2>"
    rows = [
        (
            row.tag,
            row.name,
            row.native_name,
            row.questions,
            row.declared,
            row.thinking,
            row.answers,
            "" if row.tokens_per_character is None else f"{row.tokens_per_character:.2f}",
        )
        for row in figures.languages
    ]
    headers = ("tag", "language", "", "question", "declared", "thinking", "answer", "tokens per character")
    yield _table(headers, rows, numbers=(3, 4, 5, 6, 7))
    if figures.agreement:
        yield "<h2>Thinking: declared and as it reads</h2>"
        yield _agreement(figures.agreement)


def _agreement(pairs: Sequence[Agreement]) -> str:
    rows = [
        (
            name(pair.declared) if pair.declared else "(nothing declared)",
            "undetermined" if pair.detected == UNDETERMINED else name(pair.detected),
            pair.count,
            "" if pair.declared in (None, pair.detected) or pair.detected == UNDETERMINED else "differs",
        )
        for pair in pairs
    ]
    return _table(("declared", "reads as", "samples", ""), rows, numbers=(2,))


def _kind(kind: Kind, count: int, kept: list[Finding]) -> str:
    items = "".join(map(_finding, kept[:FINDINGS]))
    listed = min(len(kept), FINDINGS)
    more = f"<p class='soft'>The first {listed:,} of {count:,}.</p>" if count > listed else ""
    return (
        f"<details{' open' if kind.severity == 'error' else ''}><summary><span class='{kind.severity}'>"
        f"{kind.severity}</span> {_text(kind.title)}: <b>{count:,}</b></summary>"
        f"<p class='soft'>{_text(kind.remedy)}</p><ol>{items}</ol>{more}</details>"
    )


def _finding(finding: Finding) -> str:
    quoted = f"<blockquote dir='auto'>{_text(finding.excerpt)}</blockquote>" if finding.excerpt else ""
    return f"<li><span class='place'>{_text(finding.place)}</span><br>{_text(finding.message)}{quoted}</li>"


def _excerpt(excerpt: Excerpt) -> str:
    language = CATALOGUE.get(excerpt.language)
    lang = f" lang='{_text(language.tag)}'" if language else ""
    return (
        f"<div class='card'><p><b>{_text(name(excerpt.language))}</b> "
        f"<span class='place'>{_text(excerpt.place)}</span></p>"
        f"<p class='soft'>question</p><blockquote dir='auto'>{_text(excerpt.question)}</blockquote>"
        f"<p class='soft'>thinking</p><blockquote dir='auto'{lang}>{_text(excerpt.thinking)}</blockquote>"
        f"<p class='soft'>answer</p><blockquote dir='auto'>{_text(excerpt.answer)}</blockquote></div>"
    )

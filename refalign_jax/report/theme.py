"""Colours of the page and its figures, light and dark, and the page's style sheet."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """One set of colours; the page takes the one that the reader's system asks for."""

    paper: str
    soft: str
    """Of what lies on the paper: cards, table heads."""
    line: str
    muted: str
    ink: str
    accent: str


LIGHT = Theme(paper="#ffffff", soft="#f5f6f8", line="#d8dde3", muted="#59636e", ink="#1c2127", accent="#0a6c96")
DARK = Theme(paper="#15181c", soft="#1e2227", line="#343a41", muted="#9aa5b1", ink="#e7eaed", accent="#62b6de")

SUBJECT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8b8d98", "#b8a800")
"""After Okabe and Ito, whose colours those with any colour vision tell apart; black is grey, yellow darker."""
SUBJECT_MARKERS = (("o", "●"), ("^", "▲"), ("s", "■"), ("D", "◆"))
"""Matplotlib's sign and the page's; the next for every round through the colours."""


def subject_sign(number: int) -> tuple[str, str, str]:
    """Colour, Matplotlib's marker and the page's character of a subject."""
    rounds, colour = divmod(number, len(SUBJECT_COLOURS))
    return (SUBJECT_COLOURS[colour], *SUBJECT_MARKERS[rounds % len(SUBJECT_MARKERS)])


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}:{value};" for name, value in dataclasses.asdict(theme).items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 56px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 30px 0 10px; }
p { margin: 0 0 12px; max-width: 74ch; }
a { color: var(--accent); }
code { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.lead { font-size: 1.06rem; }
.note, figcaption, footer { color: var(--muted); font-size: 0.88rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 0; font-size: 0.94rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 20px; margin: 22px 0 14px; }
dl div.wide { grid-column: 1 / -1; }
dt { color: var(--muted); font-size: 0.8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--accent); }
.scroll { overflow-x: auto; max-width: 100%; margin: 12px 0 18px; }
pre { margin: 0; padding: 12px 14px; background: var(--soft); border-radius: 8px;
  font-size: 0.8rem; line-height: 1.45; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 300px)), 1fr));
  gap: 18px 22px; margin: 14px 0 18px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 4px; line-height: 1.4; }
.figures figcaption { font-size: 0.92rem; color: var(--ink); margin: 0 0 4px; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0; padding: 0;
  list-style: none; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 500; }
tr.total > * { border-top: 2px solid var(--line); font-weight: 600; }
table.confusion th, table.confusion td { padding: 4px 2px; border: 0; }
table.confusion thead th + th { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; padding: 6px 4px; }
.confusions { display: flex; flex-wrap: wrap; gap: 0 32px; }
.confusions > div { min-width: 0; max-width: 100%; }
table.confusion td { text-align: center; min-width: 28px; border: 1px solid var(--paper); border-radius: 5px;
  background: color-mix(in srgb, var(--accent) calc(var(--share) * 75%), var(--soft)); }
table.confusion td.none { color: transparent; }
.sample { border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; margin: 0 0 14px; }
.sample .prompt { font-weight: 500; margin-bottom: 10px; max-width: none; }
.media { display: flex; flex-wrap: wrap; gap: 12px 16px; align-items: flex-start; }
.media .reference { width: 108px; }
.media .video { width: 208px; }
.media .frames { flex: 1 1 300px; }
.media .frames img + img { margin-top: 6px; }
.media img, .media video { border-radius: 6px; }
.media .reference img { border: 1px solid var(--line); }
video { display: block; width: 100%; height: auto; }
.scores { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; padding: 0; list-style: none;
  font-size: 0.88rem; color: var(--muted); }
.scores b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.outcome { border-left: 4px solid var(--accent); padding: 8px 16px; background: var(--soft); border-radius: 0 8px 8px 0;
  margin: 14px 0 18px; }
.outcome p { margin: 4px 0; max-width: none; }
button { font: inherit; color: var(--accent); background: none; border: 1px solid var(--line); border-radius: 8px;
  padding: 6px 14px; cursor: pointer; }
button:hover { border-color: var(--accent); }
footer { padding-top: 40px; padding-bottom: 48px; }
@media (max-width: 520px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  .sample { padding: 12px; }
  .media .frames { flex-basis: 100%; }
  .media .video { width: calc(50% - 8px); }
  th[scope=row] { white-space: normal; min-width: 9em; }
  table.confusion th[scope=row] { min-width: 0; }
}
@media print { nav, button { display: none; } }
"""
)

"""The shell of a report: style, and a few HTML helpers that escape what they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

COLOURS = 6

_STYLE = """
:root{color-scheme:light dark;--bg:#fafaf8;--surface:#fff;--text:#1f2328;--muted:#667079;--line:#e2e2dd;
--c0:#2f6db3;--c1:#c4602a;--c2:#3b8a5a;--c3:#8656ad;--c4:#98761f;--c5:#54677a;--bad:#b3341f;--badbg:#fbeeea;--notebg:#f4f1e4}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--surface:#1c1f24;--text:#e5e5e1;--muted:#98a0a9;--line:#30353c;
--c0:#7db1ec;--c1:#ea9868;--c2:#7ac698;--c3:#c09ae2;--c4:#d8bc70;--c5:#a7b5c3;--bad:#f08d78;--badbg:#33201c;--notebg:#2a281d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px}h3{font-size:14px;font-weight:600;margin:0}
p{margin:6px 0;max-width:72ch}.muted,figcaption,small{color:var(--muted)}
small{font-size:13px;line-height:1.4;display:inline-block}
.cards{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,316px),1fr))}
.tiles{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,236px),1fr))}
.card{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
.card svg{display:block;width:100%;height:auto;margin-top:6px}
.head{display:flex;justify-content:space-between;gap:10px;align-items:baseline}
.now{font-variant-numeric:tabular-nums;color:var(--muted);font-size:13px;white-space:nowrap}
.big{font-size:24px;font-weight:650;white-space:nowrap;letter-spacing:-.02em;line-height:1.15;font-variant-numeric:tabular-nums}
.legend{font-size:12.5px;color:var(--muted)}.legend i{display:inline-block;width:9px;height:9px;border-radius:5px;
margin:0 5px 0 0}.legend span{margin-right:12px;white-space:nowrap}
svg text{font:10.5px system-ui,sans-serif;fill:var(--muted)}
svg .reft{text-anchor:end;paint-order:stroke;stroke:var(--surface);stroke-width:3px}
svg .grid{stroke:var(--line);stroke-width:1}svg .ref{stroke:var(--muted);stroke-width:1;stroke-dasharray:4 3}
svg polyline{fill:none;stroke-linejoin:round}svg .raw{stroke-width:1;opacity:.26}svg .mean{stroke-width:2}
svg .interval{stroke:var(--c0);stroke-width:3;stroke-linecap:round}svg .dot{fill:var(--c0)}
.alarm,.note{border-left:4px solid var(--c4);background:var(--notebg);border-radius:0 6px 6px 0;padding:8px 12px;
margin:8px 0;max-width:86ch}.alarm{border-color:var(--bad);background:var(--badbg)}.alarm b{color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--muted)}td{overflow-wrap:break-word}
.shots{display:grid;gap:8px;margin-top:8px}a{color:var(--c0)}
figure{margin:0;min-width:0}figcaption{font-size:12px;margin-top:3px}
figure img{display:block;width:100%;border-radius:4px;background:var(--line)}img.small{image-rendering:pixelated}
figure.last img{outline:2px solid var(--c0);outline-offset:1px;cursor:pointer;touch-action:manipulation;
user-select:none}
figure.last figcaption{color:var(--text)}.wide{max-width:100%;border-radius:4px}
.pair{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.texts td{max-width:30ch;padding-right:14px}.texts .said{white-space:pre-wrap;overflow-wrap:anywhere;max-height:14em;
overflow-y:auto;font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}.ws{color:var(--c4)}
.score{font-size:12px;color:var(--muted)}.up{color:var(--c0)}.down{color:var(--c1)}
.block{margin:12px 0}details{margin-top:8px}summary{cursor:pointer}
pre{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
overflow-x:auto;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}
"""

# Holding the last image of a prompt down shows the first one in its place: small changes are easier to see that way.
_SCRIPT = """
document.querySelectorAll('figure.last img').forEach(function(img){
  var after=img.src,base=img.closest('.shots').querySelector('img').src;
  function set(on){return function(){img.src=on?base:after}}
  img.addEventListener('pointerdown',set(true));img.addEventListener('contextmenu',function(e){e.preventDefault()});
  img.addEventListener('dragstart',function(e){e.preventDefault()});
  ['pointerup','pointerleave','pointercancel'].forEach(function(n){img.addEventListener(n,set(false))});
});
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole self-contained document: nothing is fetched, no script is needed to read it."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A section, or an empty string where there is nothing in it."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def missing(what: str) -> str:
    """The one line that stands for a part that is not there."""
    return f'<p class="muted">{escape(what)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; an empty `head` has no header row."""
    top = f"<thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def card(title: str, inner: str, *, now: str = "", legend: Sequence[tuple[str, int]] = ()) -> str:
    """A framed chart or number with its title, the latest value, and a legend of (name, colour index)."""
    names = "".join(f'<span><i style="background:var(--c{c})"></i>{escape(name)}</span>' for name, c in legend)
    return (
        f'<div class="card"><div class="head"><h3>{escape(title)}</h3><span class="now">{escape(now)}</span></div>'
        f"{inner}{f'<div class=legend>{names}</div>' if names else ''}</div>"
    )


def cards(items: Iterable[str], kind: str = "cards") -> str:
    """A grid of cards; "tiles" are smaller and fill their row."""
    inner = "\n".join(item for item in items if item)
    return f'<div class="{kind}">{inner}</div>' if inner else ""


def collapsed(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"

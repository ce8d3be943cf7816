"""The page of `planc explain --html`: one file without scripts that needs no network, light or dark as the reader's system is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from planc.compiler.structure import Group, Part
from planc.runtime.contract import Contract, CostTable

if TYPE_CHECKING:
    from planc.compiler.explain import Step
    from planc.compiler.told import Told

_COLOURS = 6  # of modules and drafters; the next one is for whatever is left
_STYLE = Path(__file__).with_name("page.css")


def page(title: str, steps: Sequence[Step], about: str, contract: Contract | None = None, told: Told | None = None) -> str:
    """The whole page. `contract` adds what was measured of the compiled plan, `told` an answer with who guessed what."""
    first, last = steps[0], steps[-1]
    sections = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>",
        _tiles(first, last),
        "<h2>Passes</h2>\n<p>The graph after every step of the compiler, and what the step changed in it.</p>",
        _table(steps),
        *(_changes(step, before) for before, step in zip(steps, steps[1:], strict=False)),
        _structure(first, last),
        _memory(first, last),
        _cost(contract) if contract is not None else "",
        _answer(told) if told is not None else "",
    ]
    style = _STYLE.read_text(encoding="utf-8")
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        '<link rel="icon" href="data:,">'
    )
    return f'<!doctype html>\n<html lang="en">\n{head}\n<style>\n{style}</style>\n' + "\n".join(filter(None, sections)) + "\n</html>\n"


def _delta(now: float, then: float | None) -> str:
    """How much more or less, as a coloured share."""
    share = f"{now / then - 1:+.1%}".replace("-", "−") if then else ""
    if share in ("", "+0.0%", "−0.0%"):
        return ""
    return f' <small class="{"less" if now < (then or 0) else "more"}">{share}</small>'


# ---- figures of the steps ----------------------------------------------------------------------------------------------------------


def _tiles(first: Step, last: Step) -> str:
    shown = [
        ("nodes", last.nodes, first.nodes, "{:,.0f}", 1.0),
        ("weights, MiB", last.bytes, first.bytes, "{:,.1f}", 2.0**20),
        ("work of a pass, MFLOP", last.flops, first.flops, "{:,.1f}", 1e6),
    ]
    if last.peak is not None:
        shown.append(("peak of activations, MiB", last.peak, first.peak or 0, "{:,.2f}", 2.0**20))
    tiles = (
        f'<div class="tile"><span>{name}</span><b>{form.format(now / unit)}</b>{_delta(now, then)}<span>from {form.format(then / unit)}</span></div>'
        for name, now, then, form, unit in shown
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(steps: Sequence[Step]) -> str:
    peaks = any(step.peak is not None for step in steps)
    names = ["step", "nodes", "parameters", "MiB", "MFLOP", *(["peak MiB"] if peaks else []), "rewritten", "notes"]
    rows = []
    for index, step in enumerate(steps):
        before = steps[index - 1] if index else None
        cells = [
            escape(step.name),
            f"{step.nodes:,}" + _delta(step.nodes, before.nodes if before else None),
            f"{step.parameters / 1e6:.2f} M",
            f"{step.bytes / 2**20:.1f}" + _delta(step.bytes, before.bytes if before else None),
            f"{step.flops / 1e6:.1f}" + _delta(step.flops, before.flops if before else None),
        ]
        if peaks:
            cells.append("" if step.peak is None else f"{step.peak / 2**20:.2f}" + _delta(step.peak, before.peak if before else None))
        cells.append("" if step.matched is None else f"{step.rewritten}/{step.matched}")
        notes = escape("; ".join(step.notes))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="notes">{notes}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _changes(step: Step, before: Step) -> str:
    """Operations that a step added and removed."""
    now, then = Counter(dict(step.kinds)), Counter(dict(before.kinds))
    moved = {name: now[name] - then[name] for name in sorted(now | then) if now[name] != then[name]}
    if not moved:
        return ""
    order = sorted(moved.items(), key=lambda item: (item[1] > 0, -abs(item[1]), item[0]))
    chips = "".join(
        f'<span class="chip">{escape(name)} <b class="{"more" if count > 0 else "less"}">{f"{count:+d}".replace("-", "−")}</b></span>'
        for name, count in order
    )
    gone, new = sum(-count for count in moved.values() if count < 0), sum(count for count in moved.values() if count > 0)
    said = ", ".join(f"{count:,} operations {way}" for count, way in ((gone, "fewer"), (new, "more")) if count)
    summary = f"<summary>{escape(step.name)}<span>{said}</span></summary>"
    return f'<details>{summary}<div class="chips">{chips}</div></details>'


# ---- modules -----------------------------------------------------------------------------------------------------------------------


def _structure(first: Step, last: Step) -> str:
    """The layers before and after, once by bytes and once by operations."""
    names = Counter(
        part.name for step in (first, last) for group in step.groups if len(group.parts) > 1 for part in group.parts if part.name
    )
    weight = Counter[str]()
    for step in (first, last):
        for group in step.groups:
            for part in group.parts:
                if part.name in names:
                    weight[part.name] += part.bytes + part.flops
    colours = {name: f"var(--c{i})" for i, (name, _) in enumerate(weight.most_common(_COLOURS))}
    legend = [*colours.items(), ("other", "var(--c6)")]
    views = (
        ("weights", lambda item: item.bytes, lambda n: f"{n / 2**20:.2f} MiB" if n >= 2**17 else f"{n / 2**10:.1f} KiB"),
        ("work", lambda item: item.flops, lambda n: f"{n / 1e6:.1f} MFLOP"),
    )
    picks = "".join(
        f'<input class="pick" type="radio" name="size" id="size-{i}"{" checked" if not i else ""}><label for="size-{i}">{name}</label>'
        for i, (name, _, _) in enumerate(views)
    )
    shown = "".join(f'<div class="view v{i}">{_bars(first, last, size, text, colours)}</div>' for i, (_, size, text) in enumerate(views))
    about = "Every layer, and every module outside of them, in the order in which they run. Hover for figures; long bars are cut."
    return f"<h2>Structure before and after</h2>\n<p>{about}</p>\n{picks}\n{_legend(legend)}\n{shown}"


def _bars(first: Step, last: Step, size: Callable[[Group | Part], int], text: Callable[[int], str], colours: dict[str, str]) -> str:
    sides = [{group.name: group for group in step.groups} for step in (first, last)]
    rows = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if any(name in side and size(side[name]) for side in sides)]
    sizes = sorted(size(side[name]) for side in sides for name in rows if name in side and size(side[name]))
    if not sizes:
        return ""
    common = _common([name for name in rows if name])
    layers = [size(group) for side in sides for group in side.values() if group.name.rpartition(".")[2].isdigit()]
    most = min(sizes[-1], 1.5 * max(layers, default=0) or sizes[-1])  # an embedding would leave nothing of the layers
    pitch, width = 18, 300
    marks = [f'<text x="190" y="14">{escape(first.name)}</text><text x="600" y="14">{escape(last.name)}</text>']
    for number, name in enumerate(rows):
        y = 24 + pitch * number
        label = name.removeprefix(common) or "outside of modules"
        marks.append(f'<text class="name end" x="178" y="{y + 11}">{escape(label[-26:])}</text>')
        for side, x in zip(sides, (190, 600), strict=True):
            group = side.get(name)
            if group is None:
                marks.append(f'<rect class="gone" x="{x}" y="{y + 1}" width="{width * 0.2:.0f}" height="12" rx="3"/>')
                continue
            marks.append(_bar(group, x, y, width * min(size(group), most) / most, size, text, colours))
            if size(group) > most:
                marks.append(f'<path class="cut" d="M{x + width - 26} {y + 17}l8 -20m6 0l-8 20"/>')
    height = 30 + pitch * len(rows)
    return f'<svg viewBox="0 0 990 {height}" role="img" aria-label="layers before and after">{"".join(marks)}</svg>'


def _bar(
    group: Group, x: int, y: int, width: float, size: Callable[[Group | Part], int], text: Callable[[int], str], colours: dict[str, str]
) -> str:
    total, marks, at = max(1, size(group)), list[str](), float(x)
    for part in group.parts:
        share = width * size(part) / total
        title = f"{group.name} {part.name if part.name != group.name else ''}: {text(size(part))}, {part.calls} operations"
        if share:
            marks.append(
                f'<rect x="{at:.1f}" y="{y}" width="{max(share - 0.7, 0.3):.1f}" height="14" fill="{colours.get(part.name, "var(--c6)")}">'
                f"<title>{escape(title)}</title></rect>"
            )
        at += share
    return "".join(marks) + f'<text x="{x + width + 6:.1f}" y="{y + 11}">{text(size(group)) if size(group) else "none"}</text>'


def _common(names: Sequence[str]) -> str:
    """The module path that all names begin with, such as `model.`."""
    parts = [name.split(".")[:-1] for name in names]
    shared = list[str]()
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    return (
        '<div class="legend">'
        + "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
        + "</div>"
    )


# ---- memory ------------------------------------------------------------------------------------------------------------------------


def _memory(first: Step, last: Step) -> str:
    """Live activations over a pass, before and after; nothing for a model that reads text."""
    if not first.live or not last.live:
        return ""
    most = max(first.peak or 0, last.peak or 0, 1)
    left, wide, high = 60, 910, 240
    step = _tick(most / 2**20)
    marks = []
    for i in range(int(most / 2**20 / step) + 1):
        y = 10 + high - high * i * step * 2**20 / most
        marks.append(f'<line class="grid" x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="end" x="{left - 8}" y="{y + 4:.1f}">{i * step:g}</text>')
    for shown, colour, opacity in ((first, "var(--before)", 0.55), (last, "var(--accent)", 0.75)):
        across, points, over = wide / len(shown.live), [f"{left},{10 + high}"], list[str]()
        for i, (name, size) in enumerate(shown.live):
            y, x = 10 + high - high * size / most, left + i * across
            points += [f"{x:.1f},{y:.1f}", f"{x + across:.1f},{y:.1f}"]
            over.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{across:.2f}" height="{10 + high - y:.1f}" fill="transparent">'
                f"<title>{escape(f'{shown.name}, {name}: {size / 2**20:.3f} MiB')}</title></rect>"
            )
        marks.append(
            f'<polygon points="{" ".join([*points, f"{left + wide},{10 + high}"])}" fill="{colour}" opacity="{opacity}"/>{"".join(over)}'
        )
    marks.append(f'<text x="{left}" y="{high + 28}">first operation</text><text class="end" x="{left + wide}" y="{high + 28}">last</text>')
    entries = [
        (f"{shown.name}: at most {(shown.peak or 0) / 2**20:.2f} MiB in {len(shown.live)} operations", colour)
        for shown, colour in ((first, "var(--before)"), (last, "var(--accent)"))
    ]
    about = "MiB of activations that are live while each operation runs, for one image; weights and the image itself are not counted."
    chart = f'<svg viewBox="0 0 990 {high + 36}" role="img" aria-label="live activations">{"".join(marks)}</svg>'
    return f"<h2>Memory over a pass</h2>\n<p>{about}</p>\n{_legend(entries)}\n{chart}"


def _tick(most: float) -> float:
    """A round distance that divides an axis into at most six."""
    return next(step * 10.0**power for power in range(-9, 12) for step in (1, 2, 5) if most <= 6 * step * 10.0**power)


# ---- what was measured ---------------------------------------------------------------------------------------------------------------


def _cost(contract: Contract) -> str:
    if contract.cost is None:
        return ""
    hardware = contract.hardware
    where = f"Measured on {hardware.get('cpu', 'an unknown processor')}, {hardware.get('usable_cores', '?')} cores." if hardware else ""
    exact = f" Exactness: {contract.exactness.line()}." if contract.exactness is not None else ""
    about = f"Milliseconds of a pass, by the rows that go through it and the tokens that are cached. {where}{exact}"
    return f"<h2>Cost of a pass</h2>\n<p>{escape(about)}</p>\n{_heat(contract.cost)}"


def _heat(cost: CostTable) -> str:
    flat = [ms for plane in cost.measured for line in plane for ms in line]
    low, high = min(flat), max(flat)
    rows = []
    for size, plane in zip(cost.batch, cost.measured, strict=True):
        if len(cost.batch) > 1:
            rows.append(f'<tr><th colspan="{len(cost.rows) + 1}">batch {size}</th></tr>')
        for past, line in zip(cost.past, plane, strict=True):
            cells = "".join(
                f'<td style="background:color-mix(in oklab, var(--accent) {8 + 52 * (ms - low) / max(high - low, 1e-9):.0f}%, var(--ground))" '
                f'title="{ms / count / size:.2f} ms a row">{ms:.3g}</td>'
                for count, ms in zip(cost.rows, line, strict=True)
            )
            rows.append(f"<tr><th>{past:,}</th>{cells}</tr>")
    head = "".join(f"<th>{count}</th>" for count in cost.rows)
    return f'<div class="scroll"><table class="heat">\n<tr><th>cached \\ rows</th>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


# ---- an answer ---------------------------------------------------------------------------------------------------------------------


def _answer(told: Told) -> str:
    """Tokens in the colour of the drafter that guessed them, and a column for every pass."""
    colours = {name: f"var(--c{min(i, _COLOURS)})" for i, name in enumerate(told.drafters)}
    spans = []
    for piece in told.pieces:
        text = escape(piece.text)
        if piece.drafters and text:
            title = f"{', '.join(piece.drafters)}, in pass {piece.turn}"
            tint = f"color-mix(in oklab, {colours[piece.drafters[0]]} 26%, transparent)"
            line = f";text-decoration:underline {colours[piece.drafters[-1]]} 2px" if len(piece.drafters) > 1 else ""
            text = f'<span class="by" style="background:{tint}{line}" title="{escape(title)}">{text}</span>'
        spans.append(text)
    tally = [
        (f"{name}: {told.accepted.get(name, 0)} of {told.drafted.get(name, 0)} guesses accepted", colour)
        for name, colour in colours.items()
    ]
    prompt = f'<span class="prompt">{escape(told.prompt)}</span>'
    about = f"{told.tokens} tokens in {len(told.turns)} passes. " + (
        "Coloured tokens were guessed and only checked by the model; the rest is its own. Underlined: several drafters guessed it."
        if told.drafters
        else "The plan drafts nothing, so every token took a pass."
    )
    answer = f'<div class="answer">{prompt}{"".join(spans)}</div>'
    return (
        f"<h2>Where the tokens came from</h2>\n<p>{escape(about)}</p>\n{_legend(tally)}\n{answer}\n{_passes(told) if told.drafters else ''}"
    )


def _passes(told: Told) -> str:
    """For every pass how much was guessed, and how much of it accepted."""
    most = max((drafted for drafted, _ in told.turns), default=0)
    if not most:
        return ""
    wide, high = 910 / max(len(told.turns), 1), 70
    columns = []
    for i, (drafted, kept) in enumerate(told.turns):
        x = 60 + i * wide
        for count, colour in ((drafted, "var(--line)"), (kept, "var(--accent)")):
            columns.append(
                f'<rect x="{x:.1f}" y="{10 + high - high * count / most:.1f}" width="{max(wide - 1, 0.5):.1f}" height="{high * count / most:.1f}" '
                f'fill="{colour}"><title>pass {i + 1}: {kept} of {drafted} guesses accepted</title></rect>'
            )
    texts = (("end", 52, 18, most), ("end", 52, high + 12, 0), ("start", 60, high + 28, "first pass"))
    axis = "".join(f'<text class="{place}" x="{x}" y="{y}">{text}</text>' for place, x, y, text in texts)
    entries = _legend([("guesses that a pass checked", "var(--line)"), ("of them accepted", "var(--accent)")])
    return f'{entries}<svg viewBox="0 0 990 {high + 34}" role="img" aria-label="guesses by pass">{axis}{"".join(columns)}</svg>'

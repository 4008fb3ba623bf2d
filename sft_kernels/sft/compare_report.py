"""A comparison as a table, as a picture and as JSON."""

import json

from .._terminal import reason_of
from .jsonl import finite
from .progress import say, warn

_FEW = 20  # steps that are marked
_OURS_COLOUR, _PADDED_COLOUR, _PLAIN_COLOUR = "tab:blue", "tab:cyan", "tab:orange"


def report(found, folder):
    """Print the table of a :class:`~.compare.Comparison`; write ``compare.json`` and ``compare.png`` into ``folder``.

    A picture that cannot be drawn costs a warning.
    """
    for line in table(found):
        say(line)
    (folder / "compare.json").write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    made = "logs and numbers"
    try:
        draw(found, folder / "compare.png")
        made = "logs, numbers and curves"
    except Exception as error:  # matplotlib and its back ends raise all kinds
        warn(f"compare.png could not be drawn ({reason_of(error)})")
    say(f"\n{made} are in {folder}")


def table(found):
    """The lines that tell the ways side by side, and what follows from them."""
    ways = list(found.ways.values())
    rows = (
        ("steps", "{}", [len(way.seconds) for way in ways]),
        ("milliseconds a step", "{:.1f}", [_thousandfold(way.step_seconds) for way in ways]),
        ("kept tokens a second", "{:.0f}", [way.rate() for way in ways]),
        ("peak memory, MB", "{:.0f}", [_megabytes(way) for way in ways]),
        ("padding", "{:.1%}", [way.padding_share for way in ways]),
        ("loss of the first step", "{:.6f}", [(way.losses or [None])[0] for way in ways]),
        ("loss of the last step", "{:.6f}", [(way.losses or [None])[-1] for way in ways]),
        ("loss on held-out data", "{:.6f}", [way.held_out for way in ways]),
    )
    lines = ["\n" + " " * 24 + "".join(f"{way.name:>16}" for way in ways)]
    for name, form, values in rows:
        if any(value is not None for value in values):
            lines.append(f"{name:<24}" + "".join(f"{_cell(form, value):>16}" for value in values))
    lines += [f"{way.name}: {way.failed}" for way in ways if way.failed]
    lines += [
        "\nkept tokens a second, medians over steps:",
        f"  packed against padded   {_cell('{:.2f} ×', found.packing)}   with our kernels, over the first steps",
        f"  ours against plain      {_cell('{:.2f} ×', found.fused)}   packed and fused",
        f"the trainer's own overhead: {_cell('{:.1%}', ways[0].overhead)} of a step, all but forward, backward, update",
    ]
    return [*lines, *_parting(found)]


def as_json(found):
    """The whole comparison as JSON can carry it; numbers that are not finite are ``None``."""
    ways = {}
    for name, way in found.ways.items():
        ways[name] = way._asdict() | {"overhead": way.overhead, "padding_share": way.padding_share}
    return finite(
        {
            "ways": ways,
            "packed_against_padded": found.packing,
            "ours_against_plain": found.fused,
            "losses_apart": found.losses_apart,
            "norms_apart": found.norms_apart,
            "most_apart": found.most_apart,
            "parts_at": found.parts_at,
            "parameters_apart": found.parameters_apart,
        }
    )


def draw(found, file):
    """Losses of both ways, how far they are apart, and the bars of speed and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, padded, plain = found.ways.values()
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["loss", "loss", "rate"], ["apart", "apart", "memory"]], height_ratios=(3, 2))
    loss, apart = panels["loss"], panels["apart"]
    for way, look in (
        (ours, {"color": _OURS_COLOUR, "linewidth": 3, "alpha": 0.5}),
        (plain, {"color": _PLAIN_COLOUR, "linewidth": 1}),
    ):
        _line(loss, way.losses, label=way.name, **look)
    loss.set_ylabel("masked loss, nats a token")
    loss.legend()
    if found.losses_apart:
        for name, numbers, colour in (
            ("loss", found.losses_apart, "tab:gray"),
            ("gradient norm", found.norms_apart, "tab:olive"),
        ):
            _line(apart, [max(d, 1e-9) for d in numbers], color=colour, linewidth=1, label=name)
        apart.set_yscale("log")
        apart.axhline(found.most_apart, color="tab:red", linestyle=":", label="bound")
        apart.legend()
    apart.set_ylabel("relative difference")
    apart.set_xlabel("optimiser step")
    colours = (_OURS_COLOUR, _PADDED_COLOUR, _PLAIN_COLOUR)
    for panel, title, numbers in (
        (panels["rate"], "kept tokens a second", [w.rate() or 0 for w in (ours, padded, plain)]),
        (panels["memory"], "peak memory, MB", [_megabytes(w) or 0 for w in (ours, padded, plain)]),
    ):
        bars = panel.barh([w.name for w in (ours, padded, plain)], numbers, color=colours)
        panel.bar_label(bars, fmt="{:,.0f}", padding=3)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (loss, apart):
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", integer=True)
    figure.savefig(file, format="png", dpi=120)


def _line(panel, numbers, **look):
    """A line over the steps; few steps are marked, for a single one is no line."""
    panel.plot(range(1, len(numbers) + 1), numbers, marker="o" if len(numbers) <= _FEW else None, markersize=3, **look)


def _parting(found):
    if not found.losses_apart:
        return []
    bound, step = f"the bound is {found.most_apart:.1%}", found.parts_at
    if step is None:
        loss, norm = max(found.losses_apart), max(found.norms_apart)
        lines = [f"losses do not part: at most {loss:.1e} apart, their gradients' norms {norm:.1e} ({bound})"]
    else:
        loss, norm = found.losses_apart[step - 1], found.norms_apart[step - 1]
        lines = [f"losses part in step {step}: {loss:.1e} apart, their gradients' norms {norm:.1e} ({bound})"]
    if found.parameters_apart is not None:
        lines.append(f"the last weights are {found.parameters_apart:.1e} apart, relative to how far they went")
    return lines


def _cell(form, value):
    return "–" if value is None else form.format(value)


def _thousandfold(seconds):
    return None if seconds is None else 1e3 * seconds


def _megabytes(way):
    return None if way.peak_bytes is None else way.peak_bytes / 1e6

"""The drawings of the page that ``inspect`` writes.

SVG stretches to its place. Its words are HTML beside it, so they stay readable on a narrow screen.
"""

_MOST_LINES = 64  # that are drawn of a step


def curve(schedule):
    """The learning rate over the steps, the first and the last step marked."""
    first, last = schedule.points[0], schedule.points[-1]
    top = max(rate for _, rate in schedule.points) or 1.0

    def x(step):
        return 100 * (step - 1) / max(1, schedule.total - 1)

    def y(rate):
        return 100 * (1 - rate / top)

    line = "L".join(f"{x(step):.3f} {y(rate):.3f}" for step, rate in schedule.points)
    dots = "".join(f"M{x(step):.3f} {y(rate):.3f}h0" for step, rate in (first, last))
    guides = [f"M0 {y(schedule.floor):.3f}h100"]
    late = x(schedule.warmup) > 50
    notes = [
        (f"{'left' if late else 'right'}:0;top:0", f"peak {schedule.peak:.3g}"),
        (f"left:30%;bottom:{101 - y(schedule.floor):.3f}%", f"floor {schedule.floor:.3g}"),
    ]
    if schedule.warmup:
        at = x(schedule.warmup)
        guides.append(f"M{at:.3f} 0v100")
        place = f"right:{100 - at:.3f}%" if late else f"left:{at:.3f}%"
        notes.append((f"{place};bottom:25%", f"warm-up ends with step {schedule.warmup:,}"))
    notes = "".join(f'<span class="at" style="{place}">{words}</span>' for place, words in notes)
    text = (
        f"The learning rate begins at {first[1]:.2e}, is {schedule.peak:.2e} after "
        f"{schedule.warmup:,} steps of warm-up, and falls to {last[1]:.2e} in step {schedule.total:,}."
    )
    return (
        '<figure class="curve"><div class="plot">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">'
        f'<title>{text}</title><path class="guide" d="{"".join(guides)}"/>'
        f'<path class="rate" d="M{line}"/>'
        f'<path class="dot" d="{dots}"/></svg>{notes}</div>'
        f'<p class="ends"><span>step 1<br>{first[1]:.3g}</span>'
        f"<span>step {schedule.total:,}<br>{last[1]:.3g}</span></p></figure>"
    )


def padded(step):
    """The examples of the first step, one a line, filled up to the longest of the micro-batch."""
    batches = [([[length] for length in lengths], max(lengths)) for lengths in step.lines]
    return _figure(batches, "an example")


def packed(step):
    """The packed rows of the first step, filled up to their length."""
    return _figure([(rows, step.row_tokens) for rows in step.micro_batches], "a row")


def _figure(batches, line):
    """Lines of lengths that lie end to end, each micro-batch filled up to a width of its own."""
    count = sum(len(lines) for lines, _ in batches)
    widest = max(width for _, width in batches)
    height = min(2.2, max(0.6, 10 / count))  # rem
    drawn, room = [], _MOST_LINES
    for lines, width in batches:
        if room > 0:
            drawn.append(_batch(lines[:room], width, widest, height))
        room -= len(lines)
    more = f'<p class="small soft">{-room:,} more lines are not drawn.</p>' if room < 0 else ""
    ends = f'<p class="ends"><span>0</span><span>{widest:,} positions {line}</span></p>'
    return f"<figure>{''.join(drawn)}{ends}{more}</figure>"


def _batch(lines, width, widest, height):
    """The examples of a line are of two tones in turn; padding is dashed."""
    tones, padding = ([], []), []
    for i, lengths in enumerate(lines):
        at = 0
        for number, length in enumerate(lengths):
            tones[number % 2].append(f"M{at} {i + 0.5}h{length}")
            at += length
        if at < width:
            padding.append(f"M{at} {i + 0.5}h{width - at}")
    thick = f' style="stroke-width:{0.72 * height:.3f}rem"'
    paths = (("first", thick, tones[0]), ("second", thick, tones[1]), ("padding", "", padding))
    drawn = "".join(f'<path class="{name}"{style} d="{"".join(d)}"/>' for name, style, d in paths if d)
    return (
        f'<div class="rows" style="width:{width / widest:.3%};height:{height * len(lines):.3f}rem">'
        f'<svg viewBox="0 0 {width} {len(lines)}" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}</svg></div>"
    )

"""Census: ``patch(model)`` on a small model of every class of transformers that predicts tokens.

``python -m bench.census [--out FILE] [--only NAME …] [--jobs N]``. Each model has random weights and runs on the CPU in
fp32, in training, without dropout: loss and gradients as transformers computes them, then again after
``sft_kernels.integrations.patch``. A class has a process of its own, so a crash or a hang is one row of the page. The
exit status is 1 if a patched model differs or fails, 2 for a wrong call.
"""

import argparse
import collections
import logging
import multiprocessing
import sys
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers

from . import census_models
from .census_compare import RUNS, TOLERANCE, Row, examine, first_line
from .facts import code_state, publish, versions

TIME_LIMIT = 90  # seconds for one class


def rows(names, examine=examine, *, jobs=2, time_limit=TIME_LIMIT):
    """Yields a :class:`Row` for each name as it comes, from a process for each, ``jobs`` at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.census_compare"])
    waiting, running = list(reversed(names)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(examine, name, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (name, process, time.monotonic() + time_limit)
            deadline = min(deadline for *_, deadline in running.values())
            ready = wait(list(running), timeout=max(0, deadline - time.monotonic()))
            for receiver in ready or [r for r, (*_, end) in running.items() if end <= time.monotonic()]:
                name, process, _ = running.pop(receiver)
                yield _received(name, process, receiver if ready else None, time_limit)
                receiver.close()
    finally:
        for _, process, _ in running.values():
            process.kill()


def _received(name, process, receiver, time_limit):
    """The row that a child sent, or one that says how the child ended."""
    try:
        row = receiver.recv() if receiver else Row(name, "failed", reason=f"stopped after {time_limit:g} s")
    except EOFError:
        process.join()
        row = Row(name, "failed", reason=f"the process ended with status {process.exitcode}")
    process.kill()
    process.join()
    return row


def _child(examine, name, sender):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        row = examine(name)
    except Exception as error:
        row = Row(name, "failed", "DIFFERENT", reason=first_line(error))
    sender.send(row)


def summary(rows):
    """The counts of ``rows`` in one line."""
    verdicts = collections.Counter(row.verdict for row in rows)
    agrees = collections.Counter(row.agrees for row in rows if row.agrees)
    built, runs = len(rows) - verdicts["not built"], sum(verdicts[verdict] for verdict in RUNS)
    parts = [f"{len(rows)} classes", f"{built} built", f"{runs} with a stock loss"]
    parts += [f"{verdicts[verdict]} {verdict}" for verdict in RUNS if verdicts[verdict] or verdict != "failed"]
    parts += [f"{agrees[answer]} {answer}" for answer in ("equal", "stock varies", "DIFFERENT")]
    share = f" ({verdicts['fused'] / runs:.1%} of the stock losses)" if runs else ""
    return ", ".join(parts).replace(f"{verdicts['fused']} fused", f"{verdicts['fused']} fused{share}")


def page(rows):
    """The census as Markdown."""
    rows = sorted(rows, key=lambda row: row.name.lower())
    commit, changed = code_state()
    found = versions()
    code = f"commit {(commit or 'unknown')[:12]}{' with changes' if changed else ''}, torch {found['torch']}"
    lines = [
        f"# Census of transformers {found['transformers']}",
        "",
        f"{summary(rows)}.",
        "",
        f"Written by `python -m bench.census` at {code}, CPU, fp32.",
        f"Small random models, two rows of {census_models.TOKENS} tokens, dropout off.",
        f"Equal: the loss and each gradient within {TOLERANCE:g} of its norm, or of a thousandth of the norm of all.",
        "Fused: only the loss was computed. Materialised: an operation, which the note names, needed all logits.",
        "",
    ]
    measured = [row for row in rows if row.verdict in RUNS]
    errors = [row.error for row in measured if row.agrees == "equal"]
    if errors:
        lines += [f"The largest error among the equal ones is {max(errors):.1e}.", ""]
    lines += ["| class | batch | verdict | loss and gradients | error | note |", "|---|---|---|---|---|---|"]
    for row in measured:
        error = "" if row.error is None else f"{row.error:.0e}"
        lines.append(f"| {row.name} | {row.batch} | {row.verdict} | {row.agrees} | {error} | {cell(row.reason)} |")
    for verdict, title in (("no loss", "Built, but the stock loss does not run"), ("not built", "Not built")):
        chosen = [row for row in rows if row.verdict == verdict]
        if chosen:
            lines += ["", f"## {title}", "", "| class | reason |", "|---|---|"]
            lines += [f"| {row.name} | {cell(row.reason)} |" for row in chosen]
    return "\n".join(lines) + "\n"


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def arguments(argv, prog, doc, names):
    """Parses the command line of a census of ``names``."""
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: in bench/results, of all classes)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes; the page is printed without --out")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (2)")
    parsed = parser.parse_args(argv)
    unknown = sorted(set(parsed.only or ()) - set(names))
    if unknown:
        parser.error(f"--only: not among the classes of transformers that predict tokens: {', '.join(unknown)}")
    if parsed.jobs < 1:
        parser.error("--jobs: expected at least 1")
    return parsed


def report(parsed, names, stem, examine, page, summary):
    """Examines the cases, writes the page, or prints it if only some were asked for; returns the rows."""
    code_state()
    found = []
    for row in rows(parsed.only or names, examine, jobs=parsed.jobs):
        found.append(row)
        print(row.name, row.verdict, row.agrees, row.reason, file=sys.stderr, flush=True)
    publish(parsed, f"{stem}_{transformers.__version__}.md", page(found))
    print(summary(found), file=sys.stderr)
    return found


def main(argv=None):
    names = census_models.names()
    parsed = arguments(argv, "python -m bench.census", __doc__, names)
    found = report(parsed, names, "census_transformers", examine, page, summary)
    return int(any(row.agrees == "DIFFERENT" or row.verdict == "failed" for row in found))


if __name__ == "__main__":
    sys.exit(main())

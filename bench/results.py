"""What a run leaves: one JSON file an op with everything needed to judge it, its table and its plot."""

import datetime
import json
import platform
import re
import sys
from pathlib import Path

import torch

from .facts import code_state, first_line, replace, versions
from .timing import spread


def device_facts(device):
    """What the machine calls itself."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": first_line(query),
            "cuda": torch.version.cuda,
        }
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"name": name, "threads": torch.get_num_threads(), "system": platform.system()}


def file_name(op, device, tiny=False):
    """``<op>_<device>_<torch version>_<yyyymmdd>.json``; a rehearsal's says that it is none of that."""
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    release = torch.__version__.split("+")[0]
    parts = [op, name, release, f"{datetime.datetime.now(datetime.UTC):%Y%m%d}"]
    return "_".join([*parts, *(["rehearsal"] if tiny else [])]) + ".json"


class Results:
    """One op's file, rewritten after every cell so that a run that is cut off keeps what it had measured."""

    def __init__(self, suite, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / file_name(suite.op, suite.device, suite.tiny)
        count = 1
        while self.path.exists():  # an earlier run of the same day stays
            count += 1
            self.path = self.path.with_stem(f"{file_name(suite.op, suite.device, suite.tiny)[:-5]}_{count}")
        self.document = {
            "op": suite.op,
            "sample": suite.passes,
            "rehearsal": suite.tiny,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": code_state()[0],
            "uncommitted_changes": code_state()[1],
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "device": {"type": suite.device.type, **device_facts(suite.device)},
            "versions": versions(),
            "cells": [],
        }

    def add(self, cell):
        self.document["cells"].append(cell)
        replace(self.path, json.dumps(self.document, indent=1) + "\n")


def table(document):
    """The rows that were measured, as text; who is absent and why stands below, once."""
    device, versions = document["device"], document["versions"]
    threads = f", threads {device['threads']}" if "threads" in device else ""
    lines = [f"{document['op']}, {document['sample']}, on {device['name']}{threads}, torch {versions['torch']}"]
    if document["rehearsal"]:
        lines.append("A rehearsal with tiny shapes: no figure.")
    elif device["type"] == "cpu":
        lines.append("Shapes and sweep are thinned for the CPU.")
    gpu = device["type"] == "cuda"
    head = f"{'':<52}{'device ms' if gpu else 'median ms':>11}{'quartiles':>18}"
    head += f"{'as called':>11}{'host':>9}" if gpu else ""
    head += f"{'ours is':>9}{'of floor':>10}{'extra MB':>10}  right"
    absent = {}
    for cell in document["cells"]:
        rows, floor = cell["rows"], cell["floor_seconds"]
        ours = spread(of_device(rows["ours"]))[0] if "seconds" in rows.get("ours", {}) else None
        shape = ", ".join(f"{key} {value}" for key, value in cell["parameters"].items() if key in "NDVTdtype")
        lines += ["", f"{cell['cell']} ({shape})", head, f"{'floor':<52}{floor * 1e3:>11.3f}  {cell['floor']}"]
        for name, row in rows.items():
            if "seconds" not in row:
                absent.setdefault((name, row.get("absent") or f"raised {row['raised']}"), []).append(cell["cell"])
                continue
            middle, low, high = spread(of_device(row))
            ratio = f"{middle / ours:.2f}×" if ours else ""
            peak = "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.0f}"
            version = f", {row['version']}" if row.get("version") else ""
            right = "yes" if row["error"] <= 1 else f"OFF: {row['error']:.3g} × the error budget"
            host = "".join(
                f"{spread(row[key])[0] * 1e3:>{width}.3f}" if key in row else " " * width
                for key, width in (("seconds", 11), ("host_seconds", 9))
            )
            lines.append(
                f"{name:<52}{middle * 1e3:>11.3f}{f'{low * 1e3:.2f}–{high * 1e3:.2f}':>18}{host if gpu else ''}"
                f"{ratio:>9}{floor / middle:>10.1%}{peak:>10}  {right}{version}"
            )
        if clock := (cell.get("gpu") or {}).get("sm_mhz"):
            slowed = cell["gpu"]["slowed_by"]
            lines.append(
                f"SM clock {clock[0]:.0f}–{clock[2]:.0f} MHz{', slowed by ' if slowed else ''}{', '.join(slowed)}"
            )
    if absent:
        lines.append("")
    for (name, why), cells in absent.items():
        where = "" if len(cells) == len(document["cells"]) else f" in {', '.join(cells)}"
        lines.append(f"not measured{where}: {name}: {why}")
    return "\n".join(lines)


def of_device(row):
    """Returns the samples that say how long the device works: behind a filled queue where they were taken."""
    return row.get("queued_seconds") or row["seconds"]


def plot(document, path):
    """Share of the floor and ratio to ours: against the kept share where cells have one, else a bar a cell."""
    from matplotlib.figure import Figure

    cells = document["cells"]
    swept = all("kept" in cell["parameters"] for cell in cells)
    if swept:  # one line needs one kind of mask and of logits
        cells = [c for c in cells if (c["parameters"]["pattern"], c["parameters"]["logits"]) == ("prompt", "uniform")]
        shape = cells[0]["parameters"] if cells else {}
        cells = [c for c in cells if all(c["parameters"].get(key) == shape.get(key) for key in "NDV")]
    cells = [cell for cell in cells if "seconds" in cell["rows"].get("ours", {})]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    share, ratio = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for cell in cells for name, row in cell["rows"].items() if "seconds" in row))
    for i, name in enumerate(names):
        points = [
            (
                at,
                spread(of_device(cell["rows"][name]))[0],
                cell["floor_seconds"],
                spread(of_device(cell["rows"]["ours"]))[0],
            )
            for at, cell in enumerate(cells)
            if "seconds" in cell["rows"][name]
        ]
        shares = [100 * floor / middle for _, middle, floor, _ in points]
        ratios = [middle / ours for _, middle, _, ours in points]
        if swept:
            kept = [100 * cells[at]["parameters"]["kept"] for at, *_ in points]
            share.plot(kept, shares, "o-", label=name)
            ratio.plot(kept, ratios, "o-", label=name)
        else:
            width = 0.8 / len(names)
            at = [at + (i - (len(names) - 1) / 2) * width for at, *_ in points]
            share.bar(at, shares, width, label=name)
            ratio.bar(at, ratios, width, label=name)
    for axes, title in ((share, "share of the floor, %"), (ratio, "time over ours")):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if swept:
            axes.set_xlabel("kept tokens, %")
            axes.set_xscale("log")
            axes.set_xticks(ticks := [5, 20, 35, 50, 100], [str(tick) for tick in ticks])
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(cells)), [cell["cell"].replace(", ", "\n") for cell in cells], fontsize=7)
    if swept:
        ratio.set_yscale("log")
        ratio.yaxis.set_major_formatter("{x:g}")
    share.set_ylim(bottom=0)
    figure.legend(*share.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{document['op']}, {document['device']['name']}, torch {document['versions']['torch']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path

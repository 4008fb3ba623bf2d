"""What a compiled kernel asks of the machine, read off its cubin, and whether that is what its table grants.

Nothing here needs a GPU. ``cuobjdump`` is the one in triton's wheel.
"""

import re
import subprocess
from collections import deque
from functools import cache
from pathlib import Path
from typing import NamedTuple

_WIDTH = re.compile(r"\.(?:[USF]?(8|16)|(64|128))\b")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "QGMMA")


class SM(NamedTuple):
    """One streaming multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    shared: int  # bytes of shared memory, of which each CTA takes 1 KB beside its own
    shared_cta: int  # bytes, the most that one CTA may have
    registers: int = 65536
    warps: int = 64
    ctas: int = 32


SMS = {80: SM(164 << 10, 163 << 10), 90: SM(228 << 10, 227 << 10)}


class Loop(NamedTuple):
    """An innermost loop that loads from global memory."""

    instructions: int  # of one turn, as the compiler unrolled it
    loaded: int  # bytes that a thread loads in one turn
    in_flight: int  # bytes that an SM has asked of memory when every thread waits at the loop's busiest place


class Facts(NamedTuple):
    """One kernel on one architecture."""

    arch: int
    warps: int  # of a CTA
    registers: int  # of a thread
    shared: int  # bytes of a CTA
    stack: int  # bytes of a thread: what is spilled, and arrays that are indexed
    local: int  # loads and stores of local memory
    loads: dict  # bits → how many loads of global memory in loops, or anywhere where there is no loop
    stores: dict  # the same of stores
    fp64: int  # instructions on fp64 and to or from it, the fewest that a thread executes if it loads 128 bits anywhere
    mixed: tuple  # of each innermost loop with accesses of 128 bits, how many narrower ones it has; in order, each once
    tensor_core: dict  # instruction → how many in loops
    ctas: int  # that fit an SM at a time
    in_flight: int  # bytes that an SM has asked of memory when every thread waits at the busiest place of its loops
    loops: tuple = ()  # of Loop, as they lie in the code
    element: int | None = None  # bytes of an element, if all loops load elements of one array alone

    @property
    def resident_warps(self):
        return self.ctas * self.warps

    @property
    def instructions(self):
        """Instructions that a thread runs for one element, over all loops; None where elements cannot be counted."""
        if self.element is None or not self.loops:
            return None
        return sum(loop.instructions * self.element / loop.loaded for loop in self.loops)


class Need(NamedTuple):
    """The budget of one kernel; None is not judged. A number holds for all architectures, a dict says one for each."""

    registers: object = None  # a thread's, at most
    shared: object = None  # bytes of a CTA, at most; never over what the architecture has
    stack: object = 0  # bytes of a thread, at most
    width: object = 128  # bits of the widest load in loops
    narrow: object = 0  # loads and stores in loops that are narrower, at most
    fp64: object = None  # :attr:`Facts.fp64`, at most
    mixed: object = None  # :attr:`Facts.mixed`, exactly
    stores: bool = True  # whether stores are judged by width as loads are
    warps: object = None  # resident on an SM, at least
    in_flight: object = None  # bytes, at least, in the busiest loop
    each_in_flight: object = None  # bytes, at least, in every loop that loads
    element: int | None = None  # bytes of an element, if all loops load elements of one array alone
    instructions: object = None  # for one element, over all loops that load, at most
    tensor_core: object = None  # instruction in the inner loop, such as "HMMA"


def facts(cubin, arch, warps, shared=None, element=None):
    """:class:`Facts` of the one kernel in the file ``cubin``; ``shared`` is what the launch asks for, if that is
    known."""
    usage, sass = (_cuobjdump(option, cubin) for option in ("--dump-resource-usage", "--dump-sass"))
    return facts_of(usage, sass, arch, warps, shared, element)


def kernels(library, name):
    """``{mangled name: (usage, disassembly)}`` of the code for architecture ``name``, such as "sm_90a", in
    ``library``."""
    usage, sass = (_cuobjdump(option, library, "-arch", name) for option in ("--dump-resource-usage", "--dump-sass"))
    found = dict(re.findall(r"^\s*Function (\w+):\n(.*)$", usage, re.M))
    code = dict(re.findall(r"^\s*Function : (\w+)\n(.*?)(?=^\s*Function :|\Z)", sass, re.M | re.S))
    return {kernel: (found[kernel], code[kernel]) for kernel in found if kernel in code}


def facts_of(usage, sass, arch, warps, shared=None, element=None):
    """:class:`Facts` of one kernel from what ``cuobjdump`` says of it."""
    registers, stack, static = map(int, _RESOURCES.search(usage).groups())
    shared = static if shared is None else shared
    code = instructions(sass)
    loops = [(int(m, 16), at) for at, name, rest in code if name.startswith("BRA") for m in _targets(rest)]
    loops = [(start, end) for start, end in loops if start < end]
    inside = [(at, name) for at, name, _ in code if any(start <= at <= end for start, end in loops)]
    judged = inside if any(_is_global(name) for _, name in inside) else [(at, name) for at, name, _ in code]
    ctas = resident(SMS[arch], warps, registers, shared)
    bodies = [[line for line in code if start <= line[0] <= end] for start, end in sorted(_inner(loops))]
    most = max(map(_asked_at_once, bodies), default=0) or _asked_at_once(code)
    threads = ctas * warps * 32
    return Facts(
        arch,
        warps,
        registers,
        shared,
        stack,
        sum(name.startswith(("LDL", "STL")) for _, name, _ in code),
        _by_width(name for _, name in judged if _is_load(name)),
        _by_width(name for _, name in judged if name.startswith("STG")),
        _fewest(sass, code, lambda name: name.startswith(_FP64) or "F64" in name or name.endswith("64H")),
        tuple(sorted(set(_mixed(bodies)))),
        _count(name.split(".")[0] for _, name in inside if name.startswith(_TENSOR_CORE)),
        ctas,
        threads * most // 8,
        tuple(
            Loop(len(body), _loaded(body) // 8, threads * _asked_at_once(body) // 8) for body in bodies if _loaded(body)
        ),
        element,
    )


def broken(facts, need):
    """What of ``need`` does not hold, each as a sentence; nothing where all does."""

    def granted(field):
        value = getattr(need, field)
        return value.get(facts.arch) if isinstance(value, dict) else value

    found = []

    def at_most(name, value, limit):
        if limit is not None and value > limit:
            found.append(f"{name} {value}, at most {limit}")

    def at_least(name, value, limit):
        if limit is not None and value < limit:
            found.append(f"{name} {value}, at least {limit}")

    at_most("registers", facts.registers, granted("registers"))
    at_most("bytes of shared memory", facts.shared, SMS[facts.arch].shared_cta)
    at_most("bytes of shared memory", facts.shared, granted("shared"))
    at_most("bytes of stack", facts.stack, granted("stack"))
    if not granted("stack"):
        at_most("accesses of local memory", facts.local, 0)
    at_most("instructions on fp64", facts.fp64, granted("fp64"))
    width = granted("width")
    if width is not None:
        at_least("bits of the widest load", max(facts.loads, default=0), width)
        narrow = _narrower(facts.loads, width)
        if need.stores:
            at_least("bits of the widest store", max(facts.stores, default=width), width)
            narrow += _narrower(facts.stores, width)
        at_most("narrow accesses", narrow, granted("narrow"))
    mixed = granted("mixed")
    if mixed is not None and facts.mixed != mixed:
        found.append(f"narrow accesses beside wide ones {facts.mixed}, expected {mixed}")
    at_least("resident warps", facts.resident_warps, granted("warps"))
    at_least("bytes in flight", facts.in_flight, granted("in_flight"))
    for number, loop in enumerate(facts.loops, 1):
        at_least(f"bytes in flight in loop {number}", loop.in_flight, granted("each_in_flight"))
    if granted("instructions") is not None and facts.instructions is None:
        found.append("no loop that loads elements")
    elif granted("instructions") is not None:
        at_most("instructions for an element", round(facts.instructions, 1), granted("instructions"))
    tensor_core = granted("tensor_core")
    if tensor_core is not None and tensor_core not in facts.tensor_core:
        found.append(f"no {tensor_core} in a loop")
    return found


def resident(sm, warps, registers, shared):
    """How many CTAs fit an SM: registers are given out to warps in blocks of 256."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = sm.registers // of_warp // warps if of_warp else sm.ctas
    return min(sm.ctas, sm.warps // warps, by_registers, sm.shared // (shared + 1024))


def instructions(sass):
    """``(address, opcode with its suffixes, operands)`` of each line of a disassembly."""
    return [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(sass)]


def _loaded(code):
    """Returns the bits of global memory that a thread loads."""
    return sum(_bits(name) for _, name, _ in code if _is_load(name))


def _asked_at_once(code):
    """The most bits that a thread loads before it reads any of what it loads."""
    most = bits = 0
    loaded = set()
    for _, name, rest in code:
        registers = {int(number) for number in re.findall(r"\bR(\d+)\b", rest)}
        if _is_load(name):
            bits += _bits(name)
            first = re.match(r" R(\d+),", rest)  # none where shared memory is loaded
            if first:
                loaded |= set(range(int(first[1]), int(first[1]) + max(1, _bits(name) // 32)))
        elif registers & loaded or name.startswith("DEPBAR"):
            bits, loaded = 0, set()
        most = max(most, bits)
    return most


def _mixed(bodies):
    for body in bodies:
        widths = [_bits(name) for _, name, _ in body if _is_global(name)]
        if 128 in widths:
            yield sum(bits < 128 for bits in widths)


def _fewest(sass, code, costs):
    """The fewest instructions, of those that ``costs`` names, that a thread executes if it loads 128 bits anywhere.

    It is the cheapest way through the graph of branches: rare cases do not happen, a loop ends after one turn or none.
    """
    guarded = {int(at, 16) for at in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+@", sass, re.M)}
    place = {at: i for i, (at, _, _) in enumerate(code)}
    after, before = [[] for _ in code], [[] for _ in code]
    for i, (at, name, rest) in enumerate(code):
        kind, always = name.split(".")[0], at not in guarded
        if kind in ("BRA", "CALL"):  # ptxas also leaves an outer loop by what reads as a call
            after[i] += [place[int(to, 16)] for to in _targets(rest) if int(to, 16) in place]
            always = always and kind == "BRA" and "," not in rest
        if not (always and kind in ("BRA", "EXIT", "RET")) and i + 1 < len(code):
            after[i].append(i + 1)
        for to in after[i]:
            before[to].append(i)
    cost = [costs(name) for _, name, _ in code]
    exits = [i for i, (_, name, _) in enumerate(code) if name == "EXIT"]
    start, end = _distances([0], after, cost), _distances(exits, before, cost)
    wide = [i for i, (_, name, _) in enumerate(code) if _is_load(name) and _bits(name) == 128]
    return int(min((start[i] + end[i] - cost[i] for i in wide or exits), default=0))


def _distances(sources, edges, cost):
    """From ``sources`` to every node, its own cost included; a cost is 0 or 1."""
    found, waiting = [float("inf")] * len(cost), deque()
    for i in sources:
        found[i] = cost[i]
        waiting.append(i)
    while waiting:
        i = waiting.popleft()
        for to in edges[i]:
            if found[i] + cost[to] < found[to]:
                found[to] = found[i] + cost[to]
                waiting.append(to) if cost[to] else waiting.appendleft(to)
    return found


def _targets(rest):
    return re.findall(r"0x([0-9a-f]+)", rest)[-1:]


def _inner(loops):
    """Loops that hold no other loop."""
    return [
        (a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b and d - c < b - a for c, d in loops)
    ]


def _is_load(name):
    return name.startswith(("LDG.", "LDGSTS", "UBLKCP", "UTMALDG"))  # LDGSTS copies into shared memory


def _is_global(name):
    return _is_load(name) or name.startswith("STG")


def _bits(name):
    widths = _WIDTH.search(name)
    return int(widths[1] or widths[2]) if widths else 32


def _narrower(widths, width):
    return sum(count for bits, count in widths.items() if bits < width)


def _by_width(names):
    return _count(map(_bits, names))


def _count(values):
    found = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items()))


def _cuobjdump(option, file, *more):
    return subprocess.run([_tool(), option, *more, str(file)], check=True, capture_output=True, text=True).stdout


@cache
def _tool():
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")

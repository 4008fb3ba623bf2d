"""What is read off compiled kernels, and that a kernel that breaks its budget is reported."""

import json
import os
import subprocess
import sys

import pytest

from bench import compile_report
from bench.binary import SMS, Facts, Loop, Need, broken, facts_of, instructions, resident

pytest.importorskip("triton")
LOOPS = (Loop(100, 32, 49152), Loop(61, 16, 24576))
FACTS = Facts(90, 8, 40, 1024, 0, 0, {128: 2}, {128: 1}, 44, (0, 8), {"HGMMA": 4}, 6, 49152, LOOPS, element=2)


def test_lines_of_a_disassembly():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                            /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10] ;
        /*0020*/          @P1 BRA `(.L_x_1) 0x10 ;
    """
    assert instructions(sass) == [
        (0, "LDC", " R1, c[0x0][0x28] "),
        (16, "LDG.E.128.CONSTANT", " R4, desc[UR4][R2.64+0x10] "),
        (32, "BRA", " `(.L_x_1) 0x10 "),
    ]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "ctas"),
    [
        (8, 32, 0, 8),
        (8, 40, 0, 6),
        (16, 40, 0, 3),
        (4, 168, 0, 3),
        (4, 32, 113 << 10, 2),
        (1, 16, 0, 32),
        (16, 129, 0, 0),
    ],
)
def test_how_many_ctas_fit_an_sm(warps, registers, shared, ctas):
    assert resident(SMS[90], warps, registers, shared) == ctas


def test_a_kernel_inside_its_budget_breaks_nothing():
    assert broken(FACTS, Need()) == []
    need = Need(
        registers={80: 1, 90: 40},
        shared=1024,
        fp64=44,
        mixed=(0, 8),
        warps=48,
        in_flight=49152,
        tensor_core={90: "HGMMA"},
    )
    assert broken(FACTS, need) == []
    assert broken(FACTS, Need(each_in_flight={80: 99999, 90: 24576}, instructions=13.9)) == []


def test_instructions_are_counted_for_each_element_of_every_loop():
    assert FACTS.instructions == 100 * 2 / 32 + 61 * 2 / 16
    assert FACTS._replace(element=4).instructions == 2 * FACTS.instructions
    assert FACTS._replace(element=None).instructions is None
    assert FACTS._replace(loops=()).instructions is None


@pytest.mark.parametrize(
    ("fact", "need", "sentence"),
    [
        ({}, Need(registers=39), "registers 40, at most 39"),
        ({}, Need(registers={90: 39}), "registers 40, at most 39"),
        ({}, Need(shared=1023), "bytes of shared memory 1024, at most 1023"),
        ({"shared": 228 << 10}, Need(), "bytes of shared memory 233472, at most 232448"),
        ({"stack": 8}, Need(), "bytes of stack 8, at most 0"),
        ({"local": 2}, Need(), "accesses of local memory 2, at most 0"),
        ({"loads": {64: 3}}, Need(narrow=9), "bits of the widest load 64, at least 128"),
        ({"loads": {16: 3, 128: 1}}, Need(), "narrow accesses 3, at most 0"),
        ({}, Need(fp64=43), "instructions on fp64 44, at most 43"),
        ({"mixed": (0, 56)}, Need(mixed=(0, 8)), "narrow accesses beside wide ones (0, 56), expected (0, 8)"),
        ({"stores": {32: 1, 128: 1}}, Need(), "narrow accesses 1, at most 0"),
        ({"stores": {32: 1}}, Need(narrow=1), "bits of the widest store 32, at least 128"),
        ({}, Need(warps=49), "resident warps 48, at least 49"),
        ({}, Need(in_flight=50000), "bytes in flight 49152, at least 50000"),
        ({}, Need(each_in_flight=24577), "bytes in flight in loop 2 24576, at least 24577"),
        ({}, Need(instructions=13.8), "instructions for an element 13.9, at most 13.8"),
        ({"loops": ()}, Need(instructions=99), "no loop that loads elements"),
        ({"tensor_core": {}}, Need(tensor_core="HGMMA"), "no HGMMA in a loop"),
    ],
)
def test_what_is_outside_the_budget_is_said(fact, need, sentence):
    assert broken(FACTS._replace(**fact), need) == [sentence]


# Kernels whose binaries are known to be good and bad, compiled in a process that does not interpret.
_PLANTED = """
import sys, torch, triton, triton.language as tl
from bench import compile_report, launches
from bench.binary import Need

@triton.jit
def copy(x, y, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    for i in range(0, n, BLOCK):
        o = i + tl.arange(0, BLOCK)
        if MASKED:
            tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0), mask=o < n)
        else:
            tl.store(y + o, tl.load(x + o))

@triton.jit
def twice(x, y, n, SLOW: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n, BLOCK):
        v = tl.load(x + i + tl.arange(0, BLOCK)).to(tl.float32)
        if SLOW:
            v = tl.exp(v)
        largest = tl.maximum(largest, v)
    scale = tl.max(largest)
    for i in range(0, n, SECOND):
        o = i + tl.arange(0, SECOND)
        tl.store(y + o, tl.load(x + o) * scale.to(tl.bfloat16))

def launch_twice(slow=False, second=8192):
    x = torch.empty(1 << 20, dtype=torch.bfloat16)
    twice[(1,)](x, x, 1 << 20, SLOW=slow, BLOCK=8192, SECOND=second, num_warps=8)

def launch(masked, warps=4, offset=0, n=1 << 20):
    x = torch.empty(1 << 20, dtype=torch.bfloat16)
    copy[(1,)](x[offset:], x, n, MASKED=masked, BLOCK=8192, num_warps=warps)

two = Need(element=2, instructions=6, each_in_flight=32 << 10)
cases = {
    "good": (lambda: launch(False), {"copy": Need()}),
    "narrow": (lambda: launch(True, n=(1 << 20) - 1), {"copy": Need()}),
    "unaligned": (lambda: launch(False, offset=1), {"copy": Need()}),
    "crowded": (lambda: launch(False, warps=1), {"copy": Need(warps=32)}),
    "two loops": (launch_twice, {"twice": two}),
    "slow": (lambda: launch_twice(slow=True), {"twice": two}),
    "second asks for less": (lambda: launch_twice(second=2048), {"twice": two}),
}
sys.modules[launches.__name__ + ".planted"] = type(sys)("planted")
sys.modules[launches.__name__ + ".planted"].CASES = cases
compile_report.OPS = (*compile_report.OPS, "planted")
sys.exit(compile_report.main(["--ops", "planted", "--json", sys.argv[1]]))
"""


def test_planted_kernels_break_their_budgets(tmp_path):
    program = tmp_path / "planted.py"
    program.write_text(_PLANTED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.getcwd(), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, program, tmp_path / "rows"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [(row["case"], row["facts"]["arch"]) for row in rows] == [
        (case, arch)
        for case in ("good", "narrow", "unaligned", "crowded", "two loops", "slow", "second asks for less")
        for arch in (80, 90)
    ]
    wrong = {row["case"]: row["broken"] for row in rows if row["broken"]}
    assert set(wrong) == {"narrow", "unaligned", "crowded", "slow", "second asks for less"}
    assert any(sentence.startswith("instructions for an element") for sentence in wrong["slow"])
    assert [sentence[:25] for sentence in wrong["second asks for less"]] == ["bytes in flight in loop 2"]
    good = rows[0]["facts"]
    assert set(good["loads"]) == set(good["stores"]) == {"128"}
    assert good["in_flight"] == good["ctas"] * 8192 * 2  # one turn at a time, however often the loop is unrolled
    assert done.stdout.splitlines()[-1] == "14 kernels, 10 outside their budget"


def test_narrow_accesses_beside_wide_ones_are_counted_loop_by_loop():
    code = """
        /*0000*/ LDG.E.128 R4, [R2.64] ;
        /*0010*/ STG.E.128 [R2.64], R4 ;
        /*0020*/ @P0 BRA 0x0 ;
        /*0030*/ LDG.E.128 R4, [R2.64] ;
        /*0040*/ LDG.E.U16 R8, [R6.64] ;
        /*0050*/ STG.E [R2.64], R4 ;
        /*0060*/ @P0 BRA 0x30 ;
        /*0070*/ LDG.E.U16 R8, [R6.64] ;
        /*0080*/ @P0 BRA 0x70 ;
        /*0090*/ LDG.E.U16 R8, [R6.64] ;
        /*00a0*/ EXIT ;
    """
    facts = facts_of("REG:8 STACK:0 SHARED:0", code, 90, 4)
    assert facts.mixed == (0, 2)
    assert (facts.loads, facts.stores) == ({16: 2, 128: 2}, {32: 1, 128: 1})


def test_fp64_is_counted_on_the_cheapest_way_past_a_wide_load():
    code = """
        /*0000*/ DADD R4, R4, 1 ;
        /*0010*/ @P1 EXIT ;
        /*0020*/ @P0 BRA 0x60 ;
        /*0030*/ DMUL R4, R4, R4 ;
        /*0040*/ F2F.F32.F64 R8, R4 ;
        /*0050*/ BRA 0x80 ;
        /*0060*/ DFMA R4, R4, R4, R4 ;
        /*0070*/ CALL.REL.NOINC 0xe0 ;
        /*0080*/ MUFU.RCP R8, R8 ;
        /*0090*/ LDG.E.128 R8, [R2.64] ;
        /*00a0*/ MUFU.RCP64H R9, R5 ;
        /*00b0*/ @P2 BRA 0x90 ;
        /*00c0*/ EXIT ;
        /*00d0*/ EXIT ;
        /*00e0*/ DADD R4, R4, 1 ;
        /*00f0*/ RET.REL.NODEC R2 0x0 ;
    """

    def fewest(code):
        return facts_of("REG:8 STACK:0 SHARED:0", code, 90, 4).fp64

    assert fewest(code) == 1 + 1 + 1  # DADD, DFMA, and one turn of the loop
    assert fewest(code.replace("@P0 BRA 0x60", "MOV R1, R1")) == 1 + 2 + 1  # DMUL and F2F
    assert fewest(code.replace("CALL.REL.NOINC 0xe0", "@P3 BRA P4, 0xa0")) == 1 + 1 + 1
    assert fewest(code.replace("LDG.E.128", "LDG.E")) == 1  # the exit that comes first


def test_it_refuses_to_interpret(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_report.recording(90):
        pass


def test_a_wrong_call_exits_with_two():
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(["--ops", "nonsense"])
    assert stopped.value.code == 2

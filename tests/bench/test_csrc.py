"""The built CUDA library against its table, where there is one; and the table against what is launched."""

import ctypes

import pytest

from bench import binary, compile_report, csrc

from ..csrc import host

pytest.importorskip("triton")
needs_library = pytest.mark.skipif(csrc.library() is None, reason="the CUDA kernels are not built")


@pytest.fixture(scope="module")
def rows():
    return [*map(compile_report.Row._make, csrc.report())]


@needs_library
def test_every_kernel_stays_within_its_budget(rows):
    assert not [(row.case, row.kernel, row.facts.arch, row.broken) for row in rows if row.broken]


@needs_library
def test_every_kernel_is_there_on_both_architectures(rows):
    by_arch = [{(row.op, row.case, row.kernel) for row in rows if row.facts.arch == arch} for arch in (80, 90)]
    assert by_arch[0] == by_arch[1]
    kernels = [kernel for _, _, kernel in by_arch[0]]
    assert kernels.count("softmax_grad_kernel") == 3 * 3 * 2  # dtypes, ways to read, with a cap and without
    assert kernels.count("update_kernel") == 2 + 4 * 3 + 2 * 2
    assert kernels.count("sum_of_squares_kernel") == 3


@needs_library
def test_a_row_on_a_cluster_waits_for_memory_once():
    """Its first barrier publishes the sums. A second MEMBAR would be the second barrier's, which publishes nothing."""
    counts = [
        [name.split(".")[0] for _, name, _ in binary.instructions(sass)].count("MEMBAR")
        for kernel, (_, sass) in binary.kernels(csrc.library(), "sm_90a").items()
        if "Reads)0" in csrc._demangled([kernel])[0]
    ]
    assert counts == [1] * 6


@needs_library
def test_a_broken_budget_is_reported(monkeypatch, capsys):
    monkeypatch.setitem(csrc._ADAMW, "update_kernel", binary.Need(narrow=None, registers=20))
    assert compile_report.main(["--csrc"]) == 1
    assert "BROKEN: registers" in capsys.readouterr().out


def test_a_library_that_is_not_built_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(csrc, "library", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(["--csrc"])
    assert stopped.value.code == 2
    assert "make cuda" in capsys.readouterr().err


@host.needs_compiler
@pytest.mark.parametrize(("arch", "number"), [(host.SM_80, 80), (host.SM_90, 90)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("size", [2, 4])
def test_threads_and_shared_memory_are_those_of_the_launcher(size, arch, number):
    def plan(V, given=False):
        out = (ctypes.c_int64 * 4)()
        flags = map(ctypes.c_bool, (given, arch[0]))
        host.library().softmax_grad_plan(V, size, *flags, ctypes.c_size_t(arch[1]), out)
        _, threads, shared, reads = out
        return csrc._READS[reads], threads, shared

    for reads, (threads, shared) in csrc.SOFTMAX_GRAD.items():
        if isinstance(shared, dict):
            if number == 90:
                assert plan(128256) == (reads, threads, shared[number, size])
            else:  # the largest row that is staged
                found = [plan(V) for V in range(1000, 50000, 4)]
                assert max(each for each in found if each[0] == reads)[1:] == (threads, shared[number, size])
        else:
            V = 128256 if number == 80 or reads == "given" else 1 << 20
            assert plan(V, reads == "given") == (reads, threads, shared)
    threads, of_update, of_norm = (
        getattr(host.library(), f"adamw_{name}")() for name in ("threads", "update_shared", "norm_shared")
    )
    assert csrc.ADAMW["update_kernel"] == (threads, of_update)
    assert csrc.ADAMW["sum_of_squares_kernel"] == (threads, of_norm)

"""The ahead-of-time gate: one kernel for one target in a process of its own, and what makes it fail."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from support import ROOT, run_python

from dico_kernels import _sass, aot

triton = pytest.importorskip("triton")
KERNEL = "gated_residual_fwd bf16 ROWS=32 COLS=64 warps=4"


def gate(*args, interpret="1"):
    # set or not, the gate has to compile: the suite itself runs with it set
    return run_python("-m", "dico_kernels.aot", "--targets", "sm_90", "--jobs", "1", *args, cwd=Path("/"),
                      TRITON_INTERPRET=interpret)  # fmt: skip


@pytest.mark.parametrize("interpret", ["", "1"])
def test_one_kernel_compiles_within_its_budget(interpret):
    done = gate("--kernels", KERNEL, interpret=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    header, row, *_ = done.stdout.splitlines()
    assert header.split() == ["kernel", "target", "regs", "spills", "shared", "KiB", "64-bit", "budget", "ok"]
    assert row.startswith(KERNEL)
    assert row.split()[-1] == "ok"
    assert "1/1 compiled" in done.stderr


def test_more_than_the_budget_fails_and_update_repairs(tmp_path):
    budgets = tmp_path / "budgets.json"
    arguments = ("--kernels", KERNEL, "--budgets", str(budgets))
    assert gate(*arguments, "--update").returncode == 0
    written = json.loads(budgets.read_text())
    ((key, usage),) = written[triton.__version__].items()
    assert key == f"{KERNEL} @ sm_90"

    usage["regs"] -= 1
    budgets.write_text(json.dumps(written))
    done = gate(*arguments)
    assert done.returncode == 1
    assert f"FAIL {key}: regs {usage['regs'] + 1}, budget {usage['regs']}" in done.stdout

    budgets.write_text(json.dumps({triton.__version__: {}}))
    done = gate(*arguments)
    assert done.returncode == 1
    assert "not in the budget" in done.stdout


def test_unknown_names_are_answered_with_the_known_ones():
    done = gate("--kernels", "flash_attention")
    assert done.returncode == 2
    assert "no kernel matches 'flash_attention': the kernels are adaln_bwd, adaln_fwd" in done.stderr
    with pytest.raises(ValueError, match="unknown target sm_89: expected some of sm_80"):
        aot.compile_all(["sm_89"])


def test_a_budget_that_is_not_there_is_no_budget_to_pass(tmp_path):
    done = gate("--kernels", KERNEL, "--budgets", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert "none.json: no such file" in done.stderr


def test_every_kernel_is_compiled():
    written = set()
    for path in (ROOT / "dico_kernels" / "kernels").glob("[a-z]*.py"):
        module = importlib.import_module(f"dico_kernels.kernels.{path.stem}")
        written |= {name for name in vars(module) if name.endswith("_kernel")}
    assert {kernel.launch.kernel.__name__ for kernel in aot.kernels().values()} == written


def test_no_count_is_compiled_for():
    from dico_kernels.kernels.common import INTERPRET, is_count

    counts = 0
    for function in {kernel.launch.kernel for kernel in aot.kernels().values()}:
        unspecialised = function.kwargs["do_not_specialize"] if INTERPRET else function.do_not_specialize
        assert unspecialised == [name for name in function.arg_names if is_count(name)], function.__name__
        counts += len(unspecialised)
    assert counts > 50
    # addresses, widths and strides are no counts
    assert not any(is_count(name) for name in ("x", "y", "weight", "C", "N", "K", "S", "c0", "gate_stride"))


def test_a_label_names_one_kernel(monkeypatch):
    monkeypatch.setattr(aot, "_unusual", lambda launch, dtype: [])
    with pytest.raises(RuntimeError, match="two kernels have one label"):
        aot.kernels.__wrapped__()


def test_the_installed_budget_is_complete():
    for version, budget in json.loads(aot.BUDGETS.read_text()).items():
        expected = {
            f"{label} @ {target}"
            for label, kernel in aot.kernels().items()
            for target in aot.TARGETS
            if aot._wanted(kernel, target) and target.startswith("sm_")
        }
        assert set(budget) == expected, version


WIDE = """
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %row = arith.extsi %pid : i32 to i64 loc(#loc2)
    %offset = arith.muli %row, %stride : i64 loc(#loc3)
    %p = tt.addptr %x, %offset : !tt.ptr<bf16>, i64 loc(#loc4)
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", ""),
        ("%offset : !tt.ptr<bf16>, i64", "%pid : !tt.ptr<bf16>, i32", "tt.addptr"),
        ("%offset : !tt.ptr<bf16>, i64", "%o : tensor<4x8x!tt.ptr<bf16>>, tensor<4x8xi32>", "tt.addptr"),
        ("%offset : !tt.ptr<bf16>, i64", "%offset : tensor<4x8x!tt.ptr<bf16>>, tensor<4x8xi64>", ""),
        ("arith.extsi %pid", "arith.extsi %m", ""),
        (
            "%row = arith.extsi %pid",
            "%m = arith.muli %pid, %stride : i32 loc(#loc5)\n    %row = arith.extsi %m",
            "muli",
        ),
        (
            "%row = arith.extsi %pid",
            "%c = arith.constant 4 : i32\n    %m = arith.muli %pid, %c : i32\n    %row = arith.extsi %m",
            "",
        ),
    ],
)
def test_narrow_offsets(old, new, problem):
    found = aot.narrow_offsets(WIDE.replace(old, new))
    assert len(found) == bool(problem)
    assert all(problem in line for line in found)


@pytest.mark.parametrize(
    ("sass", "serial"),
    [
        ("", False),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", False),
        ("HGMMA.64x64x16.F32 R24 ;\nHGMMA.64x64x16.F32 R24, gsb0 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", False),
        ("HGMMA.64x64x16.F32 R24, gsb0 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n" * 2, True),
    ],
)
def test_serialised_matrix_instructions(sass, serial):
    assert _sass.serialised(sass) is serial


def test_a_step_waits_for_what_the_one_before_reads():
    done = gate("--kernels", "PROLOGUE=norm PART=0 BIAS CHANNEL=none SAMPLES=1")
    assert done.returncode == 0, done.stdout


LOOP = """
.L_x_0:
  STL [R1], R2 ;
.L_x_1:
  HGMMA.64x64x16.F32 R24 ;
  @P0 BRA `(.L_x_1) ;
  LDL R2, [R1] ;
  BRA `(.L_x_0) ;
"""


@pytest.mark.parametrize(
    ("old", "new", "spills"),
    [("", "", 0), ("  HGMMA", "  LDL R2, [R1] ;\n  HGMMA", 1), ("HGMMA", "HMMA", 0)],
)
def test_spills_in_the_loop(old, new, spills):
    assert _sass.loop_spills(LOOP.replace(old, new, 1)) == spills


IN_FLIGHT = """
.L_x_1:
        /*1bf0*/                   LDSM.16.M88.4 R88, [R12] ;
        /*1c00*/              @P0  HADD2.BF16_V2 R92, R92, R6 ;
        /*1c10*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR20], R24, gsb0 ;
        /*1c20*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1c30*/                   HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR20], R24, gsb0 ;
        /*1c40*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1c50*/                   ISETP.GE.AND P0, PT, R94, R93, PT ;
        /*1c60*/                   ST.E [R92.64], R93 ;
        /*1c70*/                   R2UR UR4, R92 ;
        /*1c80*/                   NOP ;
        /*1c90*/               @P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("old", "new", "early"),
    [
        ("0x1 ;\n        /*1c50*/", "0x0 ;\n        /*1c50*/", ""),  # waited for before the next step
        ("", "", "HADD2.BF16_V2 R92"),  # the second is still in flight when the next step begins
        ("LDSM.16.M88.4 R88", "LDSM.16.M88.4 R90", "LDSM.16.M88.4 R90"),  # its last two registers
        ("HADD2.BF16_V2 R92", "HADD2.BF16_V2 R96", ""),
        ("R92, gdesc", "gdesc[UR4], gdesc", ""),  # from shared memory
        ("NOP", "IMAD.WIDE.U32 R91, R1, R2, R3", "IMAD.WIDE.U32 R91"),
        ("NOP", "LDG.E.128 R89, [R2.64]", "LDG.E.128 R89"),
        ("NOP", "IADD3 R95, P1, R1, R2, RZ", "IADD3 R95"),
        ("NOP", "LEA.HI.X P1, R95, R1, R2", "LEA.HI.X P1, R95"),
    ],
)
def test_registers_that_a_product_in_flight_reads(old, new, early):
    quiet = IN_FLIGHT if early.startswith(("HADD2", "LDSM")) or not early else IN_FLIGHT.replace("R92, R92", "R96, R92")
    found = _sass.overwritten(quiet.replace(old, new, 1))
    assert bool(found) == bool(early), found
    assert not early or any(early in line for line in found)

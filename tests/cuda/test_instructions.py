"""The count of instructions in machine code: loops, their nesting, units, code after the end."""

from __future__ import annotations

from kernels.tools.instructions import loops_of, unit_of

LISTING = """
//--------------------- .text.first         --------------------------
\t.section\t.text.first,"ax",@progbits
.text.first:
        /*0000*/                   S2R R13, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E R0, desc[UR6][R4.64] ;
        /*0020*/              @!P0 EXIT ;
.L_x_2:
        /*0030*/                   STS [R3], R0 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   STG.E desc[UR6][R4.64], R0 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   MOV R2, R3 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
//--------------------- .text.second         --------------------------
.text.second:
        /*0000*/                   EXIT ;
"""


def test_loops_are_counted_without_their_inner_loops_and_without_rare_code_after_the_end() -> None:
    found = loops_of(LISTING)
    assert list(found) == ["first", "second"]
    assert not found["second"]
    outer, inner = found["first"]
    assert (outer.depth, outer.total, dict(outer.units)) == (1, 4, {"global": 2, "branch": 2})
    assert (inner.depth, inner.total) == (2, 3)
    assert dict(inner.units) == {"shared": 1, "arithmetic": 1, "branch": 1}


def test_instructions_belong_to_one_unit() -> None:
    assert [unit_of(name) for name in ("LDS", "HMMA", "SHFL", "POPC", "LOP3")] == [
        *("shared", "tensor", "shuffle", "popc"),
        "arithmetic",
    ]

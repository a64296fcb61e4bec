"""Tables of what is supported, from records in results/."""

from __future__ import annotations

from collections.abc import Callable

from records import read, table


def onnx_totals() -> str:
    """How many of the ONNX project's tests of operators pass."""
    record = read("onnx_conformance")[-1]
    totals = record["totals"]
    count = totals["passed"] + totals["refused"] + totals["wrong"]
    share = 100 * totals["passed"] / count
    rows = [
        ["passed", f"{totals['passed']:,} ({share:.1f} %)"],
        ["refused by name", f"{totals['refused']:,}"],
        ["other outputs", f"{totals['wrong']:,}"],
        ["of types that torch does not have (4 bits and less), refused", f"{totals['no type in torch']:,}"],
    ]
    return table([f"tests of onnx {record['onnx']}, float, integer and bool tensors", "number"], rows)


def onnx_operators() -> str:
    """Which operators are read."""
    operators = read("onnx_conformance")[-1]["operators"]
    passed = [f"{name} ({c['passed']})" for name, c in operators.items() if c["passed"] and not c["refused"]]
    partly = [
        f"{name} ({c['passed']} of {c['passed'] + c['refused']})"
        for name, c in operators.items()
        if c["passed"] and c["refused"]
    ]
    refused = [f"{name} ({c['refused']})" for name, c in operators.items() if not c["passed"]]
    rows = [["all tests pass", ", ".join(passed)], ["some pass", ", ".join(partly)], ["refused", ", ".join(refused)]]
    return table(["", "operators, and how many tests they have"], [row for row in rows if row[1]])


TABLES: dict[str, Callable[[], str]] = {"onnx-operators": onnx_operators, "onnx-totals": onnx_totals}

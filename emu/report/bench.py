"""A bench as a table, and two of them beside each other. They are given as what `emu bench --json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_bench", "print_changes"]


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _target(row: Mapping[str, Any]) -> str:
    if row["target"] is None:
        return "-"
    sign = "<=" if row["better"] == "lower" else ">="
    return f"{sign} {_number(row['target'])}"


def _verdict(row: Mapping[str, Any]) -> Text:
    if row["met"] is None:
        return Text("-", style="dim")
    return Text("yes", style="green") if row["met"] else Text("no", style="bold red")


def print_bench(bench: Mapping[str, Any], console: Console) -> None:
    """Print all rows, then what they say more than numbers, then where and how it was measured."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("row", no_wrap=True)
    for column in ("ours", "reference", "unit", "ratio", "interval", "target", "met"):
        table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
    for row in bench["rows"]:
        if row.get("error"):
            table.add_row(row["name"], Text(row["error"], style="yellow"))
            continue
        low, high = row["interval"]
        table.add_row(
            row["name"],
            _number(row["ours"]),
            "-" if row["reference"] is None else _number(row["reference"]),
            row["unit"],
            "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{low:.3f} {high:.3f}" if row["ratio"] is not None else f"{_number(low)} {_number(high)}",
            _target(row),
            _verdict(row),
        )
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table)
    console.print()
    width = max(len(row["name"]) for row in bench["rows"]) + 1
    for row in bench["rows"]:
        where = [row["what"]]
        if row["service"] != "-":
            where.append(f"faults {row['service']}")
        where.append(row["placement"] + (", a second thread running" if row["second_thread"] else ""))
        if row.get("difference"):
            value, low, high = (_number(n) for n in row["difference"])
            where.append(f"difference {value} {row['unit']} [{low}, {high}]")
        console.print(Text(f"{row['name']:{width}}{'; '.join(where)}", style="dim"), soft_wrap=True)
    env = bench["environment"]
    for line in (
        "",
        "ratio: ours / reference, median of the rounds' ratios, taken by turns; interval: of that median, at least "
        f"{bench['confidence']:.1%} certain (order statistics); met: by the median",
        f"{bench['rounds']} rounds; Linux {env['kernel']}, {env['cpus']} x {env['cpu']}; Python {env['python']}; "
        f"THP {env['thp']}; userfaultfd {env['uffd_rung']}; {bench['seconds']:.0f} s",
        f"again: {bench['command']}",
    ):
        console.print(Text(line, style="dim"), soft_wrap=True)


def print_changes(
    changes: Sequence[tuple[str, str, tuple[float, float, float] | None, tuple[float, float, float] | None]],
    differences: Sequence[str],
    console: Console,
) -> None:
    """Print (row, verdict, old, new), the two as median, low, high; then in what the machines differ."""
    styles = {"better": "green", "worse": "bold red", "same": "dim"}
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    for column in ("row", "then", "now", "changed"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("row", "changed") else "right")

    def text(value: tuple[float, float, float] | None) -> str:
        return "-" if value is None else f"{_number(value[0])} [{_number(value[1])} {_number(value[2])}]"

    for name, verdict, old, new in changes:
        table.add_row(name, text(old), text(new), Text(verdict, style=styles.get(verdict, "yellow")))
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table)
    for line in differences:
        console.print(f"not the same machine: {line}", soft_wrap=True, markup=False)

"""The bench: emu's operations beside the bare system calls, by turns, in one run.

A machine's absolute times mean little: they move with the host's load, the frequency, the neighbours. So every row that
can has a reference, the same work as a plain C loop of system calls (benchmarks/), and the two are measured by turns,
round after round, ours first in one and the reference first in the next. A row's result is the median of the rounds'
ratios, with an interval that says how far to trust it.

Placement is part of a result. Rows say which fault service ran and where its thread sat, and whether a second thread of
the process was running: each page that is taken away then costs an interrupt to that thread's core (TLB shootdown).
"""

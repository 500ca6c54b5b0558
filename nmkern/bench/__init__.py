"""Measurements: our layers against what others offer, in one process, behind an equality check.

    clocks -> harness (gate, row, report) -> rivals, cases -> plan -> sweep -> table, figures, compare

``nmkern bench`` is the command, ``benchmarks/`` of the repository uses the same parts. A row is a line of
JSON; what it holds is told in ``harness``.
"""

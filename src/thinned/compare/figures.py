"""Figures as a person reads them: three significant digits, no exponent, and units that fit."""

from __future__ import annotations

from decimal import Decimal

__all__ = ["count", "decimal", "duration", "significant"]

SECONDS = {"s": 1.0, "ms": 1e-3, "μs": 1e-6, "ns": 1e-9}
COUNTS = {"M": 1_000_000, "k": 1_000}


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits.

    >>> significant(1234.5), significant(1.6), significant(0.01234), significant(1e6, 4)
    ('1,230', '1.60', '0.0123', '1,000,000')
    """
    return f"{Decimal(f'{value:.{digits - 1}e}'):,f}"


def decimal(value: float) -> str:
    """Two decimals at most.

    >>> decimal(4.0), decimal(0.125), decimal(12345678.9)
    ('4', '0.12', '12,345,678.9')
    """
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """A time in seconds, milliseconds, microseconds or nanoseconds.

    >>> duration(1.12e-6), duration(9.996e-7), duration(1.1e-10)
    ('1.12 μs', '1.00 μs', '0.110 ns')
    """
    rounded = float(f"{seconds:.2e}")  # 999.6 ns are 1.00 μs
    unit = next((unit for unit, size in SECONDS.items() if rounded >= size), "ns")
    return f"{significant(rounded / SECONDS[unit])} {unit}"


def count(number: float) -> str:
    """A number of elements.

    >>> count(32_000_000), count(4_000), count(12)
    ('32 M', '4 k', '12')
    """
    unit = next((unit for unit, size in COUNTS.items() if number >= size), "")
    return f"{number / COUNTS.get(unit, 1):,.3g} {unit}".rstrip()

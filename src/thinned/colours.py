"""Colours of figures, on light and on dark pages."""

__all__ = ["GREY", "PALETTE"]

GREY = "#8a8f98"
PALETTE = ("#0c9a74", "#e0662f", "#6f73d2", "#c2417c", "#b8922b", "#3b8fc4", "#8d6a4f", "#7aa51e")

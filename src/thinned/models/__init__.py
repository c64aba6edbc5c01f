"""thinned in a model that somebody else wrote."""

from thinned.models.address import Address, address
from thinned.models.convert import Conversion, Swap, convert, revert
from thinned.models.inspection import Inspection, Site, inspect
from thinned.models.intercept import Intercept, Intercepted, intercept
from thinned.models.registry import register

__all__ = [
    "Address",
    "Conversion",
    "Inspection",
    "Intercept",
    "Intercepted",
    "Site",
    "Swap",
    "address",
    "convert",
    "inspect",
    "intercept",
    "register",
    "revert",
]

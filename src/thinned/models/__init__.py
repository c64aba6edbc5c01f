"""Find, replace, address and export the dropouts of a model that somebody else wrote."""

from thinned.models.address import Address, address
from thinned.models.convert import convert, revert
from thinned.models.convert.rules import register
from thinned.models.export import Keyed
from thinned.models.export.decompositions import decompositions
from thinned.models.inspect import Inspection, Site, inspect
from thinned.models.intercept import Intercept, Intercepted, intercept

__all__ = [
    "Address",
    "Inspection",
    "Intercept",
    "Intercepted",
    "Keyed",
    "Site",
    "address",
    "convert",
    "decompositions",
    "inspect",
    "intercept",
    "register",
    "revert",
]

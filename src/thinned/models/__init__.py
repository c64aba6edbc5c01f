"""thinned in a model that somebody else wrote."""

from thinned.models.address import Address, address

__all__ = ["Address", "address"]

"""Masks by address in the training loops of other libraries: an ``AddressCallback`` for each."""

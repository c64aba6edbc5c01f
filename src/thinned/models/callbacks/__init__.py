"""Masks by address in training loops that others wrote: an ``AddressCallback`` for each framework."""

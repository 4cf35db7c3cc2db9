"""Simulations of machines that are not here. One file a kind of machine."""

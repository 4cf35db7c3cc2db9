"""Simulators: machines that are computed, not run."""

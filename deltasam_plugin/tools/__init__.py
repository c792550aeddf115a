"""Instruments: look at a run, a checkpoint, a radius."""

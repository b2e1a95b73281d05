"""Faults and bad inputs: nothing lost, nothing wrong in silence, nobody let in."""

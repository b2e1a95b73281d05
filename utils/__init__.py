"""Flags, command line, runs, checkpoints, training and evaluation.

Imports nothing of models/ or datasets/.
"""

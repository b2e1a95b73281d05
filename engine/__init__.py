"""The engine room: the command line, folders of runs, checkpoints, processes, locks and caches.

Nobody needs to touch it to change the method. It knows no stage, no loss and no metric.
"""

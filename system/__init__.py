"""The interface to the machine: devices, checkpoints, logs, files and signals."""

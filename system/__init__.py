"""What a program needs of the machine: devices, checkpoints on disk, logs, signals."""

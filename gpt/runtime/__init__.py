"""The machine a run meets: devices, compilers, processes."""

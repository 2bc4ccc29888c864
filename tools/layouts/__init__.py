"""What the kernels of GPUs read, looked at without one."""

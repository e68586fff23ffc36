"""Reading and writing raw bytes in kernels, and the numbers that all kernels share."""

"""m3ad custom ops: NumPy reference, portable C++, CUDA kernels and TensorRT plugins."""

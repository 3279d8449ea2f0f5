"""The differences between CPU and CUDA."""

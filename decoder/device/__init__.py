"""What differs between CPU and CUDA."""

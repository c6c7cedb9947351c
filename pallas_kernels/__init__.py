"""Paged-attention kernels and their matmul companions: JAX only, usable without jaxserve."""

"""Building blocks of models. `kernels` is the one door to `pallas_kernels`."""

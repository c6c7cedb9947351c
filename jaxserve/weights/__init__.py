"""Bytes to arrays: reading, dequantising, stacking and placing a checkpoint's tensors."""

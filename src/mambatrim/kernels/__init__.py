"""Tensors in, tensors out: the selective scan, the causal convolution and RMSNorm, with their gradients."""

from .ops import Direction, Scan, causal_conv1d, rms_norm, scan, scan_macs, selective_scan

__all__ = ["Direction", "Scan", "causal_conv1d", "rms_norm", "scan", "scan_macs", "selective_scan"]

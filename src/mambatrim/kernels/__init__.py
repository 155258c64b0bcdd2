"""Tensors in, tensors out: the selective scan, the causal convolution and RMSNorm, with their gradients."""

from .clustering import agglomerate, agglomerate_rounds, cluster_macs, rounds_macs
from .convolution import causal_conv1d
from .linear import linear
from .mixer import AS_IT_STANDS, Mixer, MixerDirection, Over, Steps, compose, fake_mixed, mix, mix_within
from .norm import rms_norm
from .packed import Packing, mix_packed, pack
from .projection import project
from .scan import Direction, Scan, scan, selective_scan
from .scan_operator import scan_macs
from .virtual import Virtual
from .virtual import conv_macs as virtual_conv_macs

__all__ = [
    "AS_IT_STANDS",
    "Direction",
    "Mixer",
    "MixerDirection",
    "Over",
    "Packing",
    "Scan",
    "Steps",
    "Virtual",
    "agglomerate",
    "agglomerate_rounds",
    "causal_conv1d",
    "cluster_macs",
    "compose",
    "fake_mixed",
    "linear",
    "mix",
    "mix_packed",
    "mix_within",
    "pack",
    "project",
    "rms_norm",
    "rounds_macs",
    "scan",
    "scan_macs",
    "selective_scan",
    "virtual_conv_macs",
]

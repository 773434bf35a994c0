"""Bring a converted model to its BatchNorm original on unlabelled images."""

from normswap.calibration.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]

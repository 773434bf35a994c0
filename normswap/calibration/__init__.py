"""Bring a converted model to its BatchNorm original on unlabelled images."""

from normswap.calibration.calibrate import Calibration, calibrate
from normswap.calibration.closed_form import by_channel, moments_alone, solve_alone
from normswap.calibration.distillation import taken
from normswap.calibration.flow import linear_output
from normswap.calibration.unseen import scaled

__all__ = [
    "Calibration",
    "by_channel",
    "calibrate",
    "linear_output",
    "moments_alone",
    "scaled",
    "solve_alone",
    "taken",
]

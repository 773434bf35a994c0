"""``python:`` factories of the dense tests."""

from dense_runs import Segmenter, detector


def segmenter(num_classes=4):
    return Segmenter(kinds=num_classes - 1)


def small_detector(num_classes=4):
    model = detector(kinds=num_classes)
    model.task = "detection"
    model.score_thresh = 0.0  # an untrained one is sure of nothing
    return model

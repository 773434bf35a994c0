"""Image folders to tensors: what a model wants of its images, and how files become that.

Transforms and named datasets are timm's; folders follow torchvision's ``ImageFolder`` convention
(one sub-folder per class, nested as deep as one likes). This room reads; it never writes.
"""

from normswap.data.detection import DetectionImages, detection_dataset
from normswap.data.images import (
    AUGMENTATION,
    MAX_PIXELS,
    image_files,
    load_images,
    read_image,
    to_channels,
    transform,
)
from normswap.data.labelled import (
    LabelledImages,
    has_splits,
    imagenet_names,
    is_named,
    labelled_dataset,
    listing_digest,
)
from normswap.data.pairing import is_divided
from normswap.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from normswap.data.segmentation import IGNORED, SegmentationImages, segmentation_dataset
from normswap.data.tasks import read_folder

__all__ = [
    "AUGMENTATION",
    "IGNORED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "DetectionImages",
    "LabelledImages",
    "Preprocessing",
    "SegmentationImages",
    "detection_dataset",
    "has_splits",
    "image_files",
    "imagenet_names",
    "is_divided",
    "is_named",
    "labelled_dataset",
    "listing_digest",
    "load_images",
    "read_folder",
    "read_image",
    "segmentation_dataset",
    "to_channels",
    "transform",
]

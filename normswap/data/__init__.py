"""Image folders to tensors: what a model wants of its images, and how files become that.

Transforms and named datasets are timm's; folders follow torchvision's ``ImageFolder`` convention
(one sub-folder per class, nested as deep as one likes). This room reads; it never writes.
"""

from normswap.data.images import image_files, load_images, read_image, to_channels, transform
from normswap.data.labelled import LabelledImages, has_splits, labelled_dataset
from normswap.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LabelledImages",
    "Preprocessing",
    "has_splits",
    "image_files",
    "labelled_dataset",
    "load_images",
    "read_image",
    "to_channels",
    "transform",
]

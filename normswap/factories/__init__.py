"""How timm's, torchvision's and one's own factories are called: one file per kind of spec.

Each takes a ``Request`` and gives a ``Built``. Weights come through the libraries' own download
code; a request without weights never touches the network.
"""

from normswap.factories.budget import no_larger_than
from normswap.factories.heads import detector_classes, graft_head
from normswap.factories.python_models import canonical, from_python
from normswap.factories.recorded import check_recorded
from normswap.factories.request import Built, Request
from normswap.factories.timm_models import from_timm
from normswap.factories.torchvision_models import from_torchvision

__all__ = [
    "Built",
    "Request",
    "canonical",
    "check_recorded",
    "detector_classes",
    "from_python",
    "from_timm",
    "from_torchvision",
    "graft_head",
    "no_larger_than",
]

"""What is asked of a factory, what comes back, and what is said when nothing does."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import socket
import sys
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normswap.data import Preprocessing
from normswap.errors import NormSwapError, SpecError, in_short
from normswap.libraries import library

logger = logging.getLogger("normswap")

_NETWORK_PACKAGES = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "http")


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        spec: as the user wrote it, for error texts.
        name: the spec without its prefix.
        pretrained: with the library's weights.
        filled_later: weights will be loaded over it, so that its own initialisation is wasted.
        num_classes: outputs of the head; None: the factory's default.
        image_size: height and width, for architectures that must know.
        in_chans: channels of the input; None: the factory's default.
        arguments: of an earlier build, to be used as they are; None: to be worked out.
        keys: those of the checkpoint to be loaded, which tell about optional parts.
        recorded: a file names the source, and not the user.
    """

    spec: str
    name: str
    pretrained: bool = False
    filled_later: bool = False
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    in_chans: int | None = None
    arguments: Mapping[str, Any] | None = None
    keys: frozenset[str] = frozenset()
    recorded: bool = False


@dataclass(frozen=True)
class Built:
    """What came out.

    Attributes:
        model: with the weights it is to start from.
        preprocessing: what it wants of its images.
        arguments: they repeat the build.
        class_names: in the order of the logits.
        task: what ``forward`` takes.
        pretrained: whether the weights are the library's; None: as they were asked for.
        spec: under which the same can be built again, where it is not the one asked for.
    """

    model: nn.Module
    preprocessing: Preprocessing
    arguments: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    task: str = "image"
    pretrained: bool | None = None
    spec: str | None = None


def unknown_model(spec: str, prefix: str, name: str, known: Iterable[str]) -> SpecError:
    """The error for a name that a library does not have, with names like it."""
    stem = name.partition(".")[0].lower()
    known = list(known)
    near = difflib.get_close_matches(stem, known, 3, 0.6)
    near += [other for other in known if stem and other.startswith(stem) and other not in near]
    return SpecError(
        spec,
        got=f"no model named {name}",
        need=f"a model of {prefix.rstrip('/')}",
        hint=" or ".join(prefix + other for other in near[:3]) or "`normswap list` for all names",
    )


def no_weights(spec: str, tags: Iterable[str]) -> SpecError:
    """The error for a model whose library has no pretrained weights for it."""
    tags = list(tags)[:3]
    return SpecError(
        spec,
        got="no pretrained weights for this model in its library",
        need="weights",
        hint=" or ".join([*tags, "--checkpoint FILE (checkpoint=…)", "--no-pretrained"])
        + " (pretrained=False)",
    )


@contextlib.contextmanager
def explained(request: Request) -> Iterator[None]:
    """Third-party warnings go to the log, third-party errors become one line."""
    try:
        with warnings.catch_warnings(record=True) as remarks, _network(request):
            warnings.simplefilter("always")
            yield
    except NormSwapError:
        raise
    except Exception as error:
        raise _explain(request, error) from error
    for remark in remarks:
        logger.debug("%s: %s", request.spec, remark.message)


def _explain(request: Request, error: Exception) -> SpecError:
    reason = in_short(error)
    if _is_network_error(error):
        return SpecError(
            request.spec,
            got=f"no download ({type(error).__name__}: {reason})",
            need="a network, or weights from a file",
            hint="--checkpoint FILE (checkpoint=…) or --no-pretrained (pretrained=False)",
        )
    if "No pretrained weights" in reason or "no pretrained cfg" in reason:
        return no_weights(request.spec, [])
    if reason.startswith("Invalid pretrained tag"):
        architecture = request.name.partition(".")[0]
        tags = library("timm").list_pretrained(f"{architecture}.*")
        return SpecError(
            request.spec,
            got=reason.rstrip("."),
            need="a tag that timm knows",
            hint=" or ".join(f"timm/{tag}" for tag in tags[:3]) or f"timm/{architecture}",
        )
    return SpecError(
        request.spec,
        got=f"{type(error).__name__} while building it ({reason})",
        need="a model that its library can build",
        hint="other options, or --debug for the traceback",
    )


def _is_network_error(error: BaseException) -> bool:
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not homes.isdisjoint(_NETWORK_PACKAGES)


def _network(request: Request) -> contextlib.AbstractContextManager[None]:
    """What has no need of the network does not even look for it."""
    from_hub = request.spec.startswith("hf-hub:") and not request.arguments
    if request.pretrained or from_hub:
        return no_waiting_for_a_dead_network()
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_waiting_for_a_dead_network() -> Iterator[None]:
    """Where the hub's host has no address, use its cache at once instead of retrying for 50 s."""
    hub: Any = sys.modules.get("huggingface_hub.constants")
    before = getattr(hub, "HF_HUB_OFFLINE", None)
    if hub is None or before is not False or _hub_has_address(str(getattr(hub, "ENDPOINT", ""))):
        yield
        return
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _hub_has_address(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # names are resolved by the proxy
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True

"""Artefacts on the Hugging Face Hub, through ``huggingface_hub``'s own functions.

What is uploaded are the artefact's three files and nothing else of its folder. What is downloaded
are two of them, record and weights, into the hub's own cache, where they are opened like any
directory: by their hashes, and without running what they name (``trust.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normswap.artifact.card import model_card
from normswap.artifact.loading import read_checked
from normswap.artifact.record import CARD, RECORD, WEIGHTS
from normswap.artifact.writing import save
from normswap.errors import ArtifactError, SpecError, in_short
from normswap.factories.request import no_waiting_for_a_dead_network
from normswap.files import current

PREFIX = "hf-hub:"
_TASKS = {"image": "image-classification", "detection": "object-detection"}


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be.

    Attributes:
        repo_id: ``ORG/NAME``.
        url: of the commit; None if nothing was uploaded.
        files: their sizes in bytes.
        card: the model card, with the hub's metadata.
    """

    repo_id: str
    url: str | None
    files: Mapping[str, int]
    card: str

    @property
    def spec(self) -> str:
        """What ``load_model`` takes."""
        return f"{PREFIX}{self.repo_id}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {**asdict(self), "spec": self.spec}


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload an artefact to the Hugging Face Hub, in one commit; the repository is made if need be.

    Args:
        model: the directory that ``save`` wrote, or a model, which is saved for the purpose.
        repo_id: ``ORG/NAME``.
        private: whether a new repository is; None: as the organisation has it.
        revision: branch; None: the main one.
        token: None: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
        dry_run: say what would be uploaded, and ask no network.

    Returns:
        Push: files, card, and where they are.

    Raises:
        ArtifactError: no artefact, or one that is damaged; a name that is none; no right to write
            there; no network.

    Example:
        >>> import normswap
        >>> source = normswap.load_model("timm/test_resnet", pretrained=False)
        >>> sorted(push_to_hub(source.model, "me/test", dry_run=True).files)
        ['README.md', 'model.safetensors', 'normswap.json']
    """
    _check_name(repo_id)
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as place:
            folder = save(model, Path(place) / repo_id.rpartition("/")[2])
            return _pushed(folder, repo_id, private, revision, token, dry_run=dry_run)
    return _pushed(Path(model), repo_id, private, revision, token, dry_run=dry_run)


def _pushed(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
    *,
    dry_run: bool,
) -> Push:
    document, _, _ = read_checked(folder)  # a damaged artefact stays here
    card = hub_card(document.data, repo_id)
    files: dict[str, Path | bytes] = {
        WEIGHTS: current(folder, WEIGHTS),
        RECORD: current(folder, RECORD),
        CARD: card.encode(),
    }
    sizes = {
        name: len(what) if isinstance(what, bytes) else what.stat().st_size
        for name, what in files.items()
    }
    url = None
    if not dry_run:
        url = _upload(files, repo_id, private, revision, token)
    return Push(repo_id, url, sizes, card)


def _upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="normswap")
    added = [CommitOperationAdd(name, what) for name, what in files.items()]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id, added, commit_message="Upload with normswap", revision=revision
        )
    except Exception as error:
        raise ArtifactError(
            repo_id,
            got=f"{type(error).__name__} from the hub ({in_short(error)})",
            need="a network, and a token that may write there",
            hint="`hf auth login`, or HF_TOKEN in the environment",
        ) from error
    return str(getattr(done, "commit_url", done))


def fetched(spec: str) -> Path | None:
    """The artefact in a repository, in the hub's cache; None if the repository holds none.

    Args:
        spec: ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``.

    Raises:
        SpecError: it holds one, which cannot be downloaded whole.
    """
    import huggingface_hub as hub
    import huggingface_hub.constants  # which the next line looks for

    repo_id, _, revision = spec.removeprefix(PREFIX).partition("@")
    with no_waiting_for_a_dead_network():
        try:
            record = Path(hub.hf_hub_download(repo_id, RECORD, revision=revision or None))
        except Exception:  # noqa: BLE001 - timm is asked next, and its errors are explained
            return None
        try:
            # of the record's own commit, so that nobody's upload comes in between
            hub.hf_hub_download(repo_id, WEIGHTS, revision=record.parent.name)
        except Exception as error:
            raise SpecError(
                spec,
                got=f"no download ({type(error).__name__}: {in_short(error)})",
                need="a network, or a copy in the hub's cache",
                hint="the same again",
            ) from error
    return record.parent


def hub_card(document: Mapping[str, Any], repo_id: str) -> str:
    """The model card with the hub's metadata above it."""
    from huggingface_hub import EvalResult, ModelCardData

    source = document.get("source") or {}
    task = _TASKS.get(str(source.get("task", "image")))
    targets = [str(plan.get("target")) for plan in document.get("plans") or []]
    score = _validated(document.get("history") or [])
    results = None
    if score is not None and task is not None:
        results = [
            EvalResult(
                task_type=task,
                dataset_type="own",
                dataset_name="validation images of the fine-tune",
                metric_type="accuracy",
                metric_value=score,
            )
        ]
    data = ModelCardData(
        library_name="normswap",
        pipeline_tag=task,
        base_model=_base_model(str(source.get("spec", ""))),
        tags=["normswap", "pytorch", *(_tag(target) for target in dict.fromkeys(targets))],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results,
    )
    card = model_card(document, repo_id, where=f"{PREFIX}{repo_id}")
    return f"---\n{data.to_yaml()}\n---\n\n{card}"


def _validated(history: list[Any]) -> float | None:
    """Top-1 on the validation images of the last fine-tune."""
    for entry in reversed(history):
        value = entry.get("val_top1") if isinstance(entry, Mapping) else None
        if isinstance(value, int | float):
            return float(value)
    return None


def _base_model(spec: str) -> str | None:
    """The hub's name of the model that this one was made from."""
    if spec.startswith("timm/") and "." in spec:
        return spec
    return spec.removeprefix(PREFIX).partition("@")[0] if spec.startswith(PREFIX) else None


def _tag(target: str) -> str:
    name = target.partition("(")[0]
    return name if name.replace("-", "").isalnum() else "mixed"


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        fine = repo_id.count("/") == 1
    except HFValidationError:
        fine = False
    if not fine:
        raise ArtifactError(
            repr(repo_id),
            got="no name of a repository",
            need="ORG/NAME, of letters, digits, '-', '_' and '.'",
            hint="your user name before the slash",
        )

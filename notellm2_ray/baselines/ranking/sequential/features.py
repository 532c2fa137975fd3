"""Frozen vectors that the sequential baselines can read instead of note ids: of images, and of texts about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from notellm2_ray.baselines.ranking.sequential.recommender import FrozenFeatures
from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.images import decode_image
from notellm2_ray.models.vision.load import load_tower
from notellm2_ray.models.vision.pixels import ImageSettings

log = logging.getLogger(__name__)

VGG19 = "vgg19"
_VGG19_REPOSITORY = "timm/vgg19.tv_in1k"  # torchvision's weights as safetensors
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_TEXT_TOKENS = 256
T = TypeVar("T")


def image_features(images: Iterable[tuple[str, bytes | None]], tower: str, batch_size: int = 32) -> FrozenFeatures:
    """The pooled vector of each image.

    Args:
        images: note id and encoded image; a note without an image, or with one that cannot be read, gets no vector.
        tower: a vision tower as in ``model.vision``, or ``vgg19``: the second fully connected layer (4,096 wide) of
            torchvision's VGG19, which stands in for the paper's VGG19 row.

    Raises:
        ModelError: the tower's weights are missing; random weights never stand in for them.
        DataError: no image can be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, forward = _vgg19(device) if tower == VGG19 else _tower(tower, device)
    ids: list[str] = []
    found: list[np.ndarray] = []
    for batch in _batches(_readable(images, settings), batch_size):
        ids += [note_id for note_id, _ in batch]
        pixels = torch.from_numpy(np.stack([one for _, one in batch])).to(device)
        with torch.no_grad():
            found.append(forward(pixels).float().cpu().numpy())
    if not found:
        raise DataError(f"no note has a readable image: leave gru4rec_image out of ranking.baselines (tower: {tower})")
    return FrozenFeatures(ids, np.concatenate(found))


def text_features(
    texts: Mapping[str, str], llm: str, *, attention: str = "sdpa", revision: str | None = None, batch_size: int = 32
) -> FrozenFeatures:
    """The mean of a causal LM's last hidden states over each text's tokens.

    Args:
        texts: note id to text. An empty text gets no vector; only the first 256 tokens of a text are read.
        llm: directory or hub name.

    Raises:
        ModelError: see :func:`notellm2_ray.models.llm.load_llm`.
        DataError: all texts are empty.
    """
    from transformers import AutoTokenizer

    from notellm2_ray.models.llm import load_config, load_llm
    from notellm2_ray.models.user_text import UserTextEncoder

    load_config(llm, revision)  # its message on a bad path is clearer than the tokenizer's
    encoder = UserTextEncoder(AutoTokenizer.from_pretrained(llm, revision=revision, trust_remote_code=False))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_llm(llm, attention, revision=revision).eval().to(device)
    encoded = zip(texts, encoder.encode(list(texts.values())), strict=True)
    rows = sorted(((note, ids[:_MAX_TEXT_TOKENS]) for note, ids in encoded if ids), key=lambda row: len(row[1]))
    if not rows:
        raise DataError("no note has an image summary: leave gru4rec_summary out of ranking.baselines")
    found = [_mean_states(model, [ids for _, ids in batch], device) for batch in _batches(iter(rows), batch_size)]
    return FrozenFeatures([note for note, _ in rows], np.concatenate(found))


@torch.no_grad()
def _mean_states(model: torch.nn.Module, rows: list[list[int]], device: torch.device) -> np.ndarray:
    """(B, H) mean state of each row; padding stands on the right, where causal attention never sees it."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.arange(longest, device=device)[None, :] < lengths[:, None]
    states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
    return ((states * mask[..., None]).sum(dim=1) / lengths[:, None]).cpu().numpy()


def _tower(name: str, device: torch.device) -> tuple[ImageSettings, Callable[[torch.Tensor], torch.Tensor]]:
    tower = load_tower(name, frozen=True).to(device)
    return tower.image, lambda pixels: tower(pixels).pooled


def _vgg19(device: torch.device) -> tuple[ImageSettings, Callable[[torch.Tensor], torch.Tensor]]:
    import timm

    state = _vgg19_weights()  # first, since creating the model draws 140 million random weights
    model = timm.create_model("vgg19", pretrained=False, num_classes=0)  # the output is that of the second ReLU
    try:
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.fc.")})
    except RuntimeError as error:
        raise ModelError(f"the weights in {_VGG19_REPOSITORY} are not those of vgg19: {error}") from error
    model.eval().requires_grad_(False).to(device)
    settings = ImageSettings(224, _IMAGENET_MEAN, _IMAGENET_STD, resize_to=256, resample=2)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return settings, lambda pixels: model((pixels.float() / 255 - mean) / std)


def _vgg19_weights() -> dict[str, torch.Tensor]:
    """torchvision's weights as safetensors, from the hub or its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(hf_hub_download(_VGG19_REPOSITORY, "model.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, SafetensorError, OSError) as error:
        raise ModelError(
            f"the weights of vgg19 are not available ({error}): download model.safetensors of {_VGG19_REPOSITORY} into "
            "the hub's cache, or set ranking.image_tower to another vision tower"
        ) from error


def _readable(images: Iterable[tuple[str, bytes | None]], settings: ImageSettings) -> Iterator[tuple[str, np.ndarray]]:
    left_out = 0
    for note_id, data in images:
        try:
            if data is None:
                raise DataError("no image")
            image = decode_image(data, min_side=2 * settings.resize_to)
        except DataError:
            left_out += 1
            continue
        yield note_id, settings.pixels(image)
    if left_out:
        log.warning("%d notes have no readable image: gru4rec_image treats them as unknown notes", left_out)


def _batches(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(rows, size)):
        yield batch

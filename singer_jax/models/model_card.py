"""Writes the README.md of an export: a model card for the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from etils import epath

from singer_jax.io.files import write_text
from singer_jax.models.zoo import ModelSpec

CARD_FILE = "README.md"

# The file that identifies each format in a folder. transformers has its own folder, because its
# config.json and model.safetensors have the same names as timm's.
HUGGINGFACE_FOLDER = "huggingface"
ONNX_FILE = "model.onnx"
PROGRAM_FILE = "features.stablehlo"
_FILES = {"timm": "model.safetensors", "onnx": ONNX_FILE, "stablehlo": PROGRAM_FILE}

_LOADING = {
    "timm": """\
With timm (1.0.16 or newer); the second line is the transform of its input:

```python
model = timm.create_model("local-dir:PATH", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`PATH` is this folder; on the hub the name is `"hf-hub:OWNER/NAME"`.
""",
    "huggingface": """\
With transformers:

```python
processor = AutoImageProcessor.from_pretrained("PATH")
model = AutoModel.from_pretrained("PATH")
features = model(**processor(image, return_tensors="pt")).last_hidden_state
```

`PATH` is this folder, or `OWNER/NAME` on the hub. `pooler_output` is {pooler}.
""",
    "onnx": """\
With onnxruntime, at any batch size:

```python
session = onnxruntime.InferenceSession("PATH/model.onnx")
tokens, pooled = session.run(["last_hidden_state", "pooler_output"], {{"pixel_values": images}})
```

`images` are float32 [batch, 3, {height}, {width}], normalised as above. `last_hidden_state` is
the output of {last}.{logits}
""",
    "stablehlo": """\
With JAX alone; `images` are uint8 [batch, {height}, {width}, 3]:

```python
program = jax.export.deserialize(bytearray(open("PATH/features.stablehlo", "rb").read()))
features = program.call(images)["tokens"]
```
""",
    "singer_jax": """\
With the package that made it:

```python
model = singer_jax.load_model("PATH")
features = model.features(model.spec.prepare(images))[-1]
```
""",
}


def write_card(
    folder: epath.Path, spec: ModelSpec, made_from: Mapping[str, Any], library: str = "timm"
) -> None:
    """Writes `README.md` for the formats found in `folder`.

    Args:
      folder: folder of the export.
      spec: specification of the model.
      made_from: origin of the model as returned by `provenance.origin`, or only `weights` if other
        weights were exported unchanged. May be empty.
      library: library that the folder is for, `timm` or `huggingface`.
    """
    formats = [library]
    if library == "timm":
        formats = [name for name, file in _FILES.items() if (folder / file).exists()]
        formats += ["singer_jax"] if "timm" in formats else []
    write_text(folder / CARD_FILE, model_card(spec, made_from, formats))


def model_card(spec: ModelSpec, made_from: Mapping[str, Any], formats: list[str]) -> str:
    """Returns the text of a model card; the publisher has to choose the licence."""
    arch = spec.arch
    height, width = arch.img_size
    pooled = "the class token, and not the mean of the patches that the head reads"
    normed = arch.final_norm and not arch.fc_norm
    words = {
        "last": "the final norm" if normed else "the last block, without a norm",
        "height": height,
        "width": width,
        "pooler": pooled if arch.global_pool == "avg" else "what a head reads",
        "logits": " A third output is `logits`." if arch.num_classes else "",
    }
    loading = "\n".join(_LOADING[name].format_map(words) for name in formats)
    front_matter = "\n".join(_front_matter(spec, made_from, formats))
    kind = f"{arch.num_classes} classes" if arch.num_classes else "features, no head"
    return f"""---
{front_matter}
---

# {spec.name}

A vision transformer ({kind}) with {arch.depth} blocks of width {arch.embed_dim},
{arch.num_heads} heads, patches of {arch.patch_size} pixels and {arch.num_prefix_tokens} prefix
tokens. It is a variant of timm's `{spec.timm_name}`.

## Training

{_training(made_from)}
## Input

| | |
|---|---|
| size | {height} x {width} pixels |
| resize, then centre crop | {spec.interpolation}, crop_pct {spec.crop_pct:.4g} |
| mean | {_numbers(spec.mean)} |
| standard deviation | {_numbers(spec.std)} |

## Loading

{loading}
## Licence

None is chosen yet: set `license:` at the top. Consider the licences of the base models and of the
images.
"""


def _front_matter(
    spec: ModelSpec, made_from: Mapping[str, Any], formats: list[str]
) -> Iterator[str]:
    yield f"library_name: {'transformers' if 'huggingface' in formats else 'timm'}"
    task = "classification" if spec.arch.num_classes else "feature-extraction"
    yield f"pipeline_tag: image-{task}"
    yield "tags:"
    yield from ("- vision-transformer", "- singer-jax")
    if "method" in made_from:
        yield "- knowledge-distillation"
    origins = (made_from.get(role) or {} for role in ("teacher", "student", "weights"))
    if bases := list(dict.fromkeys(filter(None, map(_hub_name, origins)))):
        yield "base_model:"
        yield from (f"- {json.dumps(name)}" for name in bases)
    yield "# license: choose one"


def _training(made_from: Mapping[str, Any]) -> str:
    if "weights" in made_from:
        return f"The weights of {_weights(made_from['weights'])}, unchanged.\n"
    if "method" not in made_from:
        return "Not recorded.\n"
    data, steps = made_from.get("data") or {}, made_from["steps"]
    lines = [
        f"- method: {_code(made_from['method'])}",
        f"- teacher: {_weights(made_from['teacher'])}",
    ]
    lines.append(f"- initial weights: {_weights(made_from['student'])}")
    lines.append(f"- steps: {steps:,}")
    if data:
        size = data["batch_size"]
        seen = f"{steps * size:,} seen ({steps:,} steps of {size:,})"
        lines.append(f"- images: {seen}, from {_code(data['source'])}")
    return "Distilled with singer_jax.\n\n" + "\n".join(lines) + "\n"


def _weights(found: Mapping[str, Any] | None) -> str:
    """Returns a description of a model and its weights; local files are named without folder."""
    if not found:
        return "none"
    if "sha256" not in found:
        return f"{_code(found['model'])}, random"
    name = _hub_name(found) or PurePath(found["file"]).name
    return f"{_code(found['model'])}, {_code(name)} (sha256 {_code(found['sha256'])})"


def _hub_name(found: Mapping[str, Any]) -> str:
    """Returns the Hub repository of weights; empty for a local file."""
    name = found.get("weights", "") if found.get("revision") else ""
    return name if "/" in name or not name else f"timm/{name}"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
